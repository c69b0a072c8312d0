"""One rehearsed step on the longest rows of the data, so that memory runs out at once or not at all.

The step changes nothing (`Engine.rehearse`). Rows of one length need no more later than at step 1;
where lengths differ, the longest batch may otherwise come after hours.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from finetune.data.packing import Sequences, sequence_tokens
from finetune.sharding.engine import Engine
from finetune.tasks.base import to_device
from finetune.training.inputs import Inputs


def longest_rows(rows: Sequences, count: int) -> list[int]:
    """Return `count` row indices, longest first in tokens; repeated if there are fewer rows."""
    order = np.argsort(-sequence_tokens(rows), kind="stable")[:count].tolist()
    return (order * -(-count // len(order)))[:count]


def probe(engine: Engine, inputs: Inputs, micro_batch: int, accumulation: int) -> None:
    """Rehearse a step on the longest batch. Collective.

    From the second micro-batch on there are gradients to add to, so two show every peak.
    """
    batch = inputs.collate(longest_rows(inputs.rows, micro_batch))
    batch = to_device(batch, engine.world.device)

    def loss() -> Tensor:
        return inputs.task.loss(engine, batch)

    engine.train()
    engine.rehearse([loss] * min(accumulation, 2))
