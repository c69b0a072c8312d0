"""Sources of the data: what a config names, which rows are held out, how often each source is drawn.

    data.train, data.eval -> a `DataSource` each -> one store -> `hold_out`: examples that are evaluated
                                                              -> `draws`: sequences of each source in an epoch

A single path is a mixture of one source. Opens no file: `sources` reads, `cache` encodes, `batches` orders.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from finetune.config import DataConfig, WeightBy
from finetune.errors import UserError, number

EXAMPLE = "data.train='[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]'"


@dataclass(frozen=True)
class DataSource:
    """One entry of data.train or data.eval."""

    path: str
    """File, glob, directory, `datasets` folder or hub id."""
    name: str = ""
    """As metrics and the report call it; empty: its path."""
    split: str = "train"
    """Split that is read of a hub id or `datasets` folder."""
    config: str | None = None
    """Configuration of a hub id that has several."""
    weight: float | None = None
    """Share of the training data in proportion to the other sources' weights; None: 1, or where no source has a
    weight, the source's own size."""
    epochs: float | None = None
    """Passes over this source in one epoch of the run; beside a weight, the most passes."""
    max_rows: int | None = None
    """Only the first rows are read, this many."""


def train_sources(data: DataConfig) -> list[DataSource]:
    """Return the sources of data.train.

    Raises:
        UserError: an entry that cannot be read as a source.
    """
    return _sources("data.train", data.train, data, data.split)


def eval_sources(data: DataConfig) -> list[DataSource]:
    """Return the evaluation sets of data.eval; none where rows are held out of the training data."""
    if held_out_amount(data):
        return []
    return _sources("data.eval", data.eval, data, data.eval_split)


def held_out_amount(data: DataConfig) -> float | int | None:
    """Return what is held out of the training data: a share (float), a number of rows (int), or None."""
    if data.eval_rows is not None:
        return data.eval_rows
    if isinstance(data.eval, str) and not os.path.exists(data.eval):
        try:
            return float(data.eval)
        except ValueError:
            return None
    return float(data.eval) if isinstance(data.eval, (int, float)) else None


def training_text(data: DataConfig) -> str:
    """Describe the training data for people: `a.jsonl (weight 2), b.jsonl (weight 1)`."""
    return ", ".join(
        source.path + (f" (weight {source.weight:g})" if source.weight else "")
        for source in train_sources(data)
    )


def evaluation_text(data: DataConfig) -> str | None:
    """Describe the evaluation data for people; None: there are none."""
    amount = held_out_amount(data)
    if amount is not None:
        held = f"{amount:g}" if isinstance(amount, float) else f"{amount:,} rows"
        return f"{held} of {training_text(data)}, held out"
    return ", ".join(source.path for source in eval_sources(data)) or None


def source_problems(data: DataConfig) -> Iterator[UserError]:
    """Yield the problems of a data section that can be told without opening a file."""
    for read in (train_sources, eval_sources):
        try:
            read(data)
        except UserError as error:
            yield error
    if data.eval_rows is not None and data.eval is not None:
        yield UserError(
            f"data.eval = {data.eval} and data.eval_rows = {data.eval_rows} both name evaluation "
            "data",
            remedy="Leave one of them out: data.eval=null or data.eval_rows=null.",
        )
    share = held_out_amount(data)
    if data.eval_rows is None and share is not None and not 0 < share < 1:
        yield UserError(
            f"data.eval = {data.eval} is neither a share of the training data, between 0 and 1, "
            "nor a file",
            remedy="Try data.eval=0.02, or data.eval_rows=500 for a number of rows.",
        )


