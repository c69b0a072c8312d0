"""What a task is: records to examples, examples to batches, batches to a summed loss, and metrics.

The trainer and the evaluation loop know only this. A loss is a sum and a count, never a mean: the mean over the
step's scored tokens (or examples) on all ranks is taken once, by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from finetune.data.columns import IGNORE, Encoder, Store
from finetune.data.packing import Rows
from finetune.dist import World

Batch = dict[str, Any]
Model = Callable[..., Any]
HOST_KEYS = {"cu_seqlens"}
"""Arrays the model reads on the host."""


class Meter(Protocol):
    """Collects one evaluation."""

    def add(self, model: Model, batch: Batch) -> None:
        """Run one batch (tensors on the model's device) and keep what the metrics need."""
        ...

    def result(self, world: World) -> dict[str, Any]:
        """Metrics over all ranks: `loss` and the task's own. Collective."""
        ...


class Task(Protocol):
    head: str
    """lm, classify or qa."""
    num_labels: int | None
    """Outputs of a classification head; None elsewhere."""

    def encoder(self) -> Encoder: ...

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        """Learn from the training data what the head needs (label names), or take it from `previous`."""
        ...

    def rows(self, store: Store) -> Rows: ...

    def collate(self, store: Store, rows: Rows, indices: list[int]) -> Batch: ...

    def count(self, batch: Batch) -> float:
        """Scored tokens (examples, or the sum of their weights) of a numpy batch: the loss's denominator."""
        ...

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """fp32 sum over the batch's scored tokens (examples)."""
        ...

    def meter(self, store: Store, rows: Rows) -> Meter: ...

    def describe(self) -> dict[str, Any]:
        """What an export needs beside weights: label names, template."""
        ...

    def notes(self, store: Store) -> list[str]:
        """What encoding did to the data (texts cut, contexts split), for people."""
        ...


@dataclass
class Inputs:
    """Model arguments of a flat batch."""

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
    """ids, positions (N,) -> (1, N) as Hugging Face's models want them; the boundaries stay on the host."""
    return Inputs(batch["ids"][None], batch["positions"][None], batch["cu_seqlens"]).kwargs()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """numpy -> torch, pinned and asynchronous on CUDA; what the host reads stays there."""
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
    """Labels that are not IGNORE, in a numpy array."""
    return int((labels != IGNORE).sum())


# What the ranks of an evaluation found, brought together so that their number does not show.
#
# Each rank appends arrays with one entry per example; `together` joins those of all ranks and sorts them by example.
# Metrics are computed on the result, in one order, so one rank and many give the same bits. Holds a few numbers per
# example, never logits per token.
class Gathered:
    """Columns of one evaluation; every part has the column `example`, -1 for none."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, **columns: np.ndarray) -> None:
        self._parts.append(columns)

    def together(self, world: World) -> dict[str, np.ndarray]:
        """All ranks' columns, (examples, ...), by example. Collective."""
        parts = [part for rank in world.gather(_join(self._parts)) for part in rank]
        columns = _join(parts)[0]
        order = np.argsort(columns["example"], kind="stable")
        order = order[columns["example"][order] >= 0]
        return {name: values[order] for name, values in columns.items()}


def _join(parts: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The parts as one, or none where there are none: a rank may have had no batch at all."""
    return (
        [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}]
        if parts
        else []
    )
