"""Instruction tuning: next-token prediction on conversations of which only the assistant's words are scored.

conversations (`data.dialogue`) -> whole examples packed by best fit, or one per row -> loss over scored tokens.
The template travels in `describe`, so that an export generates from the prompts it was trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from finetune.config import InstructConfig
from finetune.data.collate import lm_batch
from finetune.data.columns import Encoder, Store
from finetune.data.conversations import check_format
from finetune.data.dialogue import InstructEncoder, prompt_ids
from finetune.data.packing import Rows, best_fit, one_per_row
from finetune.data.template import Message, Template, load_template
from finetune.tasks.base import Batch, Model, flat_inputs, scored
from finetune.tasks.clm import LmMeter


class InstructTask:
    head: str = "lm"
    num_labels: int | None = None
    better: tuple[str, str] = ("loss", "min")

    def __init__(self, cfg: InstructConfig, tokenizer, packing: bool):
        check_format(cfg.format)
        self.cfg, self.tokenizer, self.packing = cfg, tokenizer, packing
        self.template = load_template(cfg.template, tokenizer.eos_token, tokenizer.bos_token or "")

    def encoder(self) -> Encoder:
        return InstructEncoder(self.tokenizer, self.cfg, self.template)

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        """An export's own template wins: it may have been a file that is no longer there."""
        if previous:
            self.template = Template(previous["template"], previous["template_text"], self.template.eos,
                                     self.tokenizer.bos_token or "")

    def rows(self, store: Store) -> Rows:
        return best_fit(store.offsets, self.cfg.max_length) if self.packing else one_per_row(store.offsets)

    def collate(self, store: Store, rows: Rows, indices: list[int]) -> Batch:
        return lm_batch(store, rows, indices)

    def count(self, batch: Batch) -> int:
        return scored(batch["labels"])

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return model(**flat_inputs(batch), labels=batch["labels"][None])

    def meter(self, store: Store, rows: Rows) -> LmMeter:
        return LmMeter(store, None)

    def describe(self) -> dict[str, Any]:
        return {"template": self.template.name, "template_text": self.template.text, "format": self.cfg.format,
                "max_length": self.cfg.max_length}

    def notes(self, store: Store) -> list[str]:
        """What encoding did to the data, for people."""
        return cut_note(store, "prompts lost tokens from their left", self.cfg.max_length)

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """Ids that ask the model for an answer: a prompt, or a conversation whose last message is the user's."""
        return prompt_ids(self.template, self.tokenizer, prompt)


def cut_note(store: Store, event: str, max_length: int) -> list[str]:
    """`12 of 86 prompts lost tokens from their left: 3,402 in all (task.max_length = 512)`, or nothing."""
    cut = np.asarray(store.column("cut"))
    n = int((cut > 0).sum())
    total = int(cut.sum(dtype=np.int64))
    return [f"{n:,} of {len(store):,} {event}: {total:,} in all (task.max_length = {max_length})"] if n else []
