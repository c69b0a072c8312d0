"""Terminal output: phases, one live line of training, evaluations, short tables.

Flow: `silence_libraries` first; `Display.phase` around data preparation, loading and compiling;
then the callbacks of training. On a terminal, a rich bar stays at the bottom while lines scroll
above it; elsewhere plain lines are printed, throttled. Only rank 0 builds a Display. Figures are
kept by metrics_log.py.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from finetune.errors import clock, number
from finetune.reporting.callbacks import Callback, RunInfo
from finetune.reporting.metrics_log import METRICS, read
from finetune.reporting.terminal_text import (
    evaluation_text,
    figures,
    outcome_text,
    plain_line,
    result_text,
    sample_text,
    train_command,
)

SHORT_RUN = 50
"""Runs of at most this many steps print every step when the output is not a terminal."""
PLAIN_SECONDS = 5.0
PACE_SECONDS = 60.0
"""Seconds between plain lines of longer runs and of phases."""

NOISY = (
    "DeepSpeed",
    "deepspeed",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "filelock",
    "torch.distributed",
    "torch.utils.cpp_extension",
    "torch._dynamo",
    "torch._inductor",
    "httpx",
    "matplotlib",
    "wandb",
    "mlflow",
    "comet_ml",
    "trackio",
)
NOISY_WARNINGS = (
    r"(torch|deepspeed|transformers|datasets|peft|accelerate|huggingface_hub|"
    r"tensorboard|wandb|mlflow|comet_ml|trackio|google)\b"
)
QUIET_ENV = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
    "WANDB_SILENT": "true",
}


def silence_libraries(verbose: bool, rank: int) -> None:
    """Silence all library output but errors, unless `verbose`; call before importing them.

    Ranks other than 0 also drop every Python warning, which rank 0 has shown already. Settings in
    the environment take precedence. Exceptions and ERROR log lines are never dropped.
    """
    if verbose:
        return
    for name, value in QUIET_ENV.items():
        os.environ.setdefault(name, value)
    for name in NOISY:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        # DeepSpeed resets its level while it is imported; a filter survives that.
        logger.addFilter(_errors_only)
    warnings.filterwarnings("ignore", module=NOISY_WARNINGS)
    if rank != 0:
        warnings.simplefilter("ignore")


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print above a live bar; never wrapped or coloured if stdout is not a terminal."""
    if console.is_terminal:
        console.print(Text(text, style=style))
    else:
        print(text, file=console.file, flush=True)


