"""Instruction tuning: next-token prediction that scores only the assistant's part of conversations.

conversations (`data.instruct_rows`) -> whole examples packed by best fit, or one per row -> loss
over scored tokens. `describe` includes the template, so that an export generates from prompts of
the same form as in training.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import numpy as np

from finetune.check import refuse_task
from finetune.config import InstructConfig, PairConfig
from finetune.data.columns import Encoder, Store
from finetune.data.encode_instruct import InstructEncoder, prompt_ids
from finetune.data.instruct_template import Message, Template, load_template
from finetune.data.packing import Sequences, best_fit, one_per_sequence, pack_chosen
from finetune.tasks.base import Columns, Task, cut_note
from finetune.tasks.clm import LmTask, lm_metrics


class TemplateTask(Task):
    """A task whose texts are conversations in a chat template."""

    def __init__(self, cfg: InstructConfig | PairConfig, tokenizer, packing: bool):
        self.cfg, self.tokenizer, self.packing = cfg, tokenizer, packing

    @cached_property
    def template(self) -> Template:
        """The chat template, loaded on first use.

        An export has its own template, and the configured file may no longer exist.
        """
        tokenizer = self.tokenizer
        return load_template(self.cfg.template, tokenizer.eos_token, tokenizer.bos_token or "")

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        """Use the template of `previous`, if any: its original file may no longer exist."""
        if previous and "template_text" in previous:  # not where it was another task's
            self.template = Template(
                previous["template"],
                previous["template_text"],
                self.tokenizer.eos_token,
                self.tokenizer.bos_token or "",
            )

    def describe(self) -> dict[str, Any]:
        template = {"template": self.template.name, "template_text": self.template.text}
        return template | {"max_length": self.cfg.max_length}

    def rows(self, store: Store, chosen: np.ndarray | None = None) -> Sequences:
        pack = partial(best_fit, max_length=self.cfg.max_length)
        return pack_chosen(pack if self.packing else one_per_sequence, store.offsets, chosen)

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """Return the ids that ask the model for an answer.

        `prompt` is a text, or a conversation whose last message is the user's.
        """
        return prompt_ids(self.template, self.tokenizer, prompt)


class InstructTask(TemplateTask, LmTask):
    def __init__(self, cfg: InstructConfig, tokenizer, packing: bool):
        refuse_task(cfg)
        super().__init__(cfg, tokenizer, packing)

    def encoder(self) -> Encoder:
        return InstructEncoder(self.tokenizer, self.cfg, self.template)

    def question(self, store: Store, example: int, max_tokens: int) -> tuple[list[int], list[int]]:
        """Ask for the last answer of a conversation; what is too long is cut from the prompt's left."""
        begin, end = store.offsets[example : example + 2].tolist()
        ids = store.column("ids")[begin:end].tolist()
        unscored = np.flatnonzero(store.column("scored")[begin:end] == 0)
        start = int(unscored[-1]) + 1 if len(unscored) else len(ids)
        prompt = ids[max(0, start - self.cfg.max_length + max_tokens) : start]
        return prompt, [token for token in ids[start:] if token != self.tokenizer.eos_token_id]

    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        """Return loss and perplexity, and each example's source, loss and number of scored tokens."""
        predictions = [
            {
                "where": store.blob("where", example).decode(),
                "loss": loss / max(tokens, 1),
                "tokens": int(tokens),
            }
            for example, loss, tokens in zip(
                *(columns[name].tolist() for name in ("example", "loss", "tokens")), strict=True
            )
        ]
        return lm_metrics(columns["loss"].sum(), columns["tokens"].sum()), predictions

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"format": self.cfg.format}

    def notes(self, store: Store) -> list[str]:
        return cut_note(store, "prompts lost tokens from their left", self.cfg.max_length)
