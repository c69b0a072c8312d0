"""Seconds from the command to the end of the first step, this project and transformers' Trainer + DeepSpeed.

    python bench/startup.py [--rounds 3] [--out bench/results/startup.json]

The model of `bench/peers.py`, blocks of 256 tokens, ZeRO stage 2, on one and two ranks, each under the deepspeed launcher,
in turns. This project also reads and tokenises the text, plans, and tries the longest batch; the Trainer gets token ids.
DeepSpeed's ops are compiled already: one run of each comes before, and is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from peers import Case, peer_spec, rows_of
from workload import ROOT, Size, dense_documents, fast_dtype, launch, machine, make_model

CASES = [
    Case(f"{ranks} rank{'s' * (ranks > 1)}", 256, ranks, dtype=fast_dtype()) for ranks in (1, 2)
]
POLL_SECONDS = 0.01


def until(file: Path, ranks: int, script: str, arguments: list[str], log: Path) -> float:
    """Seconds from the launch of a program until it has made `file`, not empty; it runs to its end.

    Raises:
        RuntimeError: it failed, or never made the file.
    """
    seen: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if file.exists() and file.stat().st_size:
                seen.append(time.perf_counter() - began)
                return
            time.sleep(POLL_SECONDS)

    watcher = threading.Thread(target=watch)
    began = time.perf_counter()
    watcher.start()
    try:
        launch(ranks, script, arguments, log)
    finally:
        ended.set()
        watcher.join()
    if not seen:
        raise RuntimeError(f"{script} never made {file}")
    return seen[0]


def ours(case: Case, model: Path, data: Path, folder: Path) -> float:
    run_dir = folder / "ours"
    words = [
        "recipe=clm_pile",
        f"model.path={model}",
        f"model.dtype={case.dtype}",
        f"zero=stage{case.stage}",
        f"task.max_length={case.length}",
        f"train.micro_batch={case.micro}",
        f"train.global_batch={case.micro * case.ranks}",
        "train.steps=1",
        f"data.train={data}",
        "data.eval=null",
        f"data.cache_dir={folder / 'cache'}",
        "export.enabled=false",
        "checkpoint.every=0",
        f"run_dir={run_dir}",
    ]
    return until(
        run_dir / "metrics.jsonl", case.ranks, "launch/train.py", words, folder / "ours.log"
    )


def trainer(case: Case, model: Path, rows: Path, folder: Path) -> float:
    file = peer_spec("trainer", case, model, rows, folder, steps=1)
    return until(
        folder / "trainer.first",
        case.ranks,
        "bench/peer_trainer.py",
        [str(file)],
        folder / "trainer.log",
    )


def measure(case: Case, folder: Path, rounds: int) -> dict:
    folder.mkdir()
    model = make_model(folder / "model", Size())
    data = dense_documents(folder / "data.jsonl", 8 * case.length * case.ranks)
    rows = rows_of(case, data, model, folder / "rows.jsonl")
    seconds: dict[str, list[float]] = {"ours": [], "trainer": []}
    for turn in range(rounds + 1):
        place = folder / f"round{turn}"
        place.mkdir()
        seconds["ours"].append(ours(case, model, data, place))
        seconds["trainer"].append(trainer(case, model, rows, place))
        print(
            f"  {case.name:8} ours {seconds['ours'][-1]:5.1f} s  Trainer {seconds['trainer'][-1]:5.1f} s",
            flush=True,
        )
    return {
        "case": asdict(case),
        **{
            name: {"seconds": statistics.median(found[1:]), "rounds": found[1:]}
            for name, found in seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/startup.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = [measure(case, Path(name) / case.name, args.rounds) for case in CASES]
    args.out.write_text(
        json.dumps(
            {
                "command": " ".join(["python", *sys.argv]),
                "model": asdict(Size()),
                "machine": machine(),
                "results": results,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
