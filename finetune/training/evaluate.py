"""Evaluation: every row once, over all ranks, without padding and without stored logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from finetune.data.batches import eval_batches
from finetune.data.columns import Store
from finetune.dist import World
from finetune.tasks.base import Columns, Model, Task, to_device


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
    """Evaluate as `evaluate` does; also return rank 0's predictions, if the task makes any."""
    rows, parts = task.rows(store), []
    with torch.no_grad():
        for indices in eval_batches(len(rows), batch, world.size, world.rank):
            parts.append(
                task.measure(model, to_device(task.collate(store, rows, indices), world.device))
            )
            if go_on and not go_on():
                raise Interrupted
    columns, predictions = gather_columns(parts, world), list[list | None]()

    def summarise() -> dict[str, Any]:
        metrics, rows = task.metrics(store, columns)
        predictions.append(rows)
        return metrics

    metrics = world.on_main(summarise)
    return metrics, predictions[0] if predictions else None


def gather_columns(parts: list[Columns], world: World) -> Columns:
    """Join the columns of all batches and ranks, sorted by example. Collective.

    A rank may have had no batch. Rows of empty batches, which have no example, are left out.
    """
    together = [part for rank in world.gather(parts) for part in rank]
    columns = {name: np.concatenate([part[name] for part in together]) for name in together[0]}
    order = np.argsort(columns["example"], kind="stable")
    order = order[columns["example"][order] >= 0]
    return {name: values[order] for name, values in columns.items()}
