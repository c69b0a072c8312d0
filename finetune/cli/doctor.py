"""All checks in order, as a table for people or JSON for programs.

Exit code 0 when nothing is red, 1 otherwise. Repairs nothing and asks nothing of the network. A
check that itself fails is a yellow finding, so that the others are still made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.cli import doctor_checks
from finetune.cli.doctor_checks import RED, Check, yellow
from finetune.errors import EXIT_DONE, EXIT_FAILED, plural

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
    doctor_checks.small_memory,
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
    """Run every check; one that fails itself becomes a yellow finding."""
    findings: list[Check] = []
    for check in CHECKS:
        try:
            result = check()
        except Exception as error:
            name, problem = check.__name__.replace("_", " "), f"{type(error).__name__}: {error}"
            result = yellow(name, f"could not be checked: {problem}")
        findings += [result] if isinstance(result, Check) else result
    return findings


def main(json_only: bool = False) -> int:
    """Print the findings, with `json_only` as one JSON object, and return the exit code."""
    findings = checks()
    bad = sum(check.level == RED for check in findings)
    if json_only:
        listed = [check._asdict() for check in findings]
        print(json.dumps({"ready": not bad, "checks": listed}, indent=2))
        return EXIT_FAILED if bad else EXIT_DONE

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for check in findings:
        mark = MARKS[check.level]
        if not console.is_terminal:
            remedy = f"\n{'':>24}-> {check.remedy}" if check.remedy else ""
            print(f"{mark:<5} {check.name:<18}{check.finding}{remedy}")
            continue
        text = Text(check.finding)
        if check.remedy:
            text.append(f"\n{check.remedy}", style=check.level)
        table.add_row(Text(mark, style=f"bold {check.level}"), Text(check.name, style="bold"), text)
    if console.is_terminal:
        console.print(table)
    console.print(
        f"{plural(bad, 'finding')} must be fixed first" if bad else "ready to train",
        style="bold red" if bad else "bold green",
    )
    return EXIT_FAILED if bad else EXIT_DONE


# `launch/doctor.py` as a program of k=v words.
def run(composed: Composed) -> int:
    """Run all checks; exit code 1 if something must be fixed first."""
    return main(json_only=composed.config.json)
