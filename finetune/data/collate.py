"""Batches for causal language models: segments one after another, flat, without any padding.

Flow: (store, rows, row indices) -> dict of numpy arrays. Attention is kept within segments by `cu_seqlens`, so
packed and unpacked rows give the same batch format. Moves nothing to a device and knows no model.
"""

from __future__ import annotations

from typing import Any, Union

import numpy as np

from finetune.data.columns import IGNORE, Store
from finetune.data.packing import Rows

Batch = dict[str, Any]


def lm_batch(store: Store, rows: Rows, row_indices: Union[list[int], np.ndarray]) -> Batch:
    """The rows' segments, flat, with labels already shifted.

    Documents "a b c d" and "x y" (each with its eos, E) in rows of 4: [a b c d] [E x y E]. Both rows together:

        ids         a b c d | E | x y E      (N,)   int64
        positions   0 1 2 3 | 0 | 0 1 2      (N,)   int64, from 0 in each segment
        cu_seqlens  0         4   5      8   (S+1,) int32
        labels      b c d E | - | y E -      (N,)   int64, "-" is IGNORE
        examples    0         0   1          (S,)   int64

    `labels[t]` is the token that follows in the same document, also when it lies in the next segment or row (d -> E):
    cutting loses no target. A document's last token has no target. With a token column `scored`, a target that is
    not scored is IGNORE.

    `tokens` is N. For no rows at all, the batch is one ignored token with `tokens` 0: a rank without rows must
    still take part in the forward pass.
    """
    if len(row_indices) == 0:
        return _empty_batch()
    segments = _segments(rows, np.asarray(row_indices, np.int64))
    starts, lengths, examples = (
        rows.starts[segments],
        rows.lengths[segments].astype(np.int64),
        rows.examples[segments],
    )
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    index = positions + np.repeat(starts, lengths)
    return {
        "ids": store.column("ids")[index].astype(np.int64),
        "positions": positions,
        "cu_seqlens": np.concatenate([[0], ends]).astype(np.int32),
        "labels": _labels(store, index, examples, lengths),
        "examples": examples.astype(np.int64),
        "tokens": int(ends[-1]),
    }


def _segments(rows: Rows, row_indices: np.ndarray) -> np.ndarray:
    first, last = rows.pointers[row_indices], rows.pointers[row_indices + 1]
    return np.concatenate(
        [np.arange(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    )


def _labels(
    store: Store, index: np.ndarray, examples: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    target = index + 1
    valid = target < np.repeat(np.asarray(store.offsets)[examples + 1], lengths)
    target = np.where(valid, target, index)  # the store's very last token has nothing behind it
    if "scored" in store.columns:
        valid = valid & (store.column("scored")[target] != 0)
    return np.where(valid, store.column("ids")[target].astype(np.int64), IGNORE)


def _empty_batch() -> Batch:
    return {
        "ids": np.zeros(1, np.int64),
        "positions": np.zeros(1, np.int64),
        "cu_seqlens": np.array([0, 1], np.int32),
        "labels": np.full(1, IGNORE, np.int64),
        "examples": np.full(1, -1, np.int64),
        "tokens": 0,
    }