def summary_table(title: str, rows: list[tuple[str, str]], console: Console | None = None) -> None:
    """Print a short two-column table, as aligned plain lines if stdout is not a terminal."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {value}" for name, value in rows]
        print_line(console, "\n".join([title, *lines]))
        return
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2),
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


class Phase:
    """Progress of one phase before training: call `advance(n)` or `update(done)` as it proceeds.

    `total` may be set once it is known; then the share is shown, whatever is counted.
    """

    def __init__(self, name: str, total: float | None, console: Console):
        self.name, self.total, self.console = name, total, console
        self.done = 0.0
        self.pace: deque[tuple[float, float]] = deque()
        """(time, done) of the last minute."""
        self.started = self.printed = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
                refresh_per_second=2,
            )
            self.bar.add_task(name, total=total, left="")
            self.bar.start()
        else:
            print_line(console, f"{name} ...")

    def advance(self, n: float = 1) -> None:
        self.update(self.done + n)

    def update(self, done: float) -> None:
        """Set how much is done in total."""
        now, self.done = time.monotonic(), done
        # The pace of the last minute: what an interrupted run had done goes by faster.
        while len(self.pace) > 1 and self.pace[1][0] <= now - PACE_SECONDS:
            self.pace.popleft()
        if not self.pace or now - self.pace[-1][0] >= 1:
            self.pace.append((now, done))
        (since, before), left = self.pace[0], None
        if self.total and done > before:
            left = (now - since) * (self.total - done) / (done - before)
        ahead = "" if left is None else f"ETA {clock(left)}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, total=self.total, left=ahead)
        elif now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            amount = f"{done / self.total:.0%}" if self.total else number(done)
            print_line(self.console, f"{self.name}: {'  '.join(filter(None, [amount, ahead]))}")

    def close(self, failed: bool) -> None:
        if self.bar is not None:
            self.bar.stop()
        seconds = clock(time.monotonic() - self.started)
        print_line(
            self.console, f"{self.name}: {'failed after' if failed else 'done in'} {seconds}"
        )


class Display(Callback):
    """Callback that shows training live. `console` is for tests; by default stdout."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.run: RunInfo | None = None
        """Known once training begins."""
        self.pace = Pace()
        self.printed = float("-inf")
        self.bar: Progress | None = None
        self.live: Live | None = None

    @contextmanager
    def phase(self, name: str, total: float | None = None) -> Iterator[Phase]:
        """Show one phase of work.

        E.g. `with display.phase("tokenising", n) as phase: phase.advance()`.
        """
        phase = Phase(name, total, self.console)
        try:
            yield phase
        except BaseException:
            phase.close(failed=True)
            raise
        phase.close(failed=False)

    def start(self, run: RunInfo) -> None:
        self.run, self.pace = run, Pace(run.start_step)
        if run.resumed:
            self.message(f"resumed after step {run.start_step}")
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                console=self.console,
                expand=True,
                auto_refresh=False,
            )
            self.bar.add_task("step", total=run.total_steps, completed=run.start_step)
            self.live = Live(self.bar, console=self.console, refresh_per_second=2, transient=True)
            self.live.start()

    def train_step(self, record: dict[str, Any]) -> None:
        assert self.run is not None
        step, total = record["step"], self.run.total_steps
        self.pace.reached(record)
        left = self.pace.seconds_for(total - step)
        now = time.monotonic()
        if self.live is not None and self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step)
            line = Text("  " + "  ".join(figures(record, left)), style="cyan")
            self.live.update(Group(self.bar, line))
        elif total <= SHORT_RUN or step == total or now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            self.message(plain_line(record, total, left))

    def evaluation(self, record: dict[str, Any]) -> None:
        self.message(evaluation_text(record), style="bold green")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.message(sample_text(step, prompt, text), style="magenta")

    def checkpoint(self, step: int, path: str) -> None:
        self.message(f"checkpoint at step {step}: {path}", style="dim")

    def message(self, text: str, style: str = "") -> None:
        print_line(self.console, text, style)

    def finish(self, result: dict[str, Any]) -> None:
        self.close()
        done = result.get("status") == "done"
        self.message(result_text(result), style="bold" if done else "bold red")
        if self.run is None:
            return
        run = self.run
        records = read(run.run_dir / METRICS)
        task = str((run.config.get("task") or {}).get("kind", ""))
        self.message(outcome_text(result, records, run.run_dir, task))
        if not done:
            words = [str(word) for word in run.extra.get("overrides") or []]
            ranks = run.extra.get("ranks_per_node")
            one_node = bool(ranks) and ranks == run.world_size
            launcher = f"deepspeed --num_gpus {ranks}" if one_node else "deepspeed"
            self.message(f"to go on: {train_command(words, run.run_dir, launcher)}")

    def close(self) -> None:
        """Remove the live bar; safe to call at any time, and repeatedly."""
        if self.live is not None:
            self.live.stop()
            self.live = None


class Pace:
    """Moving average of the seconds per step, weighted towards recent steps.

    It is computed from the logged records, whose rate counts training time only.
    """

    def __init__(self, step: int = 0):
        self.step, self.tokens = step, 0
        self.seconds: float | None = None

    def reached(self, record: dict[str, Any]) -> None:
        step, tokens, rate = record["step"], record["tokens"], record["tokens_per_second"]
        if step > self.step and rate > 0:
            each = (tokens - self.tokens) / (step - self.step) if self.tokens else tokens / step
            latest = each / rate
            self.seconds = latest if self.seconds is None else 0.8 * self.seconds + 0.2 * latest
        self.step, self.tokens = step, tokens

    def seconds_for(self, steps: int) -> float | None:
        return None if self.seconds is None else self.seconds * steps
