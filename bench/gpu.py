"""GPT-J-6B on one GPU, offline, with random weights: speed, memory, and the planner against what was measured.

    python bench/gpu.py [--part lora full kernels generate profile] [--steps 8] [--out bench/results/gpu.json]
    python bench/gpu.py --dry-run          the same on a CPU with a tiny model: does every part still run?

lora      LoRA at sequence 2048 over micro-batches, with and without activation checkpointing; and transformers' Trainer
          with DeepSpeed on its eager GPT-J at the micro-batches that fit: tokens/s, MFU, peak bytes, plan beside them
full      all weights with the optimizer on the host, 131,072 tokens a step, stages 1 and 3
kernels   attention, loss and GELU alone beside their eager counterparts over length
generate  tokens/s of greedy generation beside transformers' GPT-J, batches of 1 and 32
profile   torch's profiler over LoRA steps: where the time goes

All programs load one checkpoint of random weights, drawn once. A run that does not fit is recorded with its message and
the others go on; `--out` is written after each part. Every result names date, GPU, driver, versions and command. Wheels that
a machine without network lacks: deepspeed, hydra-core, omegaconf, antlr4, datasets, zstandard, hjson, pydantic (pip
download --no-deps, DS_BUILD_OPS=0). The planner against measured peaks: python bench/plan_accuracy.py --cases gpu
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workload import ROOT, dense_documents, launch, machine

LORA = {"q,v": "[q_proj,v_proj]", "all-linear": "all-linear"}
TOKENS_PER_STEP = 131_072
PARTS = ("lora", "full", "kernels", "generate", "profile")
SHARD_BYTES = 4 * 2**30


def checkpoint(folder: Path, name: str) -> Path:
    """Random bf16 weights of the model `name` in Hugging Face's layout, drawn on the GPU where there is one."""
    import torch

    from finetune.assets.paths import asset
    from finetune.data.tokenizer import load_tokenizer
    from finetune.export.safetensors_writer import ShardWriter
    from finetune.planning.shape import load_shape

    folder.mkdir()
    shutil.copy(asset(name) / "config.json", folder)
    load_tokenizer(None).save_pretrained(folder)
    shapes = dict(load_shape(str(asset(name)), "lm", 2).tensors())
    device, writer = (
        "cuda" if torch.cuda.is_available() else "cpu",
        ShardWriter(folder, shapes, torch.bfloat16, SHARD_BYTES),
    )
    torch.manual_seed(0)
    for tensor_name, shape in shapes.items():
        if len(shape) == 1:
            value = torch.full(
                shape, float("ln_" in tensor_name and tensor_name.endswith("weight"))
            )
        else:
            value = torch.randn(shape, device=device).mul_(0.02)
        writer.add(tensor_name, value.bfloat16().cpu())
    writer.close()
    return folder


def our_run(folder: Path, model: Path, data: Path, steps: int, words: list[str]) -> dict:
    """One run of this project; its figures, or its message when it fails."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [
        "recipe=clm_pile",
        f"model.path={model}",
        f"data.train={data}",
        "data.eval=null",
        f"train.steps={steps}",
        "train.eval_every=0",
        "optim.schedule=constant",
        "optim.warmup=0",
        "export.enabled=false",
        "checkpoint.every=0",
        f"data.cache_dir={folder / 'cache'}",
        f"run_dir={run_dir}",
        *words,
    ]
    record: dict = {"words": words}
    try:
        launch(1, "launch/train.py", command, folder / "run.log")
    except RuntimeError as error:
        return record | {"error": str(error).strip().splitlines()[-1]}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if line["kind"] == "train"][2:]
    result, plan = (
        json.loads((run_dir / name).read_text()) for name in ("result.json", "plan.json")
    )
    chosen = next(
        option
        for option in plan["options"]
        if all(option[key] == plan["chosen"][key] for key in plan["chosen"] if key in option)
    )
    return record | {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steady),
        "mfu": statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None,
        "peak_gpu_bytes": result["peak_gpu_bytes"],
        "peak_host_bytes": result["peak_host_bytes"],
        "predicted_gpu_bytes": chosen["gpu_bytes"],
        "predicted_host_bytes": chosen["host_bytes"],
        "predicted_tensor_bytes": chosen.get("tensor_bytes"),
    }


def trainer_run(
    folder: Path, model: Path, length: int, micro: int, steps: int, checkpointing: bool
) -> dict:
    """transformers' Trainer with DeepSpeed stage 0 on its own GPT-J, LoRA on q and v."""
    place = folder / "peer"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rows = place / "rows.jsonl"
    rows.write_text(
        "\n".join(
            json.dumps(
                {
                    "input_ids": [(7 * i + j) % 50000 for j in range(length)],
                    "labels": [(7 * i + j) % 50000 for j in range(length)],
                }
            )
            for i in range(micro * (steps + 1))
        )
    )
    spec = {
        "peer": "trainer",
        "model": str(model),
        "rows": str(rows),
        "out": str(place / "out"),
        "steps": steps,
        "micro": micro,
        "stage": 0,
        "length": length,
        "checkpointing": checkpointing,
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
        },
    }
    (place / "spec.json").write_text(json.dumps(spec))
    record: dict = {"micro": micro, "checkpointing": checkpointing}
    try:
        launch(1, "bench/peer_trainer.py", [str(place / "spec.json")], folder / "peer.log")
    except RuntimeError as error:
        return record | {"error": str(error).strip().splitlines()[-1]}
    out = json.loads((place / "out.0.json").read_text())
    return record | {
        "tokens_per_second": micro * length / statistics.median(out["seconds"][2:]),
        "peak_gpu_bytes": out.get("peak_gpu_bytes"),
        "peak_host_bytes": out["peak_host_bytes"],
    }


