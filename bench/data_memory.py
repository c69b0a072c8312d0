"""Memory, time and resumption of tokenising one large .jsonl.zst, at two sizes.

    python bench/data_memory.py [--mib 75 300] [--out bench/results/data_memory.json]

Every build runs in a process of its own: text of the shipped corpus, numbered and repeated, as a single compressed
file. Peaks are those of resident memory: with the tokenizer loaded, after `build_store`, and after the documents were
packed and the held-out rows chosen. The largest build is then repeated and killed (SIGKILL) in its middle, and the
same build started again: `again` is the share of the tokens that it tokenised.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zstandard
from workload import machine

from finetune.data import cache
from finetune.data.cache import build_store
from finetune.data.encode_clm import TextEncoder
from finetune.data.mixture import DataSource, hold_out
from finetune.data.packing import stream_blocks
from finetune.data.sources import read
from finetune.data.tokenizer import load_tokenizer

BLOCK = 2048
SAVE_SECONDS = 2.0
"""In place of 30, as these builds take less than a minute."""


def corpus(file: Path, mib: float) -> None:
    """Write a .jsonl.zst of about `mib` MiB of text."""
    source = "asset:data/pile_sample/train.jsonl.zst"
    texts = [row[1]["text"] for row in read(source, "train") if isinstance(row, tuple)]
    size, number = 0, 0
    with zstandard.open(file, "wt", encoding="utf-8") as out:
        while size < mib * 2**20:
            for text in texts:
                number += 1
                out.write(json.dumps({"text": f"{number} {text}"}) + "\n")
                size += len(text)


def peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def build(file: Path, folder: Path) -> dict:
    """Build the store of a file and prepare training on it, in this process."""
    cache.SAVE_SECONDS = SAVE_SECONDS
    encoder = TextEncoder(load_tokenizer(None), "text", None)
    figures: dict = {"peak_mib": {"tokenizer": peak_mib()}}
    encoded, encode = [0], encoder.encode

    def counted(batch):
        result = encode(batch)
        encoded[0] += sum(len(example["ids"]) for row in result for example in row)
        return result

    encoder.encode = counted
    started = time.perf_counter()
    store = build_store([DataSource(str(file))], encoder, cache_dir=folder)
    figures |= {"seconds": round(time.perf_counter() - started, 2), "tokens": store.stats["tokens"]}
    figures["peak_mib"]["built"] = peak_mib()
    hold_out(np.asarray(store.column("text")), np.ones(len(store), bool), store.bounds, 0.02)
    figures["sequences"] = len(stream_blocks(store.offsets, BLOCK))
    figures["peak_mib"]["packed"] = peak_mib()
    size = sum(path.stat().st_size for path in store.path.iterdir())
    figures |= {"documents": len(store), "cache_mib": round(size / 2**20, 1)}
    return figures | {"file_mib": round(file.stat().st_size / 2**20, 1), "encoded": encoded[0]}


def start(file: Path, folder: Path) -> subprocess.Popen:
    words = [sys.executable, __file__, "--build", str(file), str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> dict:
    out, _ = process.communicate()
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=float, nargs="+", default=[75, 300])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--build", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        print(json.dumps(build(*options.build)))
        return
    results: dict = {"builds": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for mib in options.mib:
            file = folder / f"{mib:g}.jsonl.zst"
            corpus(file, mib)
            results["builds"][f"{mib:g}"] = finished(start(file, folder / "cache"))
            print(mib, results["builds"][f"{mib:g}"], flush=True)
        largest = results["builds"][f"{options.mib[-1]:g}"]
        killed = start(file, folder / "killed")
        time.sleep(largest["seconds"] / 2 + 3)  # starting takes about so long
        killed.kill()
        killed.communicate()
        resumed = finished(start(file, folder / "killed"))
    again = resumed["encoded"] / resumed["tokens"]
    results["resumed"] = {"seconds": resumed["seconds"], "again": round(again, 3)}
    print(results["resumed"])
    if options.out:
        about = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
        options.out.write_text(json.dumps(about | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
