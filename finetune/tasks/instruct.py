"""Instruction tuning: next-token prediction that scores only the assistant's part of conversations.

conversations (`data.dialogue`) -> whole examples packed by best fit, or one per row -> loss over
scored tokens. `describe` includes the template, so that an export generates from prompts of the
same form as in training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from finetune.config import InstructConfig
from finetune.data.collate import lm_batch
from finetune.data.columns import Encoder, Store
from finetune.data.encode_instruct import InstructEncoder, prompt_ids
from finetune.data.instruct_rows import check_format
from finetune.data.instruct_template import Message, Template, load_template
from finetune.data.packing import Sequences, best_fit, one_per_sequence
from finetune.dist import World
from finetune.tasks.base import Batch, Gathered, Model, flat_inputs, scored
from finetune.tasks.clm import LmMeter


class InstructTask:
    head: str = "lm"
    num_labels: int | None = None

    def __init__(self, cfg: InstructConfig, tokenizer, packing: bool):
        check_format(cfg.format)
        self.cfg, self.tokenizer, self.packing = cfg, tokenizer, packing
        self._template: Template | None = None

    @property
    def template(self) -> Template:
        """The chat template, loaded on first use.

        An export has its own template, and the configured file may no longer exist.
        """
        if self._template is None:
            self._template = load_template(
                self.cfg.template, self.tokenizer.eos_token, self.tokenizer.bos_token or ""
            )
        return self._template

    def encoder(self) -> Encoder:
        return InstructEncoder(self.tokenizer, self.cfg, self.template)

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        """Use the template of `previous`, if any: its original file may no longer exist."""
        if previous:
            self._template = Template(
                previous["template"],
                previous["template_text"],
                self.tokenizer.eos_token,
                self.tokenizer.bos_token or "",
            )

    def rows(self, store: Store) -> Sequences:
        return (
            best_fit(store.offsets, self.cfg.max_length)
            if self.packing
            else one_per_sequence(store.offsets)
        )

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        return lm_batch(store, rows, indices)

    def count(self, batch: Batch) -> int:
        return scored(batch["labels"])

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return model(**flat_inputs(batch), labels=batch["labels"][None])

    def meter(self, store: Store, rows: Sequences) -> InstructMeter:
        return InstructMeter(store)

    def describe(self) -> dict[str, Any]:
        return {
            "template": self.template.name,
            "template_text": self.template.text,
            "format": self.cfg.format,
            "max_length": self.cfg.max_length,
        }

    def notes(self, store: Store) -> list[str]:
        """Return notes for the user on what encoding changed in the data."""
        return cut_note(store, "prompts lost tokens from their left", self.cfg.max_length)

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """Return the ids that ask the model for an answer.

        `prompt` is a text, or a conversation whose last message is the user's.
        """
        return prompt_ids(self.template, self.tokenizer, prompt)


class InstructMeter(LmMeter):
    """Meter that also keeps the loss of each example.

    After `result`, `predictions` has each example's source, loss and number of scored tokens.
    """

    def __init__(self, store: Store):
        super().__init__(store, None)
        self.store, self.found = store, Gathered()
        self.predictions: list[dict[str, Any]] = []

    def keep(
        self, examples: np.ndarray, lengths: np.ndarray, losses: np.ndarray, kept: np.ndarray
    ) -> None:
        super().keep(examples, lengths, losses, kept)
        first = np.cumsum(lengths) - lengths
        self.found.add(
            example=examples,
            loss=np.add.reduceat(losses, first),
            tokens=np.add.reduceat(kept, first),
        )

    def result(self, world: World) -> dict[str, Any]:
        found = self.found.together(world)
        columns = zip(
            found["example"].tolist(), found["loss"].tolist(), found["tokens"].tolist(), strict=True
        )
        self.predictions = (
            [
                {
                    "where": self.store.blob("where", example).decode(),
                    "loss": loss / max(tokens, 1),
                    "tokens": int(tokens),
                }
                for example, loss, tokens in columns
            ]
            if world.main
            else []
        )
        return super().result(world)


def cut_note(store: Store, event: str, max_length: int) -> list[str]:
    """Return a note on prompts that were cut, or no note if there were none.

    For example: `12 of 86 prompts lost tokens from their left: 3,402 in all (task.max_length =
    512)`.
    """
    cut = np.asarray(store.column("cut"))
    n = int((cut > 0).sum())
    total = int(cut.sum(dtype=np.int64))
    return (
        [f"{n:,} of {len(store):,} {event}: {total:,} in all (task.max_length = {max_length})"]
        if n
        else []
    )
