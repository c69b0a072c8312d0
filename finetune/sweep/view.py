"""A sweep as it happens: one line per event, and on a terminal a table of the running jobs beneath."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.display_text import figure, number
from finetune.sweep.job import DONE, Job
from finetune.sweep.search import Goal
from finetune.sweep.table import brief, shortest


class View:
    """`console` is for tests; by default stdout."""

    def __init__(self, goal: Goal, console: Console | None = None):
        self.goal = goal
        self.console = console or Console(highlight=False)
        shown = self.console.is_terminal
        self.live = Live(console=self.console, refresh_per_second=2, transient=True) if shown else None

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
        self.say(f"[{job.number}] {job.status}{told}{error}", "green" if job.status == DONE else "yellow")

    def show(self, jobs: list[Job], running: list[Job], total: int) -> None:
        """Redraw what is running."""
        if self.live is None:
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("job", "step", "loss", "tok/s", "varied"):
            table.add_column(name, justify="left" if name == "varied" else "right")
        for job in running:
            last = next((r for r in reversed(job.records) if r.get("kind") == "train"), {})
            table.add_row(str(job.number), str(last.get("step", "-")), figure(last.get("loss")),
                          number(last.get("tokens_per_second"), ",.0f"), describe(job), style="cyan")
        done = [job for job in jobs if job.status == DONE]
        best = min(filter(self.goal.compares, done), key=self.goal.rank, default=None)
        told = f"{len(done)} of {total} jobs done"
        if best is not None:
            told += f", best so far [{best.number}] {figure(self.goal.value(best))}"
        self.live.update(Group(table, Text(told, style="bold")))


def describe(job: Job) -> str:
    """`lr=1e-4 rank=8`; all words where nothing varies."""
    names = shortest(list(job.chosen))
    return " ".join(f"{names[key]}={brief(value)}" for key, value in job.chosen.items()) or " ".join(job.words)
