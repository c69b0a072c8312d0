"""The one exception that a user should see, exit codes, and settings and commands written to be pasted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
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
    """A request to stop came when there was nothing to save: the process ends with exit code 75."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(EXIT_PREEMPTED)

    def __str__(self) -> str:
        return f"stopped by {who_stopped(self.reason)}; there was nothing to save"


def who_stopped(reason: str) -> str:
    """Words for a request to stop: `you (Ctrl-C)`, `you (file STOP)`, else the reason itself, such as `SIGTERM`."""
    return {"SIGINT": "you (Ctrl-C)", "file STOP": "you (file STOP)"}.get(reason, reason)


class RunFailed(UserError):
    """The command was right but the run could not finish: exit code 1 instead of 2."""

    exit_code = EXIT_FAILED


def problems_error(title: str, problems: list[UserError]) -> UserError:
    """One error that lists all problems at once, e.g. "2 problems in the configuration:"."""
    plural = "problem" if len(problems) == 1 else "problems"
    lines = [f"{len(problems)} {plural} in {title}:"]
    for problem in problems:
        lines += [f"  {line}" for line in problem.render().split("\n")]
    return UserError("\n".join(lines))


def gib(n_bytes: float) -> str:
    """Bytes as people read them: `1.5 GiB`, `12.0 MiB`, `7 B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= size:
            return (
                f"{n_bytes / size:.2f} {unit}" if unit == "GiB" else f"{n_bytes / size:.1f} {unit}"
            )
    return f"{int(n_bytes)} B"


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
