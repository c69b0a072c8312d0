"""Words of programs to people: the one exception that users should see, exit codes, rules, numbers, tables, commands to paste."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
INSTALLED = not (CHECKOUT / "launch" / "train.py").is_file()
"""Tell an installed package, which carries conf/, recipes/ and launch/ inside, from a checkout."""
BESIDE = Path(__file__).resolve().parent / "beside" if INSTALLED else CHECKOUT
"""Folder of conf/, recipes/ and launch/."""
SCRIPT = re.compile(r"launch/\w+\.py")

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75


class UserError(Exception):
    """Something the user can fix: what is wrong, where, and what to type instead.

    Args:
        problem: one sentence with the offending value (and the limit it breaks).
        where: `path:line`, a config key, or "" where the problem names its place itself.
        remedy: text that can be pasted or followed, or "".
    """

    exit_code = EXIT_USAGE

    def __init__(self, problem: str, where: str = "", remedy: str = ""):
        self.problem, self.where, self.remedy = problem, where, remedy
        self.spoken = False
        super().__init__(self.render())

    def render(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{text}\n  {self.remedy}" if self.remedy else text


class Preempted(SystemExit):
    """A request to stop came before the training or after it: the process ends with exit code 75.

    Args:
        trained: the training is over, and its last step saved.
    """

    def __init__(self, reason: str, trained: bool = False):
        self.reason, self.trained = reason, trained
        super().__init__(EXIT_PREEMPTED)

    def __str__(self) -> str:
        kept = "the last step is saved" if self.trained else "there was nothing to save"
        return f"stopped by {who_stopped(self.reason)}; {kept}"


class Interrupted(Exception):
    """Raised when an evaluation was not finished."""


def who_stopped(reason: str) -> str:
    """Words for a request to stop: `you (Ctrl-C)`, `you (file STOP)`, else the reason itself, such as `SIGTERM`."""
    words = {
        "SIGINT": "you (Ctrl-C)",
        "file STOP": "you (file STOP)",
        "max_time": "its time limit (train.max_time)",
    }
    return words.get(reason, reason)


class RunFailed(UserError):
    """The command was right but the run could not finish: exit code 1 instead of 2."""

    exit_code = EXIT_FAILED


def problems_error(title: str, problems: list[UserError]) -> UserError:
    """One error that lists all problems at once, e.g. "2 problems in the configuration:"."""
    lines = [f"{plural(len(problems), 'problem')} in {title}:"]
    for problem in problems:
        lines += [f"  {line}" for line in problem.render().split("\n")]
    return UserError("\n".join(lines))


GIB = 2**30

Rule = tuple[object, str, str, str]
"""A truth value if it is broken, the problem, its place (if the problem does not name it), a remedy."""


def broken(rules: Iterable[Rule]) -> Iterator[UserError]:
    """Return the problem of each rule that is broken."""
    return (UserError(*words) for is_broken, *words in rules if is_broken)


def gib(n_bytes: float, spec: str = "") -> str:
    """Format bytes as `1.50 GiB`, `12.0 MiB` or `7 B`; `spec` replaces the number's format."""
    for unit, size, usual in (("GiB", GIB, ".2f"), ("MiB", 2**20, ".1f"), ("KiB", 2**10, ".1f")):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:{spec or usual}} {unit}"
    return f"{n_bytes:.0f} B"


def plural(count: int, noun: str) -> str:
    """Format a count of things: `1 rank`, `4 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number(value: Any, spec: str = ",.0f") -> str:
    """Format `value` with `spec`; "-" for None. NaN and infinities are shown, never hidden."""
    return format(value, spec) if isinstance(value, (int, float)) else "-"


def figure(value: Any) -> str:
    """Format a loss or metric, with the same digits everywhere.

    Five digits, at most four of them after the point, with thousands separators: `0.9312`,
    `7.1906`, `44.701`, `889.57`, `1,602.3`; `1.250e-04` below a thousandth; counts as integers; "-"
    for None.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.3e}"
    digits = 4 - math.floor(math.log10(abs(value))) if abs(value) >= 1 else 4
    return f"{value:,.{max(0, digits)}f}"


def large(value: float) -> str:
    """Format a large count: `1.24 M`, `38.2 k`, `512`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def clock(seconds: float | None) -> str:
    """Format a duration: `0:12`, `1:02:03`, `2d 01:02`; "-" if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def align(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table whose columns are as wide as their widest cell.

    Args:
        left: columns that are aligned to the left; the others, numbers, are to the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


PLAIN_VALUE = re.compile(r"[A-Za-z0-9_/.:@%+-]+")
"""Values that neither Hydra nor a shell reads as anything else."""


def hydra_quoted(text: str) -> str:
    """A text in the quotes that Hydra takes away again."""
    return (
        "'"
        + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
        + "'"
    )


def setting(key: str, value: Any) -> str:
    """The word that gives a name or path to `key`, whatever characters it holds: `run='runs/a, b'`."""
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", str(value))
    plain = PLAIN_VALUE.fullmatch(text) and text.lower() != "null"
    return f"{key}={text if plain else hydra_quoted(text)}"


def command(words: Iterable[Any]) -> str:
    """Words in one line that a shell reads as they are.

    `python launch/plan.py ...` and `deepspeed launch/train.py ...` become `finetune-gptj plan ...` and `finetune-gptj
    train ...` where there is no checkout, only an installed package.
    """
    words = [str(word) for word in words]
    script = next((i for i, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
    if INSTALLED and script is not None:
        program = Path(words[script]).stem
        words = ["finetune-gptj", program, *words[1:script], *words[script + 1 :]]
    return " ".join(_shell_quoted(word) for word in words)


def _shell_quoted(word: str) -> str:
    if "'" in word and not re.search(r'["$`\\!]', word):
        return f'"{word}"'
    return shlex.quote(word)
