"""Seconds for which a save stops training: waiting for the disk, or only for a copy.

    python bench/save_pause.py --dir DIR [--gib 1] [--repeat 3] [--out bench/results/save_pause.json]

Times one rank's part of a checkpoint, in seconds per GiB of masters and moments, the median of `repeat`:
    library     safetensors' own writer, then reading the file again for its hash, then fsync
    foreground  one pass: write and hash, then fsync (checkpoint.background=false)
    background  the copy to the host, after which training goes on (checkpoint.background=true)
and the host memory that the copy takes, in bytes per byte. Run it on the disk that will hold the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from finetune.checkpointing.format import Pieces, entry_of, write_tensors  # noqa: E402
from finetune.files import fsync  # noqa: E402
from finetune.planning.machine import host_bytes  # noqa: E402

COPIES: list[Pieces] = []


def library(file: Path, pieces: Pieces) -> None:
    save_file(dict(pieces.tensors()), file)
    entry_of(file)
    fsync(file)


def foreground(file: Path, pieces: Pieces) -> None:
    write_tensors(file, pieces)


def background(file: Path, pieces: Pieces) -> None:
    COPIES[:] = [pieces.copied()]


def measure(way, file: Path, pieces: Pieces, repeat: int) -> dict[str, float]:
    """Seconds per GiB saved, each time into a new file."""
    seconds = []
    for _ in range(repeat):
        file.unlink(missing_ok=True)
        began = time.perf_counter()
        way(file, pieces)
        seconds.append(time.perf_counter() - began)
    gib = pieces.bytes / 2**30
    return {
        "seconds_per_gib": round(statistics.median(seconds) / gib, 3),
        "runs": [round(s / gib, 3) for s in seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/save_pause.json")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    each = 1 << 23
    pieces = Pieces.of(
        [
            (f"w{i}|0|master", torch.randn(each))
            for i in range(max(1, int(args.gib * 2**30 / 4 / each)))
        ]
    )
    before = host_bytes()
    found = {
        way.__name__: measure(way, args.dir / "pause.safetensors", pieces, args.repeat)
        for way in (library, foreground, background)
    }
    found["background"]["copy_bytes_per_byte"] = round((host_bytes() - before) / pieces.bytes, 2)
    (args.dir / "pause.safetensors").unlink(missing_ok=True)
    found |= {
        "gib": args.gib,
        "threads": torch.get_num_threads(),
        "command": "python bench/save_pause.py --dir DIR",
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
