"""Hydra multirun: each job a fresh `deepspeed` process group, started by a parent that is in none.

    python launch/train.py -m recipe=quickstart optim.lr=1e-3,5e-3 adapter.rank=4,8

words -> Hydra's own splitting into jobs -> for each: deepspeed launch/train.py ... run_dir=SWEEP/<n> -> sweep.json and
a table, best first. Hydra runs multirun jobs inside one process, where a second process group cannot start.
A job whose result.json says done is not run again, so the same command with sweep.dir=DIR continues a sweep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from finetune.app import ROOT, compose_train, report_error, strip_launcher_arguments
from finetune.dist_environment import LAUNCHER_VARIABLES, free_port
from finetune.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, UserError

SCRIPT = ROOT / "launch" / "train.py"


def sweep(argv: list[str]) -> int:
    """Run every job of `argv`; 0 when all are done, 1 when one failed, 75 when one was stopped."""
    if int(os.environ.get("RANK", "0")) != 0:
        return EXIT_DONE  # under `deepspeed launch/train.py -m` the first rank is the parent, the others have no part
    words = [word for word in strip_launcher_arguments(argv) if word not in ("-m", "--multirun")]
    try:
        jobs = split(words)
        configs = [compose_train(job) for job in jobs]
    except UserError as error:
        report_error(error)
        return error.exit_code
    settings = configs[0].sweep
    folder = Path(settings.dir or f"multirun/{datetime.now():%Y%m%d-%H%M%S}").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"sweep of {len(jobs)} jobs in {folder}", flush=True)
    code = run_jobs(jobs, folder, settings.on_failure, start_job)
    table = write_summary(jobs, folder)
    print(render(table), flush=True)
    return code


def split(words: list[str]) -> list[list[str]]:
    """One list of k=v words per job, by Hydra's own sweep grammar: `a=1,2`, `range(1,4)`, `glob(*)`.

    Raises:
        UserError: a word that Hydra cannot read.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(words)
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as error:
        raise UserError(str(error), remedy="Separate the values of a sweep by commas: optim.lr=1e-3,5e-3.") from None


def run_jobs(jobs: list[list[str]], folder: Path, on_failure: str, start: Callable[[list[str], Path], int]) -> int:
    """Run what is not done yet, one after another."""
    worst = EXIT_DONE
    for n, job in enumerate(jobs):
        run_dir = folder / str(n)
        if _status(run_dir) == "done":
            print(f"[{n}] done before: {' '.join(job)}", flush=True)
            continue
        print(f"[{n}] {' '.join(job)}", flush=True)
        code = start(job, run_dir)
        if code in (EXIT_PREEMPTED, 130):
            return EXIT_PREEMPTED
        if code != EXIT_DONE:
            worst = EXIT_FAILED
            if on_failure == "stop":
                break
    return worst


def start_job(job: list[str], run_dir: Path) -> int:
    """One job in its own process group: the launcher's exit code."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    words = [word for word in job if not word.startswith(("run_dir=", "sweep."))]
    return subprocess.call([*_launcher(), str(SCRIPT), *words, f"run_dir={run_dir}"], env=environment)


def _launcher() -> list[str]:
    """`deepspeed` beside this Python, with as many ranks as the sweep itself was started with."""
    program = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    ranks = os.environ.get("WORLD_SIZE")
    return [*program, "--num_gpus", ranks] if ranks else program


def _status(run_dir: Path) -> str:
    return str(_result(run_dir).get("status", "missing"))


def _result(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_summary(jobs: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    """sweep.json: every job with its overrides and metrics, best (lowest evaluation or training loss) first."""
    table = []
    for n, job in enumerate(jobs):
        result = _result(folder / str(n))
        table.append({"job": n, "overrides": job, "run_dir": str(folder / str(n)), "status": result.get("status", "missing"),
                      "loss": result.get("loss"), "eval": result.get("eval") or {}, "error": result.get("error")})
    table.sort(key=_rank)
    (folder / "sweep.json").write_text(json.dumps({"jobs": table}, indent=1) + "\n", encoding="utf-8")
    return table


def _rank(job: dict[str, Any]) -> tuple[bool, float]:
    value = job["eval"].get("loss", job["loss"])
    return job["status"] != "done", float(value) if value is not None else float("inf")


def render(table: list[dict[str, Any]]) -> str:
    """The table for people, with the best run's export to go on with."""
    varying = [word for word in table[0]["overrides"] if any(word not in job["overrides"] for job in table)]
    keys = [word.split("=")[0] for word in varying]
    lines = []
    for job in table:
        chosen = " ".join(w for w in job["overrides"] if w.split("=")[0] in keys) or " ".join(job["overrides"])
        loss = job["eval"].get("loss", job["loss"])
        lines.append(f"  {job['job']:>3}  {job['status']:<9}  {'-' if loss is None else f'{loss:.4f}':>8}  {chosen}")
    best = table[0]
    tail = f"best: {best['run_dir']}" if best["status"] == "done" else "no job is done"
    return "\n".join(["  job  status     loss      overrides", *lines, tail])
