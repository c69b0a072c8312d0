"""Statistics of the data (data_stats.json) as the page shows them.

    {"train": {"documents": n, "tokens": n, "rows": n, "packing_efficiency": 0 to 1,
               "lengths": {"64": n, "128": n}  counts of lengths up to 64, 65 to 128, ...
               "tokens_by_name": {column: {"ArXiv": tokens}}
               "sources": {name: {"tokens_per_epoch": n}}  of a mixture, in place of the line above
               "notes": [text], "bad_row_messages": [text], any other number or text},
     "eval": {...} or of several sets "eval NAME": {...}}

Every key is optional. Computes shares, not statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.reporting.metrics_log import is_number


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
    shown = []
    for name, part in data.items():
        if name.split(" ")[0] not in ("train", "eval") or not isinstance(part, dict):
            continue
        facts = [
            (key.replace("_", " "), fact_text(key, value))
            for key, value in part.items()
            if isinstance(value, (str, int, float, bool))
        ]
        named = [names for names in (part.get("tokens_by_name") or {}).values() if names]
        sizes = named[0] if named else {}
        if sources := part.get("sources"):
            sizes = {source: counts["tokens_per_epoch"] for source, counts in sources.items()}
        subsets = sorted(sizes.items(), key=lambda item: -item[1])
        complaints = [
            str(line) for key in ("notes", "bad_row_messages") for line in part.get(key) or []
        ]
        lengths = histogram(part.get("lengths") or {})
        shown.append(DataSection(name, facts, bars(lengths), bars(subsets), complaints))
    return shown


def fact_text(key: str, value: Any) -> str:
    share = key.endswith(("efficiency", "share", "fraction"))
    if isinstance(value, float) and 0 <= value <= 1 and share:
        return f"{value:.1%}"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return str(value)


def histogram(lengths: dict[str, int]) -> list[tuple[str, float]]:
    """Return ("65 to 128", count) for each range of lengths, named by its upper bound.

    Bounds are powers of two; ranges without examples between others are shown empty.
    """
    counts, shown = {int(bound): count for bound, count in lengths.items()}, []
    bound = min(counts, default=1)
    while bound <= max(counts, default=0):
        shown.append((f"{bound // 2 + 1:,} to {bound:,}", counts.get(bound, 0)))
        bound *= 2
    return shown


def bars(values: list[tuple[str, float]]) -> list[Bar]:
    total = sum(value for _, value in values) or 1.0
    tallest = max((value for _, value in values), default=0) or 1.0
    return [Bar(name, value, value / total, 100 * value / tallest) for name, value in values]