def _sources(key: str, value: Any, data: DataConfig, split: str) -> list[DataSource]:
    """Read a path, a source, a list of them or a dict of names to them."""
    if isinstance(value, dict) and "path" not in value:
        entries = [(str(name), entry) for name, entry in value.items()]
    else:
        entries = [
            ("", entry) for entry in (value if isinstance(value, (list, tuple)) else [value])
        ]
    if value in (None, ""):
        return []
    if not entries:
        raise UserError("no source is named", key, f"Try {EXAMPLE}")
    known = {field.name for field in fields(DataSource)}
    sources = []
    for name, entry in entries:
        settings = entry if isinstance(entry, dict) else {"path": entry}
        unknown = [str(setting) for setting in settings if setting not in known]
        if unknown or not settings.get("path"):
            problem = f"a source has no key '{unknown[0]}'" if unknown else f"{entry} names no path"
            raise UserError(problem, key, f"A source has {', '.join(sorted(known))}: {EXAMPLE}")
        for setting in ("weight", "epochs", "max_rows"):
            amount = settings.get(setting)
            if amount is not None and (
                isinstance(amount, (bool, str)) or not 0 < amount < math.inf
            ):
                raise UserError(
                    f"{setting} = {amount} of {settings['path']} is not a positive number",
                    key,
                    f"Try {setting}: 1, or leave the source out.",
                )
        own = {"name": name, "split": split, "config": data.config, "max_rows": data.max_rows}
        given = {
            k: v if k in ("weight", "epochs", "max_rows") else str(v)
            for k, v in settings.items()
            if v is not None
        }
        sources.append(DataSource(**(own | given)))

    # Names are file names where these tell the sources apart.
    for long in (
        lambda source: os.path.basename(source.path.rstrip("/")),
        lambda source: source.path,
    ):
        named = [source.name or long(source) for source in sources]
        if len(set(named)) == len(named):
            break
    return [
        replace(source, name=name if named.count(name) == 1 else f"{name} ({i + 1})")
        for i, (source, name) in enumerate(zip(sources, named, strict=True))
    ]


def hold_out(
    texts: np.ndarray, starts_row: np.ndarray, bounds: Sequence[int], amount: float | int
) -> np.ndarray:
    """Choose the examples that are evaluated, (N,) bool: of every source those whose texts have the lowest hashes.

    The choice depends on nothing but the texts: other runs make the same one. Rows with the same text
    are on the same side, whatever source they are from.

    Args:
        texts: (N,) hash of each example's text.
        starts_row: (N,) whether an example is the first of its row.
        bounds: the first example of each source, and N.
        amount: a share of each source's rows, or a number of rows in all.

    Raises:
        UserError: nothing would be left to evaluate, or to train on.
    """
    rows = np.add.reduceat(starts_row.astype(np.int64), bounds[:-1])
    wanted = amount * rows if isinstance(amount, float) else amount * rows / rows.sum()
    wanted = np.diff(np.round(np.cumsum(wanted)), prepend=0)
    chosen = []
    for start, end, most in zip(bounds[:-1], bounds[1:], wanted, strict=True):
        distinct, which = np.unique(texts[start:end], return_inverse=True)
        each = np.bincount(which, starts_row[start:end], len(distinct))
        fits = int(np.searchsorted(np.cumsum(each), most, side="right"))
        # A source has a row on either side where it can.
        chosen.append(distinct[: min(max(fits, 1), len(distinct) - 1)])
    held = np.isin(texts, np.concatenate(chosen))
    if held.all() or not held.any():
        what = f"data.eval={amount}" if isinstance(amount, float) else f"data.eval_rows={amount}"
        raise UserError(
            f"{what} leaves nothing to {'train on' if held.any() else 'evaluate'}: the training "
            "data have "
            f"{number(int(rows.sum()))} rows with {number(len(np.unique(texts)))} different texts",
            remedy="Hold out less, or give evaluation data of their own: data.eval=FILE.",
        )
    return held


def draws(
    sources: Sequence[DataSource],
    sizes: Sequence[int],
    tokens: Sequence[int],
    rows: Sequence[int],
    by: WeightBy,
) -> list[int]:
    """Return how many sequences of each source an epoch has.

    Without weights a source has as many as its `epochs` make, once by default. With weights an epoch is
    as long as all sources together, or as long as the first source to reach its `epochs` allows, and
    the weights share it out:

        a, weight 2: 10 sequences, b, weight 1: 50 sequences    ->    a 40 (4 passes), b 20

    Args:
        sizes, tokens, rows: of each source.
        by: whether weights are shares of the tokens or of the rows.
    """
    if all(source.weight is None for source in sources):
        counts = [size * (source.epochs or 1) for source, size in zip(sources, sizes, strict=True)]
    else:
        amounts = np.array(tokens if by is WeightBy.tokens else rows, float)
        shares = np.array([1 if source.weight is None else source.weight for source in sources])
        shares = shares / shares.sum()
        limits = [
            source.epochs * amount / share
            for source, amount, share in zip(sources, amounts, shares, strict=True)
            if source.epochs
        ]
        epoch = min(limits, default=amounts.sum())
        counts = epoch * shares / amounts * np.array(sizes)
    return [max(1, round(float(count))) for count in counts]
