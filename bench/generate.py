"""Generated tokens per second of an export, as launch/generate.py opens it, beside plain transformers.

    python bench/generate.py [--rounds 3] [--new 64] [--out bench/results/generate.json]

Five ways to the same text, in turns: `merged` is a whole model opened by this project, `adapter` a LoRA on its base
opened by this project, `transformers` and `peft` are the same two opened by from_pretrained, and `no_cache` is the
training forward, which samples during training use. Prompts of a batch have different lengths and are padded on the
left. The first round of each is not counted. Peak memory is that of a process of its own that opens one of them and
answers once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from workload import ROOT, Size, machine, make_model, words

PROMPT_TOKENS = (64, 512)
"""Shortest and longest prompt of a batch; a batch of one has the longest."""
WAYS = ("merged", "adapter", "transformers", "peft", "no_cache")


def main() -> None:
    args = arguments()
    if args.memory:
        print(json.dumps(memory(args.memory, args.folder, args.dtype, args.new)))
        return
    from finetune import dist

    dist.use_cores(0, 1)
    size, rows = Size(), []
    with tempfile.TemporaryDirectory() as folder:
        make_exports(Path(folder), size)
        models = {way: open_way(way, Path(folder), args.dtype) for way in WAYS}
        for batch in args.batch:
            rows.append(compare(models, batch, args.new, args.rounds))
            print(json.dumps(rows[-1]), flush=True)
        peaks = {way: peak_of(way, folder, args) for way in WAYS}
    result = {
        "command": f"python bench/generate.py --dtype {args.dtype} --new {args.new} --rounds {args.rounds}",
        "size": asdict(size),
        "dtype": args.dtype,
        "rows": rows,
        "peak_bytes": peaks,
        "machine": machine(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/generate.json")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_exports(folder: Path, size: Size) -> None:
    """A base, a LoRA of rank 16 on all linear layers, and both in one model. The LoRA changes the text."""
    import peft
    import torch
    from transformers import GPTJForCausalLM

    make_model(folder / "base", size)
    base = GPTJForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
    torch.manual_seed(1)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=16,
            lora_alpha=4,
            target_modules=targets,
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        ),
    )
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    for name in ("adapter", "merged"):
        for file in (folder / "base").glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())


def open_way(
    way: str, folder: Path, dtype: str
) -> Callable[[list[list[int]], int], list[list[int]]]:
    """A function from prompts and a number of new tokens to continuations."""
    import torch
    from peft import PeftModel
    from transformers import GPTJForCausalLM

    from finetune.config import Dtype
    from finetune.data.tokenizer import load_tokenizer
    from finetune.export.reopen import load_export
    from finetune.inference.sample import Sampling, continue_flat, continue_ids
    from finetune.inference.speaker import load_speaker

    device, tokenizer = torch.device("cpu"), load_tokenizer(None)
    if way in ("merged", "adapter"):
        speaker = load_speaker(str(folder / way), Dtype(dtype))
        return lambda prompts, new: speaker.continue_ids(prompts, Sampling(new, temperature=0))
    if way == "no_cache":
        module = load_export(folder / "merged", Dtype(dtype), device).module
        return lambda prompts, new: continue_flat(
            module, tokenizer, prompts, Sampling(new, temperature=0), device
        )
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = GPTJForCausalLM.from_pretrained(
        folder / ("merged" if way == "transformers" else "base"), dtype=kind
    ).eval()
    if way == "peft":
        model = (
            PeftModel.from_pretrained(model, folder / "adapter", autocast_adapter_dtype=False)
            .to(kind)
            .eval()
        )
    return lambda prompts, new: continue_ids(
        model, tokenizer, prompts, Sampling(new, temperature=0), device
    )


def compare(models: dict, batch: int, new: int, rounds: int) -> dict:
    """Tokens per second of every way on one batch, and whether the texts are the same."""
    prompts = cut(batch)
    seconds: dict[str, list[float]] = {way: [] for way in models}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(rounds + 1):
        for way, answer in models.items():
            began = time.perf_counter()
            texts[way] = answer(prompts, new)
            seconds[way].append(time.perf_counter() - began)
    made = sum(map(len, texts["transformers"]))
    ratios = [
        theirs / mine
        for mine, theirs in zip(seconds["merged"][1:], seconds["transformers"][1:], strict=True)
    ]
    return {
        "batch": batch,
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": made,
        "tokens_per_second": {
            way: made / statistics.median(times[1:]) for way, times in seconds.items()
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "same_text": {way: texts[way] == texts["transformers"] for way in models},
    }


def cut(batch: int) -> list[list[int]]:
    """Prompts of lengths spread evenly between the bounds."""
    from finetune.data.tokenizer import load_tokenizer

    text = load_tokenizer(None)(" ".join(words()[:20000]))["input_ids"]
    short, long = PROMPT_TOKENS
    lengths = [long - (long - short) * i // max(1, batch - 1) for i in range(batch)]
    return [text[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(batch)]


def peak_of(way: str, folder: str, args: argparse.Namespace) -> dict[str, int]:
    """`memory` in a process of its own: a child's peak begins with its parent's otherwise."""
    words = [
        sys.executable,
        __file__,
        "--memory",
        way,
        "--folder",
        folder,
        "--dtype",
        args.dtype,
        "--new",
        "8",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(way: str, folder: Path, dtype: str, new: int) -> dict[str, int]:
    """Resident bytes with all libraries loaded and before the model, and the peak after one answer at batch 8."""
    import peft  # noqa: F401
    import psutil
    import transformers  # noqa: F401

    import finetune.cli.generate  # noqa: F401
    from finetune.planning.machine import peak_host_bytes

    prompts, before = cut(8), psutil.Process().memory_info().rss
    open_way(way, folder, dtype)(prompts, new)
    return {"before": before, "peak": peak_host_bytes()}


if __name__ == "__main__":
    main()