def lora(folder: Path, model: Path, data: Path, steps: int, length: int, micros: list[int]) -> dict:
    ours, peers = [], []
    for targets in LORA.values():
        for checkpointing in (False, True):
            for micro in micros:
                ours.append(
                    _told(
                        our_run(
                            folder,
                            model,
                            data,
                            steps,
                            [
                                "adapter=lora",
                                f"adapter.targets={targets}",
                                "zero=stage0",
                                f"task.max_length={length}",
                                f"train.micro_batch={micro}",
                                f"train.global_batch={micro}",
                                f"train.activation_checkpointing={str(checkpointing).lower()}",
                            ],
                        )
                    )
                )
    for checkpointing in (False, True):
        for micro in micros:
            peers.append(_told(trainer_run(folder, model, length, micro, steps, checkpointing)))
    best = [
        max((r["tokens_per_second"] for r in runs if "tokens_per_second" in r), default=None)
        for runs in (ours, peers)
    ]
    return {
        "ours": ours,
        "trainer": peers,
        "best": dict(zip(("ours", "trainer"), best, strict=True)),
        "ratio": best[0] / best[1] if all(best) else None,
    }


def full(folder: Path, model: Path, data: Path, steps: int, length: int, micros: list[int]) -> dict:
    batch = max(1, TOKENS_PER_STEP // length) if length == 2048 else 2 * max(micros)
    runs = []
    for stage in (1, 3):
        for micro in [m for m in micros if batch % m == 0]:
            runs.append(
                _told(
                    our_run(
                        folder,
                        model,
                        data,
                        max(3, steps // 2),
                        [
                            "adapter=full",
                            f"zero=stage{stage}",
                            "zero.offload_optimizer=cpu",
                            f"task.max_length={length}",
                            f"train.micro_batch={micro}",
                            f"train.global_batch={batch}",
                            "train.activation_checkpointing=true",
                        ],
                    )
                )
            )
    return {"ours": runs}


def kernels(lengths: list[int], heads: int, width: int) -> list[dict]:
    """Milliseconds, forward and backward, of attention, of the head with its loss, of the GELU, for one sequence."""
    import torch
    import torch.nn.functional as F
    from transformers.activations import NewGELUActivation

    from finetune.gptj.attention import pack, packed_attention, pick_attention
    from finetune.gptj.loss import chunked_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = pick_attention("auto", device.type, torch.bfloat16)
    weight = (
        torch.randn(50400, width, device=device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    )
    rows = []
    for length in lengths:
        q, k, v = (
            torch.randn(
                length, heads, width // heads, device=device, dtype=torch.bfloat16
            ).requires_grad_()
            for _ in range(3)
        )
        boundaries = torch.tensor([0, length], dtype=torch.int32)
        hidden = torch.randn(length, width, device=device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(0, 50400, (length,), device=device)
        wide = torch.randn(length, 4 * width, device=device, dtype=torch.bfloat16).requires_grad_()
        row = {"length": length, "attention": kind}
        for name, work in {
            "attention_ms": lambda q=q, k=k, v=v, b=boundaries, n=kind: packed_attention(
                q, k, v, pack(b, n, device)
            ).sum(),
            "eager_attention_ms": lambda q=q, k=k, v=v, b=boundaries: packed_attention(
                q, k, v, pack(b, "eager", device)
            ).sum(),
            "loss_ms": lambda h=hidden, t=labels: chunked_cross_entropy(h, weight, None, t),
            "gelu_ms": lambda x=wide: F.gelu(x, approximate="tanh").sum(),
            "eager_gelu_ms": lambda x=wide: NewGELUActivation()(x).sum(),
            "eager_loss_ms": lambda h=hidden, t=labels: F.cross_entropy(
                (h @ weight.T).float(), t, reduction="sum"
            ),
        }.items():
            row[name] = _milliseconds(work, device)
        rows.append(_told(row))
    return rows


def _milliseconds(work, device, repeat: int = 5) -> float:
    import torch

    times = []
    for _ in range(repeat + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def generate(model: Path, batches: list[int], new: int, prompt: int) -> list[dict]:
    """Greedy tokens per second, the same weights and prompts; the share of equal tokens, since bf16 rounds differently."""
    import torch
    from transformers import GPTJForCausalLM

    from finetune.config import Dtype
    from finetune.data.tokenizer import load_tokenizer
    from finetune.export.reopen import load_export
    from finetune.gptj.library import to_library_model
    from finetune.inference.sample import Sampling, continue_ids

    device, tokenizer = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        load_tokenizer(None),
    )
    models = {
        "ours": to_library_model(load_export(model, Dtype.bf16, device).module),
        "transformers": GPTJForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        .to(device)
        .eval(),
    }
    how, rows = Sampling(new, temperature=0), []
    for batch in batches:
        prompts = [[(97 * i + 7 * j) % 50000 for j in range(prompt)] for i in range(batch)]
        row, found = {"batch": batch, "prompt_tokens": prompt, "new_tokens": new}, {}
        for name, module in models.items():
            times = []
            for _ in range(3):
                began = time.perf_counter()
                found[name] = continue_ids(
                    module, tokenizer, prompts, how, device
                )  # ends with a copy to the host
                times.append(time.perf_counter() - began)
            row[name] = {
                "tokens_per_second": sum(map(len, found[name])) / statistics.median(times[1:])
            }
        same = [
            a == b
            for mine, theirs in zip(found["ours"], found["transformers"], strict=True)
            for a, b in zip(mine, theirs, strict=False)
        ]
        rows.append(_told(row | {"equal_tokens": statistics.mean(same) if same else None}))
    return rows


def profile(model: Path, length: int, micro: int) -> str:
    """The table of `bench/profile_step.py` for LoRA at stage 0."""
    command = [
        sys.executable,
        "bench/profile_step.py",
        "--model",
        str(model),
        "--lora",
        "--stage",
        "0",
        "--rows",
        "30",
        "--length",
        str(length),
        "--micro",
        str(micro),
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    table = ran.stdout if ran.returncode == 0 else ran.stderr[-2000:]
    print(table, flush=True)
    return table


def _told(record: dict) -> dict:
    print(" ", json.dumps(record), flush=True)
    return record


def gpu() -> dict | None:
    """Name, memory and driver of the first GPU."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    return dict(
        zip(("name", "memory", "driver"), (part.strip() for part in out.split(",")), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny model, here, to see that every part runs"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = gpu()
    if device is None and not args.dry_run:
        sys.exit("no GPU here; --dry-run tries every part with a tiny model on the CPU")
    dry = args.dry_run
    name, length, micros, steps = (
        ("gptj_tiny", 128, [1], 4) if dry else ("gptj_6b", 2048, args.micro, args.steps)
    )
    report: dict = {
        "command": " ".join(["python", *sys.argv]),
        "gpu": device,
        "machine": machine(),
        "model": name,
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = checkpoint(folder / "model", name)
        data = dense_documents(folder / "data.jsonl", length * max(max(micros) * (steps + 2), 200))
        work = {
            "lora": lambda: lora(folder, model, data, steps, length, micros),
            "full": lambda: full(folder, model, data, steps, length, micros),
            "kernels": lambda: (
                kernels([128, 256], 16, 256) if dry else kernels([512, 1024, 2048], 16, 4096)
            ),
            "generate": lambda: (
                generate(model, [1, 2], 8, 32) if dry else generate(model, [1, 32], 128, 512)
            ),
            "profile": lambda: profile(model, length, 1 if dry else 4),
        }
        for part in args.part:
            print(part, flush=True)
            report[part] = work[part]()
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report.get("lora", {}).get("best")))


if __name__ == "__main__":
    main()
