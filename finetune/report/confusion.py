"""The confusion matrix of the last evaluation that has one, as a shaded grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.report.charts import is_number
from finetune.report.files import RunFiles

MOST_CLASSES = 40
"""More than these are no picture; metrics.jsonl still has them."""


@dataclass
class Cell:
    text: str
    share: float
    """Of the examples of its row's class, 0 to 1."""
    right: bool


@dataclass
class Confusion:
    names: list[str]
    rows: list[tuple[str, list[Cell]]]
    """True class, and how often its examples were taken for each class."""
    step: int | None
    """None: found by launch/evaluate.py, afterwards."""


def confusion(run: RunFiles) -> Confusion | None:
    """None where no evaluation has a matrix that can be drawn."""
    for record in [*reversed(run.evals), run.later]:
        names, counts = record.get("labels"), record.get("confusion")
        if _drawable(names, counts):
            rows = [(str(name), [_cell(n, sum(row), i == j) for j, n in enumerate(row)])
                    for i, (name, row) in enumerate(zip(names, counts, strict=True))]
            return Confusion([str(name) for name in names], rows, record.get("step"))
    return None


def _cell(count: int, total: int, right: bool) -> Cell:
    return Cell(f"{count:,}", count / total if total else 0.0, right)


def _drawable(names: Any, counts: Any) -> bool:
    if not isinstance(names, list) or not isinstance(counts, list) or not 0 < len(names) <= MOST_CLASSES:
        return False
    return len(counts) == len(names) and all(
        isinstance(row, list) and len(row) == len(names) and all(map(is_number, row)) for row in counts)
