"""GPT-J-6B on one GPU, offline, with random weights: speed, memory, and the planner against what was measured.

    python bench/gpu.py [--part lora full kernels] [--steps 8] [--out bench/results/gpu.json]
    python bench/gpu.py --dry-run          the same on a CPU with a tiny model: does every part still run?

lora      LoRA at sequence 2048 over micro-batches, with and without activation checkpointing; and transformers' Trainer
          with DeepSpeed on its eager GPT-J at the micro-batches that fit: tokens/s, MFU, peak bytes, plan beside them
full      all weights with the optimizer on the host, 131,072 tokens a step, stages 1 and 3
kernels   attention and loss alone beside their eager counterparts over length

A run that does not fit is recorded with its message and the others go on. Every result names date, GPU, driver,
versions and command. Wheels that a machine without network lacks: deepspeed, hydra-core, omegaconf, antlr4, datasets,
zstandard, hjson, pydantic (pip download --no-deps, DS_BUILD_OPS=0).
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

from workload import dense_documents, launch, machine

LORA = {"q,v": "[q_proj,v_proj]", "all-linear": "all-linear"}
TOKENS_PER_STEP = 131_072


def our_run(folder: Path, model: str, data: Path, steps: int, words: list[str]) -> dict:
    """One run of this project; its figures, or its message when it fails."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = ["recipe=clm_pile", f"model={model}", "model.init=random", f"data.train={data}", "data.eval=null",
               f"train.steps={steps}", "train.eval_every=0", "optim.schedule=constant", "optim.warmup=0",
               "export.enabled=false", "checkpoint.every=0", f"data.cache_dir={folder / 'cache'}",
               f"run_dir={run_dir}", *words]
    record: dict = {"words": words}
    try:
        launch(1, "launch/train.py", command, folder / "run.log")
    except RuntimeError as error:
        return record | {"error": str(error).strip().splitlines()[-1]}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if line["kind"] == "train"][2:]
    result, plan = (json.loads((run_dir / name).read_text()) for name in ("result.json", "plan.json"))
    chosen = next(option for option in plan["options"]
                  if all(option[key] == plan["chosen"][key] for key in plan["chosen"] if key in option))
    return record | {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steady),
        "mfu": statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None,
        "peak_gpu_bytes": result["peak_gpu_bytes"], "peak_host_bytes": result["peak_host_bytes"],
        "predicted_gpu_bytes": chosen["gpu_bytes"], "predicted_host_bytes": chosen["host_bytes"],
        "predicted_tensor_bytes": chosen.get("tensor_bytes"),
    }


