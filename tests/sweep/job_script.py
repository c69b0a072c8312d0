"""A job without torch, for the tests of the parent: writes what a run writes, and obeys SIGTERM.

The loss is lowest at optim.lr = 1e-3. optim.eps=0.5 fails. train.early_stopping=20 makes the first start of jobs 2 and
0 slow. It counts its starts in starts.txt.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path

STEPS = 6


def main(words: dict[str, str]) -> int:
    run_dir = Path(words["run_dir"])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    again = (run_dir / "starts.txt").exists()
    slow = run_dir.name in words.get("train.early_stopping", "") and not again
    with open(run_dir / "starts.txt", "a") as file:
        file.write("start\n")
    (run_dir / "words.json").write_text(json.dumps(words))
    if words.get("optim.eps") == "0.5":
        print("error: optim.eps: half is too much\n  Try 1e-8.", flush=True)
        return 2
    distance = abs(math.log10(float(words["optim.lr"])) + 3)
    lines = run_dir / "metrics.jsonl"
    first = len(lines.read_text().splitlines()) if lines.exists() else 0
    with open(lines, "a") as file:
        for step in range(first + 1, STEPS + 1):
            if stopped:
                return end(run_dir, "preempted", step - 1, None, 75)
            loss = 1 + distance + 1 / step
            file.write(
                json.dumps({"kind": "eval", "step": step, "loss": loss, "accuracy": 1 / loss})
                + "\n"
            )
            file.flush()
            time.sleep(10 if slow else 0.02)
    return end(run_dir, "done", STEPS, {"loss": loss, "accuracy": 1 / loss}, 0)


def end(run_dir: Path, status: str, step: int, evaluated: dict | None, code: int) -> int:
    loss = evaluated and evaluated["loss"]
    (run_dir / "result.json").write_text(
        json.dumps({"status": status, "step": step, "loss": loss, "eval": evaluated})
    )
    return code


if __name__ == "__main__":
    sys.exit(
        main(
            dict(
                word.split("=", 1)
                for word in sys.argv[1:]
                if "=" in word and not word.startswith("-")
            )
        )
    )
