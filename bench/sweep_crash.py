"""Sweeps of real two-rank jobs whose parent is killed half-way and one of whose jobs fails: is everything there once?

    python bench/sweep_crash.py grid        2 x 3 jobs
    python bench/sweep_crash.py optuna      6 trials, with pruning

Starts the sweep, kills its parent with SIGKILL while the third job trains, starts the same command again, and counts:
jobs, launches of each job, and optimizer steps of each in metrics.jsonl. Writes bench/results/sweep_crash_<name>.json.
Two CPU cores: two to three minutes each.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

from finetune.assets.paths import asset
from finetune.data.sources import read

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
COMMON = [
    "recipe=quickstart",
    "debug=tiny",
    f"train.steps={STEPS}",
    "train.eval_every=2",
    "train.eval_at_start=false",
    "task.max_length=128",
    "checkpoint.every=2",
    "export.enabled=false",
    "sweep.num_gpus=2",
]
SWEEPS = {
    # 3 is no multiple of two ranks: those jobs fail.
    "grid": ["train.global_batch=2,4,3", "optim.lr=1e-3,1e-2"],
    "optuna": [
        "sweep=optuna",
        "sweep.trials=6",
        "sweep.prune_after=2",
        "optim.lr=tag(log,interval(1e-5,3e-2))",
        "optim.warmup=0",
        "train.global_batch=2,3,4",
    ],
}


def main(name: str, folder: Path) -> int:
    command = [
        sys.executable,
        "launch/train.py",
        "-m",
        *COMMON,
        *SWEEPS[name],
        f"data.eval={small_eval(folder)}",
        f"sweep.dir={folder / name}",
    ]
    begun = time.monotonic()
    parent = subprocess.Popen(command, cwd=ROOT)
    wait_for_steps(folder / name, jobs=3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    at_kill = statuses(folder / name)
    print(f"--- killed the parent; jobs: {at_kill}", flush=True)
    code = subprocess.call(command, cwd=ROOT)
    found = {
        "command": " ".join(["python", *command[1:]]),
        "exit_code": code,
        "seconds": round(time.monotonic() - begun),
        "jobs_at_kill": at_kill,
        "jobs": [describe(folder / name, job) for job in summary(folder / name)["jobs"]],
    }
    found["command"] = re.sub(rf"{re.escape(str(folder))}", "DIR", found["command"])
    out = ROOT / "bench" / "results" / f"sweep_crash_{name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if complete(found["jobs"]) else 1


def small_eval(folder: Path) -> Path:
    """Twelve of the shipped evaluation documents."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "eval.jsonl"
    records = [
        row
        for _, row in islice(read(str(asset("data") / "pile_sample/eval.jsonl.zst"), "train"), 12)
    ]
    file.write_text(
        "".join(json.dumps(row | {"text": row["text"][:2000]}) + "\n" for row in records)
    )
    return file


def wait_for_steps(folder: Path, jobs: int) -> None:
    """Wait until the `jobs`-th job has logged a step."""
    while sum((p.parent / "metrics.jsonl").exists() for p in folder.glob("*/job.json")) < jobs:
        time.sleep(0.2)


def summary(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def statuses(folder: Path) -> dict[str, str]:
    return {str(job["job"]): job["status"] for job in summary(folder)["jobs"]}


def describe(folder: Path, job: dict) -> dict:
    """Count the launches of the job, and list the steps it logged."""
    run = folder / str(job["job"])
    lines = (
        (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    )
    steps = [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]
    launches = (run / "output.log").read_text().count("[runner.py") and (
        run / "output.log"
    ).read_text().count("cmd = ")
    return {
        "job": job["job"],
        "status": job["status"],
        "chosen": job["chosen"],
        "value": job["value"],
        "launches": launches,
        "steps": steps,
        "error": job["error"],
    }


def complete(jobs: list[dict]) -> bool:
    """Six jobs, one record each; those that are done have each step once."""
    once = sorted(job["job"] for job in jobs) == list(range(6))
    ended = all(job["status"] in ("done", "failed", "pruned") for job in jobs)
    return (
        once
        and ended
        and all(
            job["steps"] == list(range(1, STEPS + 1)) for job in jobs if job["status"] == "done"
        )
    )


if __name__ == "__main__":
    sys.exit(
        main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "/tmp/sweep_crash").absolute())
    )
