"""Real ranks on CPU: run a list of training configs in one gloo group of N processes.

    run_cases(2, [["recipe=clm_pile", "zero=stage2", ...], ...])

Starting torch and DeepSpeed costs more than a small run. So the ranks are forked from a server that
has imported them and done nothing else, and one group of ranks trains all cases one after another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune.process import free_port

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.warm"])


def run_cases(ranks: int, cases: list[list[str]], timeout: int = 600) -> None:
    """Train every case (a list of overrides) on `ranks` processes; fails with the ranks' output."""
    on_ranks(ranks, train_all, cases, timeout=timeout)


def evaluate(ranks: int, argvs: list[list[str]]) -> None:
    """`launch/evaluate.py` with each list of words, one after another in one group of processes."""
    on_ranks(ranks, evaluate_all, argvs)


def on_ranks(ranks: int, function, *arguments, timeout: int = 600) -> None:
    """Call `function(*arguments)` on so many ranks; fails with their output if one of them does."""
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "FINETUNE_CACHE": os.environ["FINETUNE_CACHE"],
    }
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, file in enumerate(files):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = SERVER.Process(target=_rank, args=(environment, file, function, arguments))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(timeout)
        ended = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        output = "\n".join(file.read_text(errors="replace") for file in files if file.exists())
    assert ended == [0] * ranks, f"exit codes {ended}\n{output[-6000:]}"


def _rank(environment: dict[str, str], output: Path, function, arguments: tuple) -> None:
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    function(*arguments)


def train_all(cases: list[list[str]]) -> None:
    from finetune import dist
    from finetune.compose import compose_train
    from finetune.run import run_in

    world = dist.connect(threads=1)
    for overrides in cases:
        run_in(world, compose_train(overrides), overrides)
    dist.disconnect()


def evaluate_all(argvs: list[list[str]]) -> None:
    from finetune.cli.app import main

    sys.exit(max(main("evaluate", words) for words in argvs))


def metrics(run_dir: Path | str, kind: str = "train") -> list[dict]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path | str) -> list[float]:
    return [record["loss"] for record in metrics(run_dir)]
