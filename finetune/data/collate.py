"""Batches for causal language models: segments one after another, flat, without any padding.

Flow: (store, sequences, indices) -> dict of numpy arrays. Attention is kept within segments by `cu_seqlens`, so
packed and unpacked sequences give the same batch format. Moves nothing to a device and knows no model.
"""

from __future__ import annotations

from typing import Any, Union

import numpy as np

from finetune.data.columns import IGNORE, Store
from finetune.data.packing import Sequences, ranges

Batch = dict[str, Any]


def lm_batch(store: Store, sequences: Sequences, indices: Union[list[int], np.ndarray]) -> Batch:
    """Return the segments of some sequences, flat, with labels already shifted.

    Documents "a b c d" and "x y" (each with its eos, E) in sequences of 4: [a b c d] [E x y E].
    Both sequences together:

        ids         a b c d | E | x y E      (N,)   int64
        positions   0 1 2 3 | 0 | 0 1 2      (N,)   int64, from 0 in each segment
        cu_seqlens  0         4   5      8   (S+1,) int32
        labels      b c d E | - | y E -      (N,)   int64, "-" is IGNORE
        examples    0         0   1          (S,)   int64

    `labels[t]` is the token that follows in the same document, also when it lies in the next
    segment or sequence (d -> E): cutting loses no target. A document's last token has no target.
    With a token column `scored`, a target that is not scored is IGNORE.

    `tokens` is N. Without any sequence, the batch is one ignored token with `tokens` 0: a rank
    without sequences must still take part in the forward pass.
    """
    indices = np.asarray(indices, np.int64)
    if len(indices) == 0:
        return {
            "ids": np.zeros(1, np.int64),
            "positions": np.zeros(1, np.int64),
            "cu_seqlens": np.array([0, 1], np.int32),
            "labels": np.full(1, IGNORE, np.int64),
            "examples": np.full(1, -1, np.int64),
            "tokens": 0,
        }
    first, end = sequences.pointers[indices], sequences.pointers[indices + 1]
    segments = ranges(first, end - first)
    lengths = sequences.lengths[segments].astype(np.int64)
    examples = sequences.examples[segments].astype(np.int64)
    positions = ranges(np.zeros_like(lengths), lengths)
    index = positions + np.repeat(sequences.starts[segments], lengths)

    target = index + 1
    valid = target < np.repeat(np.asarray(store.offsets)[examples + 1], lengths)
    target = np.where(valid, target, index)  # the store's very last token has nothing behind it
    if "scored" in store.columns:
        valid = valid & (store.column("scored")[target] != 0)
    return {
        "ids": store.column("ids")[index].astype(np.int64),
        "positions": positions,
        "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "labels": np.where(valid, store.column("ids")[target].astype(np.int64), IGNORE),
        "examples": examples,
        "tokens": len(index),
    }
