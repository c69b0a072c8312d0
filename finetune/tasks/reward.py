"""Reward model: one number for a conversation, higher for the chosen answer of a pair than for the rejected one.

pairs (`data.encode_preference`) -> two documents each -> head of one output at the closing eos of
each -> loss per pair, -log sigma(chosen - rejected - margin): Bradley and Terry's model of paired
comparisons, the margin as in Llama 2 (arXiv:2307.09288).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.config import InstructConfig
from finetune.data.collate import lm_batch
from finetune.data.columns import Encoder, Store
from finetune.data.encode_preference import AnswersEncoder
from finetune.data.instruct_rows import conversation
from finetune.data.instruct_template import closed
from finetune.data.packing import Sequences
from finetune.errors import UserError
from finetune.tasks.base import Batch, Columns, Model, flat_inputs
from finetune.tasks.instruct import TemplateTask
from finetune.tasks.preference import SIDES, PairTask, pair_predictions


class RewardTask(PairTask):
    head, num_labels = "classify", 1
    regression = True

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        """Build a flat batch of documents, with each one's last token and each pair's margin.

        ids   p p c E | p p r r E       pool 3 8       margins 0
        """
        batch = lm_batch(store, rows, indices)
        del batch["labels"]
        pairs = batch["examples"][::2] if batch["tokens"] else batch["examples"][:0]
        return batch | {
            "pool": batch["cu_seqlens"][1:].astype(np.int64) - 1,
            "margins": np.asarray(store.column("margin"))[pairs],
        }

    def count(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch["margins"])

    def rewards(self, model: Model, batch: Batch) -> Tensor:
        """Return the rewards of each pair's answers, (P, 2) fp32."""
        outputs = model(**flat_inputs(batch), positions=batch["pool"])
        return outputs[: 2 * self.count(batch), 0].view(-1, 2)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        rewards = self.rewards(model, batch)
        self.figures = {
            name: values.sum() for name, values in reward_figures(rewards.detach()).items()
        }
        return reward_losses(rewards, batch["margins"]).sum()

    def measure(self, model: Model, batch: Batch) -> Columns:
        pairs = self.count(batch)
        columns = {
            "example": batch["examples"][::2][:pairs],
            "rewards": self.rewards(model, batch).double(),
            "margins": batch["margins"].double(),
        }
        return {name: values.cpu().numpy() for name, values in columns.items()}

    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        rewards, margins = (torch.from_numpy(columns[name]) for name in ("rewards", "margins"))
        figures = {"loss": reward_losses(rewards, margins), **reward_figures(rewards)}
        metrics = {name: float(values.mean()) for name, values in figures.items()}
        predictions = pair_predictions(store, columns["example"], columns["rewards"])
        return metrics | {"pairs": len(rewards)}, predictions

    def pieces(self, record: dict, where: str) -> list[str]:
        """Return the texts of a conversation to score: prompt and answer in turn.

        `record` has one of the layouts of instruction rows.

        Raises:
            UserError: it has none, or no answer.
        """
        try:
            read = conversation(record, where, InstructConfig(weight_field=None))
        except UserError as error:
            row = '{"prompt": "...", "completion": "..."}'
            remedy = (
                f"A reward model scores answers: write rows such as {row} to prompts=FILE.jsonl."
            )
            raise UserError(error.problem, where, remedy) from None
        assert read is not None
        return self.template.pieces(read[0], where)

    def text_ids(self, texts: list[str]) -> list[int]:
        """Return the ids of `pieces`, as training reads them; the last one is pooled."""
        parts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [i for part in closed(parts, self.tokenizer.eos_token_id) for i in part]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"problem": "regression", "labels": ["reward"]}

    def marks(self, batch: Batch) -> tuple[np.ndarray, list[str]]:
        captions = [SIDES[i % 2] for i in range(len(batch["pool"]))]
        return np.isin(np.arange(len(batch["ids"])), batch["pool"]), captions


class AnswersTask(RewardTask):
    """Score several answers to each prompt, to choose the best of them. For evaluation only."""

    def encoder(self) -> Encoder:
        return AnswersEncoder(self.tokenizer, self.cfg, self.template)

    rows = TemplateTask.rows

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        """Build a flat batch of documents, with each one's last token."""
        batch = lm_batch(store, rows, indices)
        del batch["labels"]
        return batch | {"pool": batch["cu_seqlens"][1:].astype(np.int64) - 1}

    def measure(self, model: Model, batch: Batch) -> Columns:
        outputs = model(**flat_inputs(batch), positions=batch["pool"])[:, 0]
        columns = {"example": batch["examples"], "reward": outputs.double()}
        return {name: values.cpu().numpy() for name, values in columns.items()}

    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        """Return the mean rewards of any answer and of the best of n, and each prompt's rewards.

        The best of n is the expectation over the ways to draw n of a prompt's answers, for n of 2,
        4, 8, ... up to the fewest answers that a prompt has.
        """
        prompts: dict[str, list[float]] = {}
        for example, reward in zip(columns["example"], columns["reward"], strict=True):
            place = store.blob("where", int(example)).decode()
            prompts.setdefault(place, []).append(float(reward))
        fewest = min(map(len, prompts.values()), default=0)
        sizes = [2**power for power in range(1, fewest.bit_length()) if 2**power <= fewest]
        means = {"reward": [sum(rewards) / len(rewards) for rewards in prompts.values()]}
        means |= {f"best_of_{n}": [best_of(r, n) for r in prompts.values()] for n in sizes}
        means["best_reward"] = [max(rewards) for rewards in prompts.values()]
        metrics: dict[str, Any] = {k: float(np.mean(v)) for k, v in means.items() if v}
        predictions = [
            {
                "where": place,
                "rewards": [round(reward, 6) for reward in rewards],
                "best": int(np.argmax(rewards)),
            }
            for place, rewards in prompts.items()
        ]
        counts = {"prompts": len(prompts), "answers": len(columns["example"])}
        return metrics | counts, predictions


def best_of(rewards: list[float], n: int) -> float:
    """Return the expected largest of `n` rewards that are drawn without putting back."""
    ways = [math.comb(rank, n - 1) for rank in range(len(rewards))]
    return sum(w * r for w, r in zip(ways, sorted(rewards), strict=True)) / sum(ways)


def reward_losses(rewards: Tensor, margins: Tensor) -> Tensor:
    """Return each pair's loss (P,) from the rewards of its answers (P, 2)."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)


def reward_figures(rewards: Tensor) -> dict[str, Tensor]:
    """Return each pair's share in the metrics, (P,) each."""
    chosen, rejected = rewards.unbind(1)
    return {
        "accuracy": (chosen > rejected).to(rewards.dtype),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
