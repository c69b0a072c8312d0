"""All checks in order, as a table for people or JSON for programs.

Exit code 0 when nothing is red, 1 otherwise. Repairs nothing and asks nothing of the network. A check that itself
fails is a yellow finding: a doctor who faints helps nobody.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.cli import doctor_checks
from finetune.cli.doctor_checks import RED, Check, yellow
from finetune.errors import EXIT_DONE, EXIT_FAILED

if TYPE_CHECKING:  # Hydra may be what is missing
    from finetune.compose import Composed

CHECKS: tuple[Callable[[], Check | list[Check]], ...] = (
    doctor_checks.python_version,
    doctor_checks.torch_and_cuda,
    doctor_checks.cuda_compiler,
    doctor_checks.compilers,
    doctor_checks.deepspeed_ops,
    doctor_checks.build_locks,
    doctor_checks.backends,
    doctor_checks.tested_versions,
    doctor_checks.processors,
    doctor_checks.memory,
    doctor_checks.disk,
    doctor_checks.open_files,
    doctor_checks.locked_memory,
    doctor_checks.master_port,
    doctor_checks.hub_cache,
)
MARKS = {"green": "ok", "yellow": "note", "red": "FAIL"}


def checks() -> list[Check]:
    """Every finding: (name, level, finding, remedy)."""
    return [finding for check in CHECKS for finding in _guarded(check)]


def main(json_only: bool = False) -> int:
    """Print the findings; `json_only` as one JSON object. Returns the exit code."""
    found = checks()
    ready = all(check.level != RED for check in found)
    if json_only:
        print(
            json.dumps({"ready": ready, "checks": [check._asdict() for check in found]}, indent=2)
        )
    else:
        _print_table(found, ready)
    return EXIT_DONE if ready else EXIT_FAILED


def _guarded(check: Callable[[], Check | list[Check]]) -> list[Check]:
    try:
        found = check()
    except Exception as error:
        return [
            yellow(
                check.__name__.replace("_", " "),
                f"could not be checked: {type(error).__name__}: {error}",
            )
        ]
    return [found] if isinstance(found, Check) else found


def _print_table(found: list[Check], ready: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if not console.is_terminal:
        print("\n".join(_plain(check) for check in found))
    else:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for check in found:
            words = Text(check.finding)
            if check.remedy:
                words.append(f"\n{check.remedy}", style=check.level)
            table.add_row(
                Text(MARKS[check.level], style=f"bold {check.level}"),
                Text(check.name, style="bold"),
                words,
            )
        console.print(table)
    bad = sum(check.level == RED for check in found)
    console.print(
        "ready to train" if ready else f"{bad} finding{'s' * (bad != 1)} must be mended first",
        style="bold green" if ready else "bold red",
    )


def _plain(check: Check) -> str:
    remedy = f"\n{'':>24}-> {check.remedy}" if check.remedy else ""
    return f"{MARKS[check.level]:<5} {check.name:<18}{check.finding}{remedy}"


# `launch/doctor.py` as a program of k=v words.
def run(composed: Composed) -> int:
    """Look at everything; exit code 1 when something must be mended first."""
    return main(json_only=composed.config.json)
