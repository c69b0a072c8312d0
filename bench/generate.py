"""Generated tokens per second beside Hugging Face's GPT-J: the same weights, prompts and greedy choice, in turns.

    python bench/generate.py [--rounds 3] [--new 64] [--out bench/results/generate.json]

Both run in this process through transformers' `generate` with a key/value cache: what differs is the model. Prompts of
a batch are of different lengths and padded on the left. The first round of each is not counted. Texts must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from workload import ROOT, Size, machine, make_model, words

PROMPT_TOKENS = (64, 512)
"""Shortest and longest prompt of a batch; a batch of one has the longest."""


def main() -> None:
    args = arguments()
    import torch
    from transformers import GPTJForCausalLM

    from finetune import dist
    from finetune.config import Dtype
    from finetune.data.tokenizer import load_tokenizer
    from finetune.sample import Sampling, continue_ids
    from finetune.saved import load_export

    dist.use_cores(0, 1)
    tokenizer, device = load_tokenizer(None), torch.device("cpu")
    text = tokenizer(" ".join(words()[:20000]))["input_ids"]
    how = Sampling(args.new, temperature=0)
    size, rows = Size(), []
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "model", size)
        models = {
            "ours": load_export(path, Dtype(args.dtype), device).module,
            "transformers": GPTJForCausalLM.from_pretrained(
                path, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype], attn_implementation="eager").eval(),
        }
        for batch in args.batch:
            prompts = cut(text, batch)
            seconds, found = {name: [] for name in models}, {}
            for _ in range(args.rounds + 1):
                for name, model in models.items():
                    began = time.perf_counter()
                    found[name] = continue_ids(model, tokenizer, prompts, how, device)
                    seconds[name].append(time.perf_counter() - began)
            made = sum(map(len, found["ours"]))
            ratios = [theirs / mine for mine, theirs in zip(seconds["ours"][1:], seconds["transformers"][1:], strict=True)]
            rows.append({
                "batch": batch, "prompt_tokens": sum(map(len, prompts)), "new_tokens": made,
                **{name: {"tokens_per_second": made / statistics.median(times[1:])} for name, times in seconds.items()},
                "ratio": statistics.median(ratios), "ratios": ratios, "same_text": found["ours"] == found["transformers"]})
            print(json.dumps(rows[-1]), flush=True)
    result = {"command": f"python bench/generate.py --dtype {args.dtype} --new {args.new} --rounds {args.rounds}",
              "size": asdict(size), "dtype": args.dtype, "rows": rows, "machine": machine()}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/generate.json")
    return parser.parse_args()


def cut(text: list[int], batch: int) -> list[list[int]]:
    """Prompts of lengths spread evenly between the bounds."""
    short, long = PROMPT_TOKENS
    lengths = [long - (long - short) * i // max(1, batch - 1) for i in range(batch)]
    return [text[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(batch)]


if __name__ == "__main__":
    main()
