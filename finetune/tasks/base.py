"""The task interface: records to examples, examples to batches, batches to a loss and metrics.

The trainer and the evaluation loop use only this interface. A loss is a sum and a count, never a
mean: the trainer takes the mean over the step's scored tokens (or examples) on all ranks once. An
evaluation is columns: `measure` turns a batch into one entry per segment or example, and `metrics`
reads the columns of all ranks, in the order of the examples, so that one rank and many give the
same numbers. Never are logits kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.collate import lm_batch
from finetune.data.columns import IGNORE, Encoder, Store
from finetune.data.packing import Sequences
from finetune.dist import World

Batch = dict[str, Any]
Columns = dict[str, np.ndarray]
"""Results of an evaluation, one array per name; `example` (S,) is -1 for those of an empty batch."""
Model = Callable[..., Any]
HOST_KEYS = {"cu_seqlens"}
"""Arrays the model reads on the host."""


class Task(ABC):
    head: str = "lm"
    """lm, classify or qa."""
    num_labels: int | None = None
    """Outputs of a classification head; None elsewhere."""
    needs_reference: bool = False
    """The loss reads what a reference model makes of the data."""
    reference: str | None = None
    """Folder of the reference model; None: the trained one without its adapter."""
    figures: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """Sums over the batch of the last `loss`, whose means the step's record holds beside the loss; a task may set it."""

    @abstractmethod
    def encoder(self) -> Encoder: ...

    def prepare(self, train: Store | None, previous: dict | None) -> None:  # noqa: B027
        """Collect from the training data what the head needs (label names), or use `previous`."""

    @abstractmethod
    def rows(self, store: Store, chosen: np.ndarray | None = None) -> Sequences:
        """Pack the store's examples into sequences; `chosen`: only these, indices ascending."""

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        return lm_batch(store, rows, indices)

    @abstractmethod
    def count(self, batch: Batch) -> float:
        """Return the loss's denominator for a numpy batch.

        This is the number of scored tokens, or of examples, or the sum of the examples' weights.
        """

    def prepare_step(self, model: Any, batches: list[Batch], world: World) -> None:  # noqa: B027
        """Add to a step's numpy batches what depends on all of them, before their losses. Collective."""

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the fp32 sum of the loss over the batch's scored tokens (or examples)."""

    @abstractmethod
    def measure(self, model: Model, batch: Batch) -> Columns:
        """Return what the metrics need of one batch (tensors on the model's device)."""

    @abstractmethod
    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        """Return `loss` with the task's own metrics, and the predictions if the task makes any.

        `columns` are those of `measure` on all ranks, sorted by example.
        """

    def describe(self) -> dict[str, Any]:
        """Return the data that an export needs beside the weights: label names, template."""
        return {}

    def notes(self, store: Store) -> list[str]:
        """Return notes for the user on what encoding changed (texts cut, contexts split)."""
        return []

    def marks(self, batch: Batch) -> tuple[np.ndarray, list[str]]:
        """Return which tokens of a numpy batch carry the loss, (N,) bool, and a caption of each
        segment, for a preview."""
        # labels[t] is the token behind t: a target in the next sequence is not shown here.
        scored = batch["labels"] != IGNORE
        counts = np.add.reduceat(scored.astype(np.int64), batch["cu_seqlens"][:-1])
        return np.append(False, scored[:-1]), [f"{n} scored" for n in counts]


def flat_inputs(batch: Batch) -> dict[str, Tensor]:
    """Reshape ids and positions from (N,) to (1, N), as Hugging Face's models expect them.

    The document boundaries stay on the host.
    """
    return {
        "input_ids": batch["ids"][None],
        "position_ids": batch["positions"][None],
        "cu_seqlens": batch["cu_seqlens"],
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Convert a numpy batch to torch tensors on `device`.

    On CUDA the copy is pinned and asynchronous. Arrays that the host reads stay on the host.
    """
    moved: Batch = {}
    for key, value in batch.items():
        if isinstance(value, dict):
            moved[key] = to_device(value, device)
            continue
        if not hasattr(value, "dtype"):
            moved[key] = value
            continue
        tensor = torch.from_numpy(value)
        if device.type == "cuda" and key not in HOST_KEYS:
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        moved[key] = tensor
    return moved


def cut_note(store: Store, event: str, max_length: int) -> list[str]:
    """Return a note on texts that were cut, or no note if there were none.

    For example: `12 of 86 prompts lost tokens from their left: 3,402 in all (task.max_length =
    512)`.
    """
    cut = np.asarray(store.column("cut"))
    n, total = int((cut > 0).sum()), int(cut.sum(dtype=np.int64))
    if n == 0:
        return []
    return [f"{n:,} of {len(store):,} {event}: {total:,} in all (task.max_length = {max_length})"]
