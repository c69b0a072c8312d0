"""Decoded examples with the scored tokens marked, for people who want to see what is trained.

(task, store, rows) -> batches of one row -> text per example, marked as the task says: ⟦scored tokens⟧ of a language
model, the ⟦pooled⟧ token of a classifier, the ⟦answer or null slot⟧ of question answering.

    -- row 0, example 7: 31 tokens, 3 scored
    ...### Response:\n
    ⟦ Paris.<|endoftext|>⟧

Reads what training reads: the collated batch, not the encoder. Trains nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from finetune.data.columns import Store
from finetune.data.packing import Sequences
from finetune.tasks.base import Task

LONGEST_RUN = 160
"""Tokens of a marked or unmarked stretch that are shown; longer ones lose their middle."""


def preview(task: Task, store: Store, rows: Sequences, tokenizer: Any, n: int) -> str:
    """Return the first `n` examples of the first rows, one after another."""
    blocks: list[str] = []
    for row in range(len(rows)):
        if len(blocks) >= n:
            break
        batch = task.collate(store, rows, [row])
        marked, captions = task.marks(batch)
        segments = zip(batch["examples"], captions, pairwise(batch["cu_seqlens"]), strict=True)
        for example, caption, (a, b) in segments:
            head = f"-- row {row}, example {example}: {b - a} tokens, {caption}"
            if "cut" in store.columns and store.column("cut")[example]:
                head += f", {int(store.column('cut')[example])} cut off"
            # Marked stretches stand on lines of their own, in ⟦ ⟧.
            edges = np.flatnonzero(np.diff(marked[a:b])) + 1
            stretches = [
                (_decoded(ids, tokenizer), flags[0])
                for ids, flags in zip(
                    np.split(batch["ids"][a:b], edges), np.split(marked[a:b], edges), strict=True
                )
            ]
            text = "\n".join(f"⟦{part}⟧" if flag else part for part, flag in stretches)
            blocks.append(f"{head}\n{text}")
    return "\n\n".join(blocks[:n])


def _decoded(ids: np.ndarray, tokenizer: Any) -> str:
    """Decode a stretch; control characters are escaped, so that none can steer a terminal.

    A newline is shown and kept.
    """
    if len(ids) > LONGEST_RUN:
        half = LONGEST_RUN // 2
        left_out = f" [... {len(ids) - 2 * half} tokens ...] "
        return _decoded(ids[:half], tokenizer) + left_out + _decoded(ids[-half:], tokenizer)
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    shown = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    return shown.replace("\n", "\\n\n")
