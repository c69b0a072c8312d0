"""Tokens per second of preparing a corpus: `build_store` beside transformers' run_clm.

    python bench/data_prep.py [--data FILE.jsonl] [--mib 16] [--repeat 3] [--out bench/results/data_prep.json]

Both read the same .jsonl with the same tokenizer in the same run, alternating. The other side does what run_clm.py
does: load_dataset("json"), map(tokenize, batched), map(group_texts, batched); once with one process per core and
once with one process (the tokenizer's threads on all cores), its better figure counts. Everything starts without
caches. CPU seconds are those of all threads and processes: on a machine that others use too, they tell more than the
clock. `build_store` also keeps document boundaries and eos, which the other side does not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from functools import partial
from itertools import chain
from pathlib import Path

from workload import machine

from finetune.data.cache import build_store
from finetune.data.encode_clm import TextEncoder
from finetune.data.mixture import DataSource
from finetune.data.packing import stream_blocks
from finetune.data.sources import read
from finetune.data.tokenizer import load_tokenizer

BLOCK = 2048


def ours(file: Path, folder: Path, tokenizer) -> int:
    store = build_store(
        [DataSource(str(file))], TextEncoder(tokenizer, "text", None), cache_dir=folder
    )
    stream_blocks(store.offsets, BLOCK)
    return store.stats["tokens"]


def run_clm(file: Path, folder: Path, tokenizer, num_proc: int) -> int:
    from datasets import load_dataset

    raw = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder))

    def tokenize_function(examples):
        return tokenizer(examples["text"])

    def group_texts(examples):
        concatenated = {k: list(chain(*examples[k])) for k in examples}
        total_length = len(concatenated[next(iter(examples.keys()))])
        total_length = (total_length // BLOCK) * BLOCK
        result = {
            k: [t[i : i + BLOCK] for i in range(0, total_length, BLOCK)]
            for k, t in concatenated.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    tokenized = raw.map(
        tokenize_function,
        batched=True,
        num_proc=num_proc,
        remove_columns=raw.column_names,
        load_from_cache_file=False,
    )
    lm = tokenized.map(group_texts, batched=True, num_proc=num_proc, load_from_cache_file=False)
    return len(lm) * BLOCK


def corpus(folder: Path, source: str, mib: float) -> Path:
    """A .jsonl of about `mib` MiB of text; a smaller source is repeated (fair to both: each word is cached anyway)."""
    texts = [row[1]["text"] for row in read(source, "train") if isinstance(row, tuple)]
    path, size = folder / "corpus.jsonl", 0
    with open(path, "w", encoding="utf-8") as file:
        while size < mib * 2**20:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text)
    return path


def cpu_seconds() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def advantage(results: dict[str, dict], figure: str) -> float:
    """Ours over the better of the others."""
    others = [result[figure] for name, result in results.items() if name != "build_store"]
    return round(results["build_store"][figure] / max(others), 2)


def measure(file: Path, tokenizer, repeat: int) -> dict[str, dict]:
    cores = os.cpu_count() or 1
    sides = {
        "build_store": ours,
        f"run_clm, {cores} processes": partial(run_clm, num_proc=cores),
        "run_clm, 1 process": partial(run_clm, num_proc=1),
    }
    results: dict[str, dict] = {
        name: {"tokens": 0, "seconds": [], "cpu_seconds": []} for name in sides
    }
    for _ in range(repeat):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                started, cpu_started = time.perf_counter(), cpu_seconds()
                results[name]["tokens"] = side(file, Path(folder), tokenizer)
                results[name]["seconds"].append(round(time.perf_counter() - started, 3))
                results[name]["cpu_seconds"].append(round(cpu_seconds() - cpu_started, 3))
    for result in results.values():
        result["tokens_per_second"] = round(result["tokens"] / min(result["seconds"]))
        result["tokens_per_cpu_second"] = round(result["tokens"] / min(result["cpu_seconds"]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="asset:data/pile_sample/train.jsonl.zst")
    parser.add_argument("--mib", type=float, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(None)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(
            corpus(Path(folder), options.data, options.mib), tokenizer, options.repeat
        )
    for name, result in results.items():
        print(
            f"{name:24} {result['tokens']:>12,} tokens  {min(result['seconds']):>8.2f} s  "
            f"{result['tokens_per_second']:>10,} tokens/s  {result['tokens_per_cpu_second']:>10,} tokens/CPU s"
        )
    ratios = {
        figure: advantage(results, figure)
        for figure in ("tokens_per_second", "tokens_per_cpu_second")
    }
    print(
        f"build_store beside the better run_clm, best of {options.repeat}: {ratios['tokens_per_second']} times "
        f"by the clock, {ratios['tokens_per_cpu_second']} times by CPU seconds"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "data": options.data,
            "mib": options.mib,
        }
        options.out.write_text(
            json.dumps({**about, "ratios": ratios, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
