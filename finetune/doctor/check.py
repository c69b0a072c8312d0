"""One finding of the doctor."""

from __future__ import annotations

from typing import NamedTuple

GREEN, YELLOW, RED = "green", "yellow", "red"


class Check(NamedTuple):
    name: str
    level: str
    """green: ready; yellow: works, or only some things do not; red: training fails or hangs."""
    finding: str
    remedy: str = ""
    """What to type, or "" when nothing needs doing."""


def green(name: str, finding: str) -> Check:
    return Check(name, GREEN, finding)


def yellow(name: str, finding: str, remedy: str = "") -> Check:
    return Check(name, YELLOW, finding, remedy)


def red(name: str, finding: str, remedy: str) -> Check:
    return Check(name, RED, finding, remedy)
