"""Host memory of exporting a 2 GB GPT-J from ZeRO-3 shards: `python bench/export_memory.py [--layers 16]`.

Makes a run directory with a checkpoint of two ranks at stage 3 in this project's format (random masters; the averages
are zeros, which a sparse file holds for free), then exports from it with `launch/export.py`, each time in a process of
its own, and asks the kernel for its peak resident memory. The same program on a model of a few kilobytes is what
interpreter and libraries take. Written to bench/results/export_memory.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf
from workload import ROOT, peak_bytes

from finetune.checkpointing.format import FORMAT, entry_of, write_manifest
from finetune.compose import compose_train
from finetune.config import plain_config
from finetune.export.safetensors_writer import ShardWriter
from finetune.gptj.load import meta_model, read_config

RANKS = 2
KINDS = ("master", "exp_avg", "exp_avg_sq")
TOTAL = {
    "full": ["adapter=full"],
    "lora": ["adapter=lora", "adapter.rank=8", "adapter.targets=[q_proj,v_proj]"],
}


def model_folder(root: Path, layers: int, width: int) -> Path:
    """config.json and random bf16 weights."""
    folder = root / "base"
    folder.mkdir(parents=True)
    heads = width // 64
    values = {
        "model_type": "gptj",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "rotary_dim": 32,
        "vocab_size": 50400,
        "n_positions": 2048,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "architectures": ["GPTJForCausalLM"],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    writer = ShardWriter(folder, shapes, torch.bfloat16, 10**10)
    for name, shape in shapes.items():
        writer.add(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02))
    writer.close()


def write_shard(file: Path, pieces: dict[str, tuple[int, int]]) -> None:
    """One rank's fp32 fragments, name -> (first element, count): random masters, averages as holes in the file."""
    header, end = {}, 0
    for name, (start, count) in pieces.items():
        for kind in KINDS:
            place = [end, end + 4 * count]
            header[f"{name}|{start}|{kind}"] = {
                "dtype": "F32",
                "shape": [count],
                "data_offsets": place,
            }
            end += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        data = f.tell()
        for key, entry in header.items():
            if key.endswith("|master"):
                f.seek(data + entry["data_offsets"][0])
                f.write(memoryview(torch.empty(entry["shape"]).normal_(0, 0.02).numpy()).cast("B"))
        f.truncate(data + end)


def run_folder(
    root: Path, name: str, layers: int, width: int, words: list[str]
) -> tuple[Path, dict]:
    """A run directory as training at stage 3 on two ranks leaves it."""
    base = model_folder(root / name, layers, width)
    run = root / name / "run"
    cfg = compose_train(
        [
            "recipe=clm_pile",
            f"model.path={base}",
            "zero=stage3",
            f"run_dir={run}",
            *words,
            "data.train=asset:data/pile_sample/train.jsonl.zst",
            "data.eval=null",
        ]
    )
    config = read_config(base, cfg.model)
    shapes = {n: tuple(p.shape) for n, p in meta_model(config, "lm").named_parameters()}
    write_weights(base, shapes)
    step = run / "checkpoints/step-00000001"
    step.mkdir(parents=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain_config(cfg))))
    (run / "task.json").write_text("{}")
    trained = shapes if cfg.adapter.__class__.__name__ == "FullConfig" else lora_shapes(cfg, config)
    for rank in range(RANKS):
        pieces = {}
        for n, shape in trained.items():
            size = math.ceil(math.prod(shape) / RANKS)
            count = min(size, math.prod(shape) - rank * size)
            if count > 0:
                pieces[n] = (rank * size, count)
        write_shard(step / f"optim-{rank:05d}-of-{RANKS:05d}.safetensors", pieces)
    state = {
        "format": FORMAT,
        "world_size": RANKS,
        "adam_step": 1,
        "loss_scale": None,
        "identity": {},
        "state": {"step": 1, "tokens": 1, "seconds": 1.0},
    }
    (step / "state.json").write_text(json.dumps(state))
    write_manifest(step, 1, {f.name: entry_of(f) for f in step.iterdir()})
    return run, {
        "parameters": sum(math.prod(s) for s in shapes.values()),
        "largest_tensor_bytes_fp32": 4 * max(math.prod(s) for s in shapes.values()),
    }


def lora_shapes(cfg, config) -> dict[str, tuple[int, ...]]:
    from finetune.gptj import adapters

    shell = adapters.attach(meta_model(config, "lm"), cfg.adapter, "lm", "", 0)
    return {n: tuple(p.shape) for n, p in shell.named_parameters() if p.requires_grad}


def measure(run: Path, out: Path, words: list[str]) -> dict:
    """Peak resident bytes and written bytes of one export in a fresh process."""
    command = [sys.executable, str(ROOT / "launch/export.py"), f"run={run}", f"out={out}", *words]
    peak = peak_bytes(command)
    weights = [*out.glob("*.safetensors"), *out.glob("*.gguf")]
    written = sum(file.stat().st_size for file in weights)
    shutil.rmtree(out)
    return {"peak_bytes": peak, "written_bytes": written}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument(
        "--folder", default=None, help="where the checkpoint (4 GB) and the exports (2 GB) go"
    )
    args = parser.parse_args()
    cases = {
        "full": ("full", "kind=full", "verify=none"),
        "full, verified by tensors": ("full", "kind=full", "verify=tensors"),
        "merged LoRA": ("lora", "kind=merged", "verify=none"),
        "merged LoRA, verified by tensors": ("lora", "kind=merged", "verify=tensors"),
        "adapter": ("lora", "kind=adapter", "verify=none"),
        "phi, of a LoRA": ("lora", "kind=phi", "verify=none"),
        "gguf in f16, of a LoRA": ("lora", "kind=gguf", "dtype=f16", "verify=none"),
    }
    result: dict = {
        "command": "python bench/export_memory.py",
        "ranks": RANKS,
        "zero_stage": 3,
        "exports": {},
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        small = {
            name: run_folder(root, f"small-{name}", 1, 64, words)[0]
            for name, words in TOTAL.items()
        }
        large = {}
        for name, words in TOTAL.items():
            large[name], result["model"] = run_folder(root, name, args.layers, args.width, words)
        for label, (name, *words) in cases.items():
            bare = measure(small[name], root / "out", words)["peak_bytes"]
            row = measure(large[name], root / "out", words)
            above = row["peak_bytes"] - bare
            result["exports"][label] = row | {
                "libraries_bytes": bare,
                "above_libraries_bytes": above,
            }
            print(label, result["exports"][label], flush=True)
    (ROOT / "bench/results/export_memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
