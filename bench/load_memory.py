"""Host memory of loading a 2 GB GPT-J, whole or quantised.

    python bench/load_memory.py [--layers 16] [--ranks 1 2] [--quantize none nf4 int8]

Writes random checkpoints in the layouts that people have (bf16 safetensors; one fp32 pytorch_model.bin with GPT-J's
legacy buffers), loads each as a run does at stage 0, 2 and 3, one process a rank on a CPU, and asks the kernel for each
rank's peak resident memory; quantised ones with a LoRA, at stage 0 and 3. The limit is 1.15 x (what the rank keeps + the
largest tensor as the file has it) + 700 MB of interpreter and libraries. Written to bench/results/load_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from workload import ROOT, free_port, machine

LIBRARIES, FACTOR = 700e6, 1.15
WIDTH, VOCABULARY, POSITIONS = 2048, 50400, 2048
STAGES = {"none": (0, 2, 3), "nf4": (0, 3), "int8": (0, 3)}
"""Quantisation -> the stages at which it is loaded."""
LAYOUTS = ("bf16 safetensors", "fp32 .bin")


def make(folder: Path, layers: int, layout: str) -> Path:
    """A checkpoint of random weights; never more than one tensor more than the file needs is in memory."""
    from finetune.config import ModelConfig
    from finetune.export.safetensors_writer import ShardWriter
    from finetune.gptj.load import meta_model, read_config

    folder.mkdir(parents=True)
    values = {
        "model_type": "gptj",
        "n_embd": WIDTH,
        "n_layer": layers,
        "n_head": WIDTH // 64,
        "rotary_dim": 32,
        "vocab_size": VOCABULARY,
        "n_positions": POSITIONS,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "architectures": ["GPTJForCausalLM"],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(values))
    model = meta_model(read_config(folder, ModelConfig(path=str(folder))), "lm")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if layout == "bf16 safetensors":
        writer = ShardWriter(folder, shapes, torch.bfloat16, 10**10)
        for name, shape in shapes.items():
            writer.add(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02))
        writer.close()
    else:
        state = {name: torch.empty(shape).normal_(0, 0.02) for name, shape in shapes.items()}
        for layer in range(layers):
            state[f"transformer.h.{layer}.attn.bias"] = torch.ones(
                1, 1, POSITIONS, POSITIONS, dtype=torch.bool
            ).tril()
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
        torch.save(state, folder / "pytorch_model.bin")
    return folder


def load(model: str, stage: int, quantize: str) -> None:
    """Load as one rank and print its figures."""
    from finetune import dist
    from finetune.compose import compose_train
    from finetune.planning import machine as memory_watch
    from finetune.sharding import deepspeed_config
    from finetune.sharding.engine import build_module, connect_deepspeed

    cfg = compose_train(
        [
            f"recipe={'clm_pile' if quantize == 'none' else 'clm_pile_lora'}",
            f"model.quantize={quantize}",
            "data.train=x.jsonl",
            f"model.path={model}",
            "model.dtype=bf16",
            "train.micro_batch=1",
            f"zero=stage{stage}",
        ]
    )
    world = dist.connect(threads=1)
    connect_deepspeed(world)
    config = deepspeed_config.build(cfg, deepspeed_config.Sharding(stage), world.size, False)
    before = memory_watch.peak_host_bytes()
    module = build_module(cfg, "lm", None, model, config, world)
    kept = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in module.parameters())
    stored = 4 if next(Path(model).glob("*.bin"), None) else 2
    largest = stored * max(getattr(p, "ds_numel", None) or p.numel() for p in module.parameters())
    world.barrier()
    print(
        "FIGURES"
        + json.dumps(
            {
                "rank": world.rank,
                "kept_bytes": kept,
                "largest_tensor_bytes": largest,
                "before_bytes": before,
                "peak_bytes": memory_watch.peak_host_bytes(),
            }
        ),
        flush=True,
    )
    dist.disconnect()


def measure(model: Path, stage: int, ranks: int, quantize: str) -> dict:
    """Figures of the rank that came highest."""
    common = os.environ | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [
                *(sys.executable, __file__, "--load", str(model)),
                *("--stage", str(stage), "--quantize", quantize),
            ],
            text=True,
            stdout=subprocess.PIPE,
            env=common | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    found = [
        json.loads(line.removeprefix("FIGURES"))
        for output in outputs
        for line in output.splitlines()
        if line.startswith("FIGURES")
    ]
    assert len(found) == ranks, outputs
    worst = max(found, key=lambda figures: figures["peak_bytes"])
    limit = FACTOR * (worst["kept_bytes"] + worst["largest_tensor_bytes"]) + LIBRARIES
    return worst | {"limit_bytes": round(limit), "within": worst["peak_bytes"] <= limit}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=16, help="of width 2048; 16 make 2.0 GB in bf16"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quantize", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--out", default=str(ROOT / "bench/results/load_memory.json"))
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.load, args.stage, args.quantize[0])
    folder = Path(tempfile.mkdtemp(prefix="load-memory-"))
    rows = []
    try:
        for layout in LAYOUTS:
            model = make(folder / layout.replace(" ", "-"), args.layers, layout)
            size = sum(file.stat().st_size for file in model.iterdir())
            cases = [(q, s, r) for q in args.quantize for s in STAGES[q] for r in args.ranks]
            for quantize, stage, ranks in cases:
                case = {"quantize": quantize, "stage": stage, "ranks": ranks}
                row = {"layout": layout, "file_bytes": size} | case
                rows.append(row | measure(model, stage, ranks, quantize))
                row = rows[-1]
                print(
                    f"{layout:16}  {quantize:4}  stage {stage}  {ranks} ranks  "
                    f"kept {row['kept_bytes'] / 1e9:.2f} GB  peak {row['peak_bytes'] / 1e9:.2f} GB "
                    f"of {row['limit_bytes'] / 1e9:.2f}  {'within' if row['within'] else 'ABOVE'}",
                    flush=True,
                )
            shutil.rmtree(model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = " ".join(["python", *sys.argv])
    Path(args.out).write_text(
        json.dumps({"command": command, **machine(), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
