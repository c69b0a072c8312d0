"""Real ranks on CPU: run a list of training configs in one gloo group of N fresh processes.

    results = run_cases(2, [["recipe=clm_pile", "zero=stage2", ...], ...])

Starting torch and DeepSpeed costs more than a small run, so one group of processes trains all cases one after
another. Also a script: each rank executes this file.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_cases(ranks: int, cases: list[list[str]], timeout: int = 600) -> None:
    """Train every case (a list of overrides) on `ranks` processes; fails with the ranks' output."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_PORT": port,
            "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(cases)],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)[-6000:]


def metrics(run_dir: Path | str, kind: str = "train") -> list[dict]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path | str) -> list[float]:
    return [record["loss"] for record in metrics(run_dir)]


def main(cases: list[list[str]]) -> None:
    from finetune import dist
    from finetune.compose import compose_train
    from finetune.run import run_in

    world = dist.connect(threads=1)
    for overrides in cases:
        run_in(world, compose_train(overrides), overrides)
    dist.disconnect()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