def trainer_run(folder: Path, model: str, length: int, micro: int, steps: int, checkpointing: bool) -> dict:
    """transformers' Trainer with DeepSpeed stage 0 on its own GPT-J, LoRA on q and v."""
    from finetune.assets_path import asset

    place = folder / "peer"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copy(asset(model) / "config.json", place)
    rows = place / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"input_ids": [(7 * i + j) % 50000 for j in range(length)],
                                          "labels": [(7 * i + j) % 50000 for j in range(length)]})
                              for i in range(micro * (steps + 1))))
    spec = {"peer": "trainer", "model": str(place), "rows": str(rows), "out": str(place / "out"), "steps": steps,
            "micro": micro, "stage": 0, "length": length, "random": True, "checkpointing": checkpointing,
            "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}}
    (place / "spec.json").write_text(json.dumps(spec))
    record: dict = {"micro": micro, "checkpointing": checkpointing}
    try:
        launch(1, "bench/peer_trainer.py", [str(place / "spec.json")], folder / "peer.log")
    except RuntimeError as error:
        return record | {"error": str(error).strip().splitlines()[-1]}
    out = json.loads((place / "out.0.json").read_text())
    return record | {"tokens_per_second": micro * length / statistics.median(out["seconds"][2:]),
                     "peak_gpu_bytes": out.get("peak_gpu_bytes"), "peak_host_bytes": out["peak_host_bytes"]}


def lora(folder: Path, model: str, data: Path, steps: int, length: int, micros: list[int]) -> dict:
    ours, peers = [], []
    for targets in LORA.values():
        for checkpointing in (False, True):
            for micro in micros:
                ours.append(_told(our_run(folder, model, data, steps, [
                    "adapter=lora", f"adapter.targets={targets}", "zero=stage0", f"task.max_length={length}",
                    f"train.micro_batch={micro}", f"train.global_batch={micro}",
                    f"train.activation_checkpointing={str(checkpointing).lower()}"])))
    for checkpointing in (False, True):
        for micro in micros:
            peers.append(_told(trainer_run(folder, model, length, micro, steps, checkpointing)))
    best = [max((r["tokens_per_second"] for r in runs if "tokens_per_second" in r), default=None)
            for runs in (ours, peers)]
    return {"ours": ours, "trainer": peers, "best": dict(zip(("ours", "trainer"), best, strict=True)),
            "ratio": best[0] / best[1] if all(best) else None}


def full(folder: Path, model: str, data: Path, steps: int, length: int, micros: list[int]) -> dict:
    batch = max(1, TOKENS_PER_STEP // length) if length == 2048 else 2 * max(micros)
    runs = []
    for stage in (1, 3):
        for micro in [m for m in micros if batch % m == 0]:
            runs.append(_told(our_run(folder, model, data, max(3, steps // 2), [
                "adapter=full", f"zero=stage{stage}", "zero.offload_optimizer=cpu", f"task.max_length={length}",
                f"train.micro_batch={micro}", f"train.global_batch={batch}", "train.activation_checkpointing=true"])))
    return {"ours": runs}


def kernels(lengths: list[int], heads: int, width: int) -> list[dict]:
    """Milliseconds, forward and backward, of attention and of the head with its loss, for one sequence."""
    import torch
    import torch.nn.functional as F

    from finetune.gptj.attention import pack, packed_attention, pick_attention
    from finetune.gptj.loss import chunked_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = pick_attention("auto", device.type, torch.bfloat16)
    weight = torch.randn(50400, width, device=device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    rows = []
    for length in lengths:
        q, k, v = (torch.randn(length, heads, width // heads, device=device, dtype=torch.bfloat16).requires_grad_()
                   for _ in range(3))
        boundaries = torch.tensor([0, length], dtype=torch.int32)
        hidden = torch.randn(length, width, device=device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(0, 50400, (length,), device=device)
        row = {"length": length, "attention": kind}
        for name, work in {
            "attention_ms": lambda q=q, k=k, v=v, b=boundaries, n=kind: packed_attention(
                q, k, v, pack(b, n, device)).sum(),
            "eager_attention_ms": lambda q=q, k=k, v=v, b=boundaries: packed_attention(
                q, k, v, pack(b, "eager", device)).sum(),
            "loss_ms": lambda h=hidden, t=labels: chunked_cross_entropy(h, weight, None, t),
            "eager_loss_ms": lambda h=hidden, t=labels: F.cross_entropy((h @ weight.T).float(), t, reduction="sum"),
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


def _told(record: dict) -> dict:
    print(" ", json.dumps(record), flush=True)
    return record


def gpu() -> dict | None:
    """Name, memory and driver of the first GPU."""
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
                             capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    return dict(zip(("name", "memory", "driver"), (part.strip() for part in out.split(",")), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["lora", "full", "kernels"], choices=["lora", "full", "kernels"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, here, to see that every part runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = gpu()
    if device is None and not args.dry_run:
        sys.exit("no GPU here; --dry-run tries every part with a tiny model on the CPU")
    model, length, micros, steps = ("gptj_tiny", 128, [1], 4) if args.dry_run else (
        "gptj_6b", 2048, args.micro, args.steps)
    report: dict = {"command": " ".join(["python", *sys.argv]), "gpu": device, "machine": machine(), "model": model}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = dense_documents(folder / "data.jsonl", length * max(max(micros) * (steps + 2), 200))
        for part in args.part:
            print(part, flush=True)
            if part == "kernels":
                report[part] = kernels([128, 256], 16, 256) if args.dry_run else kernels([512, 1024, 2048], 16, 4096)
            else:
                report[part] = (lora if part == "lora" else full)(folder, model, data, steps, length, micros)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report.get("lora", {}).get("best")))


if __name__ == "__main__":
    main()
