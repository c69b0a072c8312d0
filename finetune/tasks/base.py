"""The task interface: records to examples, examples to batches, batches to a loss and metrics.

The trainer and the evaluation loop use only this interface. A loss is a sum and a count, never a
mean: the trainer takes the mean over the step's scored tokens (or examples) on all ranks once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from finetune.data.columns import IGNORE, Encoder, Store
from finetune.data.packing import Sequences
from finetune.dist import World

Batch = dict[str, Any]
Model = Callable[..., Any]
HOST_KEYS = {"cu_seqlens"}
"""Arrays the model reads on the host."""


class Meter(Protocol):
    """Collector of the results of one evaluation."""

    def add(self, model: Model, batch: Batch) -> None:
        """Run one batch (tensors on the model's device) and keep what the metrics need."""
        ...

    def result(self, world: World) -> dict[str, Any]:
        """Return the metrics over all ranks: `loss` and the task's own. Collective."""
        ...


class Task(Protocol):
    head: str
    """lm, classify or qa."""
    num_labels: int | None
    """Outputs of a classification head; None elsewhere."""

    def encoder(self) -> Encoder: ...

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        """Collect from the training data what the head needs (label names), or use `previous`."""
        ...

    def rows(self, store: Store) -> Sequences: ...

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch: ...

    def count(self, batch: Batch) -> float:
        """Return the loss's denominator for a numpy batch.

        This is the number of scored tokens, or of examples, or the sum of the examples' weights.
        """
        ...

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the fp32 sum of the loss over the batch's scored tokens (or examples)."""
        ...

    def meter(self, store: Store, rows: Sequences) -> Meter: ...

    def describe(self) -> dict[str, Any]:
        """Return the data that an export needs beside the weights: label names, template."""
        ...

    def notes(self, store: Store) -> list[str]:
        """Return notes for the user on what encoding changed (texts cut, contexts split)."""
        ...


@dataclass
class Inputs:
    """The model's arguments for a flat batch."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor

    def kwargs(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seqlens": self.cu_seqlens,
        }


def flat_inputs(batch: Batch) -> dict[str, Tensor]:
    """Reshape ids and positions from (N,) to (1, N), as Hugging Face's models expect them.

    The document boundaries stay on the host.
    """
    return Inputs(batch["ids"][None], batch["positions"][None], batch["cu_seqlens"]).kwargs()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Convert a numpy batch to torch tensors on `device`.

    On CUDA the copy is pinned and asynchronous. Arrays that the host reads stay on the host.
    """
    moved: Batch = {}
    for key, value in batch.items():
        if not hasattr(value, "dtype"):
            moved[key] = value
            continue
        tensor = torch.from_numpy(value)
        if device.type == "cuda" and key not in HOST_KEYS:
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        moved[key] = tensor
    return moved


def scored(labels) -> int:
    """Count the labels of a numpy array that are not IGNORE."""
    return int((labels != IGNORE).sum())


# Gather per-example results from all ranks, so that metrics do not depend on the world size.
#
# Each rank appends arrays with one entry per example; `together` joins those of all ranks and sorts
# them by example. Metrics are computed on the result in this order, so that one rank and many give
# the same bits. Only a few numbers are kept per example, never logits per token.
class Gathered:
    """Columns of one evaluation; every part has a column `example`, -1 if there is none."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, **columns: np.ndarray) -> None:
        self._parts.append(columns)

    def together(self, world: World) -> dict[str, np.ndarray]:
        """Return the columns of all ranks, (examples, ...), sorted by example. Collective."""
        parts = [part for rank in world.gather(_join(self._parts)) for part in rank]
        columns = _join(parts)[0]
        order = np.argsort(columns["example"], kind="stable")
        order = order[columns["example"][order] >= 0]
        return {name: values[order] for name, values in columns.items()}


def _join(parts: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Join the parts into one; an empty list stays empty, as a rank may have had no batch."""
    return (
        [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}]
        if parts
        else []
    )
