"""Next-token prediction: the loss of language models, and plain documents as the first task with it."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from finetune.config import ClmConfig
from finetune.data.columns import IGNORE, Encoder, Store
from finetune.data.encode_clm import TextEncoder
from finetune.data.packing import Sequences, document_chunks, pack_chosen, stream_blocks
from finetune.tasks.base import Batch, Columns, Model, Task, flat_inputs


class LmTask(Task):
    """A task whose loss is the sum of cross-entropy over scored tokens."""

    cfg: Any
    tokenizer: Any

    @abstractmethod
    def question(self, store: Store, example: int, max_tokens: int) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt for the model and of its reference answer; empty if there is none.

        Prompt and `max_tokens` generated tokens do not exceed task.max_length.
        """

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return model(**flat_inputs(batch), labels=batch["labels"][None])

    def measure(self, model: Model, batch: Batch) -> Columns:
        """Return the summed loss and the number of scored tokens of each segment."""
        labels = batch["labels"]
        losses = model(**flat_inputs(batch), labels=labels[None], per_token=True)
        first = batch["cu_seqlens"][:-1].numpy()
        return {
            "example": batch["examples"].cpu().numpy(),
            "loss": np.add.reduceat(losses.double().cpu().numpy(), first),
            "tokens": np.add.reduceat((labels != IGNORE).double().cpu().numpy(), first),
        }


class ClmTask(LmTask):
    """Documents: loss and perplexity in all and by subset."""

    def __init__(self, cfg: ClmConfig, tokenizer, packing: bool):
        self.cfg, self.tokenizer, self.packing = cfg, tokenizer, packing

    def encoder(self) -> Encoder:
        return TextEncoder(
            self.tokenizer, self.cfg.text_field, self.cfg.subset_field, self.cfg.weight_field
        )

    def rows(self, store: Store, chosen: np.ndarray | None = None) -> Sequences:
        cut = stream_blocks if self.packing else document_chunks
        return pack_chosen(partial(cut, max_length=self.cfg.max_length), store.offsets, chosen)

    def question(self, store: Store, example: int, max_tokens: int) -> tuple[list[int], list[int]]:
        """Cut a document in two: its first half is continued."""
        begin, end = store.offsets[example : example + 2].tolist()
        ids = store.column("ids")[begin : end - 1].tolist()  # without eos
        half = min(len(ids) // 2, self.cfg.max_length - max_tokens)
        return ids[:half], ids[half : half + max_tokens]

    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        total = lm_metrics(columns["loss"].sum(), columns["tokens"].sum())
        if "subset" in store.columns:
            names, subset = store.names("subset"), store.column("subset")[columns["example"]]
            losses, counts = (
                np.bincount(subset, columns[name], len(names)) for name in ("loss", "tokens")
            )
            subsets = {
                name or "(none)": lm_metrics(loss, count)
                for name, loss, count in zip(names, losses, counts, strict=True)
                if count
            }
            if len(subsets) > 1 or any(names):
                total["subsets"] = subsets
        return total, None


def lm_metrics(loss_sum: float, count: float) -> dict[str, Any]:
    """Return the mean loss of the scored tokens, and its perplexity."""
    loss = float(loss_sum / max(count, 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(count)}
