"""Evaluation: every row once, over all ranks, without padding and without stored logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.data.batches import eval_batches
from finetune.data.columns import Store
from finetune.data.packing import Sequences
from finetune.dist import World
from finetune.errors import Interrupted
from finetune.tasks.base import Columns, Model, Task, to_device
from finetune.training.answers import Answers

Suite = Callable[..., dict[str, dict[str, float]]]
"""(after_batch=...) -> figures of lm-eval: {task: {metric: value}}. Collective."""
COUNTS = ("tokens", "examples", "questions", "pairs", "prompts", "answers")
"""Figures of an evaluation that say how much was evaluated."""


@dataclass
class EvalSet:
    """Examples of a store that are evaluated together."""

    store: Store
    rows: Sequences
    """They alone, packed."""


def evaluate(
    model: Model,
    task: Task,
    sets: dict[str, EvalSet],
    world: World,
    batch: int,
    go_on: Callable[[], bool] | None = None,
    answers: Answers | None = None,
    suite: Suite | None = None,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Compute metrics of `model` on evaluation sets, the same for any number of ranks. Collective.

    Those of `suite` are TASK/METRIC each, and all under `lm_eval`. Also return the generated
    answers of `answers`.

    Args:
        model: must be in evaluation mode.
        batch: rows per rank and forward.
        go_on: called after every batch, with the same result on all ranks; False interrupts.

    Raises:
        Interrupted: `go_on` returned False.
    """

    def after_batch() -> None:
        if go_on and not go_on():
            raise Interrupted

    metrics, rows = dict[str, dict[str, Any]](), list[dict[str, str]]()
    for name, part in sets.items():
        metrics[name], _ = evaluate_set(model, task, part, world, batch, go_on)
        if answers:
            examples = np.unique(part.rows.examples)
            scores, answered = answers.evaluate(
                task, part.store, examples, world, batch, after_batch
            )
            metrics[name] |= scores
            rows += [({"set": name} if name else {}) | row for row in answered]
    together = combined(metrics)
    if suite:
        tasks = world.broadcast(suite(after_batch=after_batch))
        together |= {
            f"{task}/{name}": value
            for task, figures in tasks.items()
            for name, value in figures.items()
        }
        together["lm_eval"] = tasks
    return together, rows


def combined(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of the only set; of several the means, each set's as SET/METRIC, and all under `sets`.

    Counts are sums.
    """
    if len(metrics) == 1 and "" in metrics:
        return metrics[""]
    # A metric that a set does not have, such as the correlation of constants, has no mean.
    first = next(iter(metrics.values()))
    named = [name for name, value in first.items() if isinstance(value, (int, float))]
    columns = {name: [one[name] for one in metrics.values()] for name in named}
    means = {
        name: None if None in values else sum(values) / len(values)
        for name, values in columns.items()
    }
    means |= {name: sum(columns[name]) for name in COUNTS if name in columns}
    each = {f"{of}/{name}": one[name] for of, one in metrics.items() for name in named}
    return means | each | {"sets": metrics}


def evaluate_set(
    model: Model,
    task: Task,
    part: EvalSet,
    world: World,
    batch: int,
    go_on: Callable[[], bool] | None = None,
) -> tuple[dict[str, Any], list | None]:
    """Evaluate one set as `evaluate` does; also return rank 0's predictions, if the task makes any."""
    store, rows, parts = part.store, part.rows, []
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
