"""Statistics of the data (data_stats.json) as the page shows them.

    {"train": {"documents": n, "tokens": n, "rows": n, "packing_efficiency": 0 to 1,
               "lengths": {"64": n, "128": n}  counts of lengths up to 64, 65 to 128, ...
                          or {"edges": [n + 1 numbers], "counts": [n numbers]}, or a list of lengths,
               "tokens_by_name": {column: {"ArXiv": tokens}}  or "subsets": {"ArXiv": tokens or {"tokens": n}},
               "notes": [text], "bad_row_messages": [text], any other number or text},
     "eval": {...} or of several sets "eval NAME": {...}}

A flat object is read as `train`. Every key is optional. Computes shares, not statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from finetune.reporting.metrics_log import is_number

SHOWN_APART = ("lengths", "subsets", "tokens_by_name", "notes", "bad_row_messages")
SIZES = ("tokens_per_epoch", "tokens", "documents", "rows", "count", "share")
"""Keys that may hold the size of a subset, the first one wins."""


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
    facts: list[tuple[str, str]]
    lengths: list[Bar]
    subsets: list[Bar]
    complaints: list[str]


def sections(data: dict[str, Any]) -> list[DataSection]:
    """Return what the page says about training and evaluation data."""
    parts = {
        name: part
        for name, part in data.items()
        if name.split(" ")[0] in ("train", "eval") and isinstance(part, dict)
    }
    if not parts and data:
        parts = {"train": data}
    shown = []
    for name, part in parts.items():
        facts = [
            (key.replace("_", " "), fact_text(key, value))
            for key, value in part.items()
            if key not in SHOWN_APART and isinstance(value, (str, int, float, bool))
        ]
        by_column = [names for names in (part.get("tokens_by_name") or {}).values() if names]
        subsets = part.get("sources") or part.get("subsets") or (by_column[0] if by_column else {})
        sizes = {}
        for subset, size in subsets.items() if isinstance(subsets, dict) else ():
            if isinstance(size, dict):
                size = next((size[key] for key in SIZES if key in size), 0)
            sizes[str(subset)] = float(size) if is_number(size) else 0.0
        complaints = [
            str(line) for key in ("notes", "bad_row_messages") for line in part.get(key) or []
        ]
        shares = bars(sorted(sizes.items(), key=lambda item: -item[1]))
        shown.append(
            DataSection(name, facts, bars(histogram(part.get("lengths"))), shares, complaints)
        )
    return shown


def fact_text(key: str, value: Any) -> str:
    share = key.endswith(("efficiency", "share", "fraction"))
    if isinstance(value, float) and 0 <= value <= 1 and share:
        return f"{value:.1%}"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return str(value)


def histogram(lengths: Any, bins: int = 24) -> list[tuple[str, float]]:
    """Return ("65 to 128", count) for each range of lengths, from any of the three shapes."""
    if isinstance(lengths, dict) and lengths and all(str(key).isdigit() for key in lengths):
        # Bins by their upper bound, a power of two; those in between that are empty are shown empty.
        counts = {int(key): value for key, value in lengths.items() if is_number(value)}
        shown, bound = [], min(counts)
        while 0 < bound <= max(counts):
            shown.append((f"{bound // 2 + 1:,} to {bound:,}", counts.get(bound, 0)))
            bound *= 2
        return shown
    edges, counts = [], []
    if isinstance(lengths, dict):
        edges, counts = lengths.get("edges") or [], lengths.get("counts") or []
    elif isinstance(lengths, list) and (values := [v for v in lengths if is_number(v)]):
        low, width = min(values), (max(values) - min(values)) / bins or 1.0
        edges, counts = [low + i * width for i in range(bins + 1)], [0.0] * bins
        for value in values:
            counts[min(bins - 1, int((value - low) / width))] += 1
    if len(edges) != len(counts) + 1 or not all(map(is_number, [*edges, *counts])):
        return []
    names = [f"{low:,.0f} to {high:,.0f}" for low, high in pairwise(edges)]
    return list(zip(names, counts, strict=True))


def bars(values: list[tuple[str, float]]) -> list[Bar]:
    total = sum(value for _, value in values) or 1.0
    tallest = max((value for _, value in values), default=0) or 1.0
    return [Bar(name, value, value / total, 100 * value / tallest) for name, value in values]
