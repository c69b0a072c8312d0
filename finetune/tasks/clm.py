"""Next-token prediction on plain documents; loss and perplexity in all and by subset."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import ClmConfig
from finetune.data.collate import lm_batch
from finetune.data.columns import IGNORE, Encoder, Store
from finetune.data.encode_clm import TextEncoder
from finetune.data.packing import Sequences, document_chunks, stream_blocks
from finetune.dist import World
from finetune.tasks.base import Batch, Model, flat_inputs, scored


class ClmTask:
    head, num_labels = "lm", None

    def __init__(self, cfg: ClmConfig, tokenizer, packing: bool):
        self.cfg, self.tokenizer, self.packing = cfg, tokenizer, packing

    def encoder(self) -> Encoder:
        return TextEncoder(
            self.tokenizer, self.cfg.text_field, self.cfg.subset_field, self.cfg.weight_field
        )

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        """Nothing to learn from the data."""

    def rows(self, store: Store) -> Sequences:
        cut = stream_blocks if self.packing else document_chunks
        return cut(store.offsets, self.cfg.max_length)

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        return lm_batch(store, rows, indices)

    def count(self, batch: Batch) -> int:
        return scored(batch["labels"])

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return model(**flat_inputs(batch), labels=batch["labels"][None])

    def meter(self, store: Store, rows: Sequences) -> LmMeter:
        return LmMeter(store, "subset")

    def describe(self) -> dict[str, Any]:
        return {}

    def notes(self, store: Store) -> list[str]:
        return []  # nothing is lost: long documents are cut into several rows


class LmMeter:
    """Loss and perplexity per scored token, in all and by the store's category column."""

    def __init__(self, store: Store, category: str | None):
        self.names = store.names(category) if category in store.columns else [""]
        self.groups = store.column(category) if category in store.columns else None
        self.losses, self.counts = np.zeros(len(self.names)), np.zeros(len(self.names))

    def add(self, model: Model, batch: Batch) -> None:
        losses = (
            model(**flat_inputs(batch), labels=batch["labels"][None], per_token=True)
            .double()
            .cpu()
            .numpy()
        )
        kept = (batch["labels"] != IGNORE).double().cpu().numpy()
        lengths = torch.diff(batch["cu_seqlens"].long()).numpy()
        self.keep(batch["examples"].cpu().numpy(), lengths, losses, kept)

    def keep(
        self, examples: np.ndarray, lengths: np.ndarray, losses: np.ndarray, kept: np.ndarray
    ) -> None:
        """Add up the losses (N,) and counts (N,) of a batch whose segments are `examples` (S,), `lengths` (S,) long."""
        examples = np.repeat(examples, lengths)
        group = (
            np.zeros(len(examples), np.int64)
            if self.groups is None
            else self.groups[np.maximum(examples, 0)]
        )
        size = len(self.names)
        self.losses += np.bincount(group, losses, size)[:size]
        self.counts += np.bincount(group, kept, size)[:size]

    def result(self, world: World) -> dict[str, Any]:
        size = len(self.names)
        sums = np.array(world.sum([*self.losses.tolist(), *self.counts.tolist()]))
        losses, counts = sums[:size], sums[size:]
        total = lm_metrics(losses.sum(), counts.sum())
        subsets = {
            n or "(none)": lm_metrics(loss, c)
            for n, loss, c in zip(self.names, losses, counts, strict=True)
            if c
        }
        if len(subsets) > 1 or any(self.names):
            total["subsets"] = subsets
        return total


def lm_metrics(loss_sum: float, count: float) -> dict[str, Any]:
    """Mean loss of the scored tokens, and its perplexity."""
    loss = float(loss_sum / max(count, 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(count)}
