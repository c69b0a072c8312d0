"""Before the first step: one step on the longest rows of the data, so that memory runs out now or not at all.

The step changes nothing (`Engine.rehearse`). Rows of one length need no more later than at step 1; where lengths differ,
the longest batch may come after hours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from finetune.data.packing import Rows
from finetune.sharding.engine import Engine
from finetune.tasks.base import Task, to_device

Batch = dict[str, Any]


def longest_rows(rows: Rows, count: int) -> list[int]:
    """Indices of the `count` rows with the most tokens, the longest first; repeated where there are fewer."""
    tokens = np.diff(np.concatenate([[0], np.cumsum(rows.lengths, dtype=np.int64)])[rows.pointers])
    order = np.argsort(-tokens, kind="stable")[:count].tolist()
    return (order * -(-count // len(order)))[:count]


def probe(
    engine: Engine,
    task: Task,
    collate: Callable[[list[int]], Batch],
    rows: Rows,
    micro_batch: int,
    micro_steps: int,
) -> None:
    """One rehearsed step on the longest batch. Collective.

    Args:
        collate: row indices -> batch.
        micro_steps: of a step; from the second one on there are gradients to add to, so two show everything.
    """
    batch = to_device(collate(longest_rows(rows, micro_batch)), engine.world.device)

    def loss() -> Tensor:
        return task.loss(engine, batch)

    engine.train()
    engine.rehearse([loss] * min(micro_steps, 2))
