"""Show the results of a sweep.

Programs read sweep.json; people get a table during the sweep and at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.errors import clock, command, figure, number
from finetune.files import write_json
from finetune.reporting.terminal_text import evaluate_command
from finetune.sweep.job import DONE, Job
from finetune.sweep.page import compare_command
from finetune.sweep.search import Goal

SUMMARY = "sweep.json"


def write_summary(
    jobs: list[Job], goal: Goal, folder: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Write SWEEP/sweep.json, with every job once, best first."""
    ranked = sorted(jobs, key=goal.rank)
    summary = {
        **about,
        "metric": metric_name(ranked, goal),
        "direction": "maximize" if goal.maximize else "minimize",
        "best": ranked[0].number if ranked and goal.compares(ranked[0]) else None,
        "jobs": [_row(job, goal) for job in ranked],
    }
    write_json(folder / SUMMARY, summary)
    return summary


def metric_name(jobs: list[Job], goal: Goal) -> str:
    """Return the name of the metric as it heads the table."""
    if goal.metric != "loss":
        return goal.metric.replace("_", " ")
    evaluated = any("loss" in (job.result().get("eval") or {}) for job in jobs)
    return "eval loss" if evaluated else "loss"


def render(summary: dict[str, Any]) -> str:
    """Return the table and, below it, commands for the best job."""
    jobs = summary["jobs"]
    keys = list(dict.fromkeys(key for job in jobs for key in job["chosen"]))
    short = shortest(keys)
    head = ["job", "status", summary["metric"], *(short[key] for key in keys), "steps", "time"]
    rows = [head, *(_cells(job, keys) for job in jobs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(_aligned(cell, widths[i], i) for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]
    failures = [
        f"[{job['job']}] {job['error']}".replace("\n", "\n    ") for job in jobs if job["error"]
    ]
    return "\n".join(["  " + line for line in lines] + failures + _advice(summary))


def _cells(job: dict[str, Any], keys: list[str]) -> list[str]:
    return [
        str(job["job"]),
        job["status"],
        figure(job["value"]),
        *(brief(job["chosen"].get(key, "")) for key in keys),
        str(job["step"] or "-"),
        clock(job["seconds"]),
    ]


def shortest(keys: list[str]) -> dict[str, str]:
    """Map keys to their last part if that is unambiguous: optim.lr -> lr."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {
        key: leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }


def brief(value: str) -> str:
    """Shorten a number of many digits."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def commands(job: dict[str, Any], launcher: list[str]) -> list[tuple[str, str]]:
    """Return (description, command) pairs to continue with a job."""
    folder = Path(job["run_dir"])
    return [
        ("train it alone", command(["deepspeed", *launcher, "launch/train.py", *job["overrides"]])),
        ("look at it", command([folder / "report.html"])),
        ("compare", compare_command(folder.parent)),
        ("evaluate", evaluate_command(folder)),
    ]


def _advice(summary: dict[str, Any]) -> list[str]:
    if summary["best"] is None:
        done = any(job["status"] == DONE for job in summary["jobs"])
        return [f"no finished job has a finite {summary['metric']}" if done else "no job is done"]
    best = summary["jobs"][0]
    what = " ".join(f"{key}={brief(value)}" for key, value in best["chosen"].items())
    lines = [f"best: job {best['job']}  {summary['metric']} {figure(best['value'])}  {what}"]
    return lines + [
        f"  {name + ':':<16}{command}"
        for name, command in commands(best, summary.get("launcher") or [])
    ]


def _row(job: Job, goal: Goal) -> dict[str, Any]:
    result = job.result()
    # `or`: a job that was stopped early has no result of its own, but it has records.
    last = next((r for r in reversed(job.records) if r.get("kind") == "train"), {})
    return {
        "job": job.number,
        "status": job.status,
        "value": goal.value(job) if job.status == DONE else _last(job, goal),
        "chosen": job.chosen,
        "overrides": job.words,
        "run_dir": str(job.run_dir),
        "step": result.get("step") or last.get("step") or 0,
        "loss": result.get("loss"),
        "eval": result.get("eval") or {},
        "tokens_per_second": result.get("tokens_per_second"),
        "seconds": job.seconds,
        "error": job.error,
    }


def _last(job: Job, goal: Goal) -> float | None:
    reports = goal.reports(job.records)
    return reports[-1][1] if reports else None


def _aligned(cell: str, width: int, column: int) -> str:
    return f"{cell:<{width}}" if column == 1 else f"{cell:>{width}}"


# A sweep in progress: one line per event, and on a terminal a table of the running jobs beneath.
class View:
    """Display of a running sweep.

    Args:
        console: for tests; by default stdout.
    """

    def __init__(self, goal: Goal, console: Console | None = None):
        self.goal = goal
        self.console = console or Console(highlight=False)
        shown = self.console.is_terminal
        self.live = (
            Live(console=self.console, refresh_per_second=2, transient=True) if shown else None
        )

    def open(self) -> None:
        if self.live:
            self.live.start()

    def close(self) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str, style: str = "") -> None:
        if self.live:
            self.console.print(Text(text, style=style))
        else:
            print(text, file=self.console.file, flush=True)

    def started(self, job: Job) -> None:
        self.say(f"[{job.number}] {describe(job)}")

    def ended(self, job: Job) -> None:
        value = self.goal.value(job) if job.status == DONE else None
        told = f"  {figure(value)}" if value is not None else ""
        error = f": {job.error}" if job.error else ""
        self.say(
            f"[{job.number}] {job.status}{told}{error}", "green" if job.status == DONE else "yellow"
        )

    def show(self, jobs: list[Job], running: list[Job], total: int) -> None:
        """Redraw the table of running jobs."""
        if self.live is None:
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("job", "step", "loss", "tok/s", "varied"):
            table.add_column(name, justify="left" if name == "varied" else "right")
        for job in running:
            last = next((r for r in reversed(job.records) if r.get("kind") == "train"), {})
            table.add_row(
                str(job.number),
                str(last.get("step", "-")),
                figure(last.get("loss")),
                number(last.get("tokens_per_second"), ",.0f"),
                describe(job),
                style="cyan",
            )
        done = [job for job in jobs if job.status == DONE]
        best = min(filter(self.goal.compares, done), key=self.goal.rank, default=None)
        told = f"{len(done)} of {total} jobs done"
        if best is not None:
            told += f", best so far [{best.number}] {figure(self.goal.value(best))}"
        self.live.update(Group(table, Text(told, style="bold")))


def describe(job: Job) -> str:
    """Describe a job as `lr=1e-4 rank=8`; all of its words if nothing varies."""
    names = shortest(list(job.chosen))
    return " ".join(
        f"{names[key]}={brief(value)}" for key, value in job.chosen.items()
    ) or " ".join(job.words)
