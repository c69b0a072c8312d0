"""Evaluation: every row once, over all ranks, without padding and without stored logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from finetune.data.batches import eval_batches
from finetune.data.columns import Store
from finetune.dist import World
from finetune.tasks.base import Model, Task, to_device


class Interrupted(Exception):
    """Raised when an evaluation was not finished."""


def evaluate(
    model: Model,
    task: Task,
    store: Store,
    world: World,
    batch: int,
    go_on: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Compute metrics of `model` on a store, the same for any number of ranks. Collective.

    Args:
        model: must be in evaluation mode.
        batch: rows per rank and forward.
        go_on: called after every batch, with the same result on all ranks; False interrupts.

    Raises:
        Interrupted: `go_on` returned False.
    """
    return evaluate_with(model, task, store, world, batch, go_on)[0]


def evaluate_with(
    model: Model,
    task: Task,
    store: Store,
    world: World,
    batch: int,
    go_on: Callable[[], bool] | None = None,
) -> tuple[dict[str, Any], list | None]:
    """Evaluate as `evaluate` does; also return the predictions if the task has any."""
    rows = task.rows(store)
    meter = task.meter(store, rows)
    with torch.no_grad():
        for indices in eval_batches(len(rows), batch, world.size, world.rank):
            meter.add(model, to_device(task.collate(store, rows, indices), world.device))
            if go_on and not go_on():
                raise Interrupted
    return meter.result(world), getattr(meter, "predictions", None)
