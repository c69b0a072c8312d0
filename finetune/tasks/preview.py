"""Decoded examples with the scored tokens marked, for people who want to see what is trained.

(task, store, rows) -> batches of one row -> text per example, marked by what the batch says: ⟦scored tokens⟧ of a
language model, the ⟦pooled⟧ token of a classifier, the ⟦answer or null slot⟧ of question answering.

    -- row 0, example 7: 31 tokens, 3 scored
    ...### Response:\n
    ⟦ Paris.<|endoftext|>⟧

Reads what training reads: labels of the collated batch, not of the encoder. Trains nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from finetune.data.columns import IGNORE, Store
from finetune.data.packing import Sequences

LONGEST_RUN = 160
"""Tokens of a marked or unmarked stretch that are shown; longer ones lose their middle."""


def preview(task: Any, store: Store, rows: Sequences, tokenizer: Any, n: int) -> str:
    """The first `n` examples of the first rows, one after another."""
    blocks: list[str] = []
    for row in range(len(rows)):
        if len(blocks) >= n:
            break
        blocks += _row(task.collate(store, rows, [row]), row, task, store, tokenizer)
    return "\n\n".join(blocks[:n])


def _row(batch: dict[str, Any], row: int, task: Any, store: Store, tokenizer: Any) -> list[str]:
    marked = _marked(batch)
    bounds = batch["cu_seqlens"]
    blocks = []
    for segment, (a, b) in enumerate(pairwise(bounds)):
        example = int(batch["examples"][segment])
        head = f"-- row {row}, example {example}: {b - a} tokens, {_caption(batch, segment, slice(a, b), task)}"
        if "cut" in store.columns and store.column("cut")[example]:
            head += f", {int(store.column('cut')[example])} cut off"
        blocks.append(f"{head}\n{_text(batch['ids'][a:b], marked[a:b], tokenizer)}")
    return blocks


def _marked(batch: dict[str, Any]) -> np.ndarray:
    """Which tokens carry the loss: targets of next-token labels, pooled tokens, or the tokens of the target span."""
    marked = np.zeros(len(batch["ids"]), bool)
    if "labels" in batch:
        # labels[t] is the token behind t: a target in the next row is not shown here.
        targets = np.flatnonzero(batch["labels"] != IGNORE) + 1
        marked[targets[targets < len(marked)]] = True
    elif "sizes" in batch:
        first = np.cumsum([0, *batch["sizes"][:-1]])
        for start, a, b in zip(first, batch["starts"], batch["ends"], strict=True):
            marked[batch["pool"][start + a : start + b + 1]] = True
    else:
        marked[batch["pool"]] = True
    return marked


def _caption(batch: dict[str, Any], segment: int, tokens: slice, task: Any) -> str:
    if "labels" in batch:
        return f"{int((batch['labels'][tokens] != IGNORE).sum())} scored"
    if "sizes" in batch:
        start, end, size = (int(batch[key][segment]) for key in ("starts", "ends", "sizes"))
        return (
            "no answer: the null slot"
            if start == size - 1
            else f"answer of {end - start + 1} tokens"
        )
    target, weight = batch["targets"][segment], float(batch["weights"][segment])
    return f"target {task.target_text(target)}" + (f", weight {weight:g}" if weight != 1 else "")


def _text(ids: np.ndarray, marked: np.ndarray, tokenizer: Any) -> str:
    """Marked stretches stand on lines of their own, in ⟦ ⟧."""
    edges = np.flatnonzero(np.diff(marked)) + 1
    stretches = zip(np.split(ids, edges), np.split(marked, edges), strict=True)
    return "\n".join(
        f"⟦{_decode(part, tokenizer)}⟧" if flags[0] else _decode(part, tokenizer)
        for part, flags in stretches
    )


def _decode(ids: np.ndarray, tokenizer: Any) -> str:
    if len(ids) > LONGEST_RUN:
        half = LONGEST_RUN // 2
        left_out = f" [... {len(ids) - 2 * half} tokens ...] "
        return _plain(ids[:half], tokenizer) + left_out + _plain(ids[-half:], tokenizer)
    return _plain(ids, tokenizer)


def _plain(ids: np.ndarray, tokenizer: Any) -> str:
    """Text whose control characters cannot steer a terminal; a newline is kept and shown."""
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    shown = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    return shown.replace("\n", "\\n\n")
