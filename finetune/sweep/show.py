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

from finetune.errors import align, clock, command, figure, number
from finetune.files import write_json
from finetune.reporting.terminal_text import evaluate_command
from finetune.sweep.job import DONE, Job
from finetune.sweep.page import SUMMARY, alone_command, brief, compare_command
from finetune.sweep.search import Goal


def write_summary(
    jobs: list[Job], goal: Goal, folder: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Write SWEEP/sweep.json, with every job once, best first."""
    ranked = sorted(jobs, key=goal.rank)
    metric = goal.metric.replace("_", " ")
    if metric == "loss" and any("loss" in (job.result().get("eval") or {}) for job in jobs):
        metric = "eval loss"
    rows = []
    for job in ranked:
        result, reports = job.result(), goal.reports(job.records)
        value = reports[-1][1] if reports else None
        rows.append(
            {
                "job": job.number,
                "status": job.status,
                "value": goal.value(job) if job.status == DONE else value,
                "chosen": job.chosen,
                "overrides": job.words,
                "run_dir": str(job.run_dir),
                # A job that was stopped early has no result of its own, but it has records.
                "step": result.get("step") or job.last().get("step") or 0,
                "loss": result.get("loss"),
                "eval": result.get("eval") or {},
                "tokens_per_second": result.get("tokens_per_second"),
                "seconds": job.seconds,
                "error": job.error,
            }
        )
    summary = {
        **about,
        "metric": metric,
        "direction": "maximize" if goal.maximize else "minimize",
        "best": ranked[0].number if ranked and goal.compares(ranked[0]) else None,
        "jobs": rows,
    }
    write_json(folder / SUMMARY, summary)
    return summary


def render(summary: dict[str, Any]) -> str:
    """Return the table and, below it, errors and commands for the best job."""
    jobs, metric = summary["jobs"], summary["metric"]
    keys = list(dict.fromkeys(key for job in jobs for key in job["chosen"]))
    short = shortest(keys)
    rows = [["job", "status", metric, *(short[key] for key in keys), "steps", "time"]]
    for job in jobs:
        varied = [brief(job["chosen"].get(key, "")) for key in keys]
        cells = [str(job["job"]), job["status"], figure(job["value"]), *varied]
        rows.append([*cells, str(job["step"] or "-"), clock(job["seconds"])])
    lines = [f"  {line}" for line in align(rows, left=(1,))]
    for job in jobs:
        if job["error"]:
            lines.append(f"[{job['job']}] {job['error']}".replace("\n", "\n    "))
    if summary["best"] is None:
        done = any(job["status"] == DONE for job in jobs)
        return "\n".join(
            [*lines, f"no finished job has a finite {metric}" if done else "no job is done"]
        )
    best = jobs[0]
    varied = " ".join(f"{key}={brief(value)}" for key, value in best["chosen"].items())
    lines.append(f"best: job {best['job']}  {metric} {figure(best['value'])}  {varied}")
    lines += [f"  {name + ':':<16}{words}" for name, words in commands(best, summary)]
    return "\n".join(lines)


def shortest(keys: list[str]) -> dict[str, str]:
    """Map keys to their last part if that is unambiguous: optim.lr -> lr."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {
        key: leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }


def commands(job: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (description, command) pairs to continue with a job."""
    folder = Path(job["run_dir"])
    return [
        ("train it alone", alone_command(job, summary)),
        ("look at it", command([folder / "report.html"])),
        ("compare", compare_command(folder.parent)),
        ("evaluate", evaluate_command(folder)),
    ]


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
        score = f"  {figure(value)}" if value is not None else ""
        error = f": {job.error}" if job.error else ""
        style = "green" if job.status == DONE else "yellow"
        self.say(f"[{job.number}] {job.status}{score}{error}", style)

    def show(self, jobs: list[Job], running: list[Job], total: int) -> None:
        """Redraw the table of running jobs."""
        if self.live is None:
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("job", "step", "loss", "tok/s", "varied"):
            table.add_column(name, justify="left" if name == "varied" else "right")
        for job in running:
            last = job.last()
            table.add_row(
                str(job.number),
                str(last.get("step", "-")),
                figure(last.get("loss")),
                number(last.get("tokens_per_second")),
                describe(job),
                style="cyan",
            )
        done = [job for job in jobs if job.status == DONE]
        best = min(filter(self.goal.compares, done), key=self.goal.rank, default=None)
        progress = f"{len(done)} of {total} jobs done"
        if best is not None:
            progress += f", best so far [{best.number}] {figure(self.goal.value(best))}"
        self.live.update(Group(table, Text(progress, style="bold")))


def describe(job: Job) -> str:
    """Describe a job as `lr=1e-4 rank=8`; all of its words if nothing varies."""
    names = shortest(list(job.chosen))
    return " ".join(
        f"{names[key]}={brief(value)}" for key, value in job.chosen.items()
    ) or " ".join(job.words)
