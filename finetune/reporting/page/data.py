"""Statistics of the data (data_stats.json) as the page shows them.

    {"train": {"documents": n, "tokens": n, "rows": n, "packing_efficiency": 0 to 1,
               "lengths": {"64": n, "128": n}  counts of lengths up to 64, 65 to 128, ...
                          or {"edges": [n + 1 numbers], "counts": [n numbers]}, or a list of lengths,
               "tokens_by_name": {column: {"ArXiv": tokens}}  or "subsets": {"ArXiv": tokens or {"tokens": n}},
               "notes": [text], "bad_row_messages": [text], any other number or text},
     "eval": {...}}

A flat object is read as `train`. Every key is optional. Computes shares, not statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from finetune.reporting.page.charts import is_number

SHOWN_APART = ("lengths", "subsets", "tokens_by_name", "notes", "bad_row_messages")


@dataclass
class Bar:
    name: str
    value: float
    share: float
    """Of all, 0 to 1."""
    height: float
    """Of the tallest, 0 to 100."""


@dataclass
class DataSection:
    name: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    lengths: list[Bar] = field(default_factory=list)
    subsets: list[Bar] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def sections(data: dict[str, Any]) -> list[DataSection]:
    parts = {name: data[name] for name in ("train", "eval") if isinstance(data.get(name), dict)}
    if not parts and data:
        parts = {"train": data}
    return [_section(name, part) for name, part in parts.items()]


def _section(name: str, part: dict[str, Any]) -> DataSection:
    by_column = [names for names in (part.get("tokens_by_name") or {}).values() if names]
    subsets = part.get("subsets") or (by_column[0] if by_column else {})
    complaints = [
        str(line) for key in ("notes", "bad_row_messages") for line in part.get(key) or []
    ]
    return DataSection(
        name, _facts(part), _lengths(part.get("lengths")), _subsets(subsets), complaints
    )


def _facts(part: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (key.replace("_", " "), fact_text(key, value))
        for key, value in part.items()
        if key not in SHOWN_APART and isinstance(value, (str, int, float, bool))
    ]


def fact_text(key: str, value: Any) -> str:
    if (
        isinstance(value, float)
        and 0 <= value <= 1
        and key.endswith(("efficiency", "share", "fraction"))
    ):
        return f"{value:.1%}"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return str(value)


def _lengths(lengths: Any) -> list[Bar]:
    if isinstance(lengths, list):
        lengths = _binned([value for value in lengths if is_number(value)])
    if not isinstance(lengths, dict):
        return []
    if lengths and all(str(key).isdigit() for key in lengths):
        return _doubling(lengths)
    edges, counts = lengths.get("edges") or [], lengths.get("counts") or []
    if len(edges) != len(counts) + 1 or not all(map(is_number, [*edges, *counts])):
        return []
    names = [f"{low:,.0f} to {high:,.0f}" for low, high in pairwise(edges)]
    return _bars(list(zip(names, counts, strict=True)))


def _doubling(lengths: dict[str, Any]) -> list[Bar]:
    """Bins by their upper bound, a power of two; those in between that are empty are shown empty."""
    found = {int(key): value for key, value in lengths.items() if is_number(value)}
    bounds, bound = [], min(found)
    while 0 < bound <= max(found):
        bounds.append(bound)
        bound *= 2
    return _bars([(f"{bound // 2 + 1:,} to {bound:,}", found.get(bound, 0)) for bound in bounds])


def _binned(values: list[float], bins: int = 24) -> dict[str, list[float]]:
    if not values:
        return {}
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = [0.0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    return {"edges": [low + i * width for i in range(bins + 1)], "counts": counts}


def _subsets(subsets: Any) -> list[Bar]:
    if not isinstance(subsets, dict):
        return []
    sizes = [(str(name), _size(value)) for name, value in subsets.items()]
    return _bars(sorted(sizes, key=lambda item: -item[1]))


def _size(value: Any) -> float:
    if isinstance(value, dict):
        value = next(
            (
                value[key]
                for key in ("tokens", "documents", "rows", "count", "share")
                if key in value
            ),
            0,
        )
    return float(value) if is_number(value) else 0.0


def _bars(values: list[tuple[str, float]]) -> list[Bar]:
    total = sum(value for _, value in values) or 1.0
    tallest = max((value for _, value in values), default=0) or 1.0
    return [Bar(name, value, value / total, 100 * value / tallest) for name, value in values]
