"""Preference tuning: make the chosen answer of each pair likelier than the rejected one.

pairs (`data.encode_preference`) -> two documents each, in one flat batch -> log-probability of each
answer -> loss per pair. With an answer's log-probability p, that of the reference model r, its
scored tokens n, c and r for chosen and rejected, sigma the logistic function:

    dpo     -log sigma(beta (c.p - c.r - r.p + r.r))            arXiv:2305.18290
    ipo     ((c.p - c.r) / c.n - (r.p - r.r) / r.n - 1 / (2 beta))^2     arXiv:2310.12036
    kto     mean of 1 - sigma(beta (c.p - c.r - z)), 1 - sigma(beta (z - r.p + r.r))    arXiv:2402.01306
    orpo    nll of prompt and chosen answer - beta log sigma(log odds of c - those of r)    arXiv:2403.07691
    simpo   -log sigma(beta (c.p / c.n - r.p / r.n) - gamma)    arXiv:2405.14734

Label smoothing s mixes a loss of dpo or simpo with that of the swapped pair, (1 - s) to s. The
definitions are those of TRL, except that every mean is over pairs, so that none depends on how a
step is cut into batches. z of kto, how far the policy is from the reference, is the mean of p - r
over prompts with the answers of other prompts, at least 0 and without a gradient; here of all pairs
of an optimizer step, each with the answers of the pair half the data away.

The reference model is the model itself with its adapter switched off. Without an adapter, or where
an adapter starts from another one, its log-probabilities are computed before training (`references`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.check import refuse_task
from finetune.config import PreferenceConfig
from finetune.data.collate import lm_batch
from finetune.data.columns import IGNORE, Encoder, Store
from finetune.data.encode_preference import PreferenceEncoder
from finetune.data.packing import (
    Sequences,
    best_fit,
    one_per_sequence,
    pack_chosen,
    ranges,
    split_pairs,
)
from finetune.dist import World
from finetune.tasks.base import Batch, Columns, Model, cut_note, flat_inputs, to_device
from finetune.tasks.instruct import TemplateTask

SIDES = ("chosen", "rejected")
Scores = dict[str, Tensor]
"""`policy`, `reference` (P, 2): log-probabilities of the chosen and rejected answers; `lengths` (P, 2): their scored
tokens; `nll` (P,): mean loss of the chosen document's tokens (orpo). All fp64."""


class PairTask(TemplateTask):
    """A task on pairs of answers: each is two documents, the chosen one first."""

    def encoder(self) -> Encoder:
        return PreferenceEncoder(self.tokenizer, self.cfg, self.template)

    def rows(self, store: Store, chosen: np.ndarray | None = None) -> Sequences:
        pack = partial(best_fit, max_length=2 * self.cfg.max_length)
        packed = pack_chosen(pack if self.packing else one_per_sequence, store.offsets, chosen)
        return split_pairs(packed, store.column("split"))

    def notes(self, store: Store) -> list[str]:
        return cut_note(store, "prompts lost tokens from their left", self.cfg.max_length)


class PreferenceTask(PairTask):
    def __init__(self, cfg: PreferenceConfig, tokenizer, packing: bool):
        refuse_task(cfg)
        super().__init__(cfg, tokenizer, packing)
        self.needs_reference = cfg.loss in ("dpo", "ipo", "kto")
        self.references: dict[str, np.ndarray] = {}
        """Fingerprint of a store -> `reference_logps` of its examples, where `reference` is a folder."""
        self.reference_width = 4 if cfg.loss == "kto" else 2

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        """Build a flat batch of documents, the chosen and the rejected one of each pair in turn.

        ids       p p c E | p p r r E
        labels    - c E - | - r r E -     orpo: p c E -, as it scores chosen prompts too
        answer    0 1 1 0 | 0 1 1 1 0     labels that are the answer's
        lengths   2         3
        """
        batch = lm_batch(store, rows, indices)
        pairs, first = batch["examples"][::2], batch["cu_seqlens"][:-1]
        batch["answer"] = batch["labels"] != IGNORE
        batch["lengths"] = np.add.reduceat(batch["answer"].astype(np.int64), first)
        if self.cfg.loss == "orpo":
            following = np.append(batch["ids"][1:], IGNORE)
            following[batch["cu_seqlens"][1:] - 1] = IGNORE
            sizes = np.diff(batch["cu_seqlens"])
            chosen = np.repeat(np.arange(len(sizes)) % 2 == 0, sizes) & (batch["tokens"] > 0)
            batch["labels"] = np.where(chosen, following, batch["labels"])
        if self.cfg.loss == "kto":
            batch["mismatched"] = self._mismatched(store, np.maximum(pairs, 0))
            batch["kl"] = np.zeros(())  # of the step: see `prepare_step`
        if store.fingerprint in self.references:
            batch["reference"] = self.references[store.fingerprint][np.maximum(pairs, 0)]
        return batch

    def _mismatched(self, store: Store, pairs: np.ndarray) -> Batch:
        """Build a flat batch of the pairs' prompts with the answers of other pairs."""
        ids, scored, sizes = [], [], []
        for example in pairs.tolist():
            start, prompt = int(store.offsets[example]), int(store.column("prompt")[example])
            other = (example + len(store) // 2) % len(store)
            begin, end = store.offsets[other : other + 2].tolist()
            asked, split = int(store.column("prompt")[other]), int(store.column("split")[other])
            for answer in ((begin + asked, begin + split), (begin + split + asked, end)):
                kept = min(prompt, self.cfg.max_length - (answer[1] - answer[0]))
                for a, b in ((start + prompt - kept, start + prompt), answer):
                    ids.append(store.column("ids")[a:b])
                    scored.append(store.column("scored")[a:b] * (a == answer[0]))
                sizes.append(kept + answer[1] - answer[0])
        targets = np.append(np.concatenate(ids)[1:].astype(np.int64), IGNORE)
        follows = np.append(np.concatenate(scored)[1:], 0)
        lengths = np.array(sizes)
        return {
            "ids": np.concatenate(ids).astype(np.int64),
            "positions": ranges(np.zeros_like(lengths), lengths),
            "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            "labels": np.where(follows != 0, targets, IGNORE),
        }

    def count(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch["lengths"]) // 2

    def prepare_step(self, model: Any, batches: list[Batch], world: World) -> None:
        """Give kto's batches the z of their step. Collective."""
        if self.cfg.loss != "kto":
            return
        model.train(False)
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                drift = self._drift(model, to_device(batch, world.device))
                total, count = total + float(drift.sum()), count + len(drift)
        model.train()
        total, count = world.sum([total, count])
        for batch in batches:
            batch["kl"] = np.array(max(0.0, total / max(count, 1)))

    def _drift(self, model: Model, batch: Batch) -> Tensor:
        """Return how much likelier than to the reference each pair's mismatched answers are, (P,)."""
        mismatched = batch["mismatched"]
        drift = answer_logps(model, mismatched).view(-1, 2)
        if "reference" in batch:
            drift = drift - batch["reference"][:, 2:]
        else:
            drift = drift - answer_logps(model, mismatched, adapter=False).view(-1, 2)
        return drift.mean(1)[: self.count(batch)]

    def reference_logps(self, model: Model, batch: Batch) -> Columns:
        """Return the log-probabilities that training needs of the reference model.

        Those of a pair's chosen and rejected answers, and for kto of its mismatched ones, (P, 2 or 4).
        """
        pairs = self.count(batch)
        columns = [answer_logps(model, batch)[: 2 * pairs].view(-1, 2)]
        if self.cfg.loss == "kto":
            columns.append(answer_logps(model, batch["mismatched"]).view(-1, 2)[:pairs])
        return {
            "example": batch["examples"][::2][:pairs].cpu().numpy(),
            "logps": torch.cat(columns, 1).cpu().numpy(),
        }

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Compute what the loss of each pair needs."""
        pairs = self.count(batch)
        scores: Scores = {}
        if self.needs_reference:
            # Before the policy, whose activations are kept for the backward.
            if "reference" in batch:
                reference = batch["reference"][:pairs, :2]
            else:
                with torch.no_grad():
                    logps = answer_logps(model, batch, adapter=False)
                reference = logps[: 2 * pairs].view(-1, 2)
            scores["reference"] = reference
        losses = model(**flat_inputs(batch), labels=batch["labels"][None], per_token=True)
        answers = document_sums(losses * batch["answer"], batch["cu_seqlens"])
        scores["policy"] = -answers[: 2 * pairs].view(-1, 2)
        scores["lengths"] = batch["lengths"][: 2 * pairs].view(-1, 2).double()
        if self.cfg.loss == "orpo":
            tokens = torch.diff(batch["cu_seqlens"])[: 2 * pairs : 2].to(losses.device) - 1
            whole = document_sums(losses, batch["cu_seqlens"])
            scores["nll"] = whole[: 2 * pairs : 2] / tokens
        return scores

    def loss(self, model: Model, batch: Batch) -> Tensor:
        scores = self.scores(model, batch)
        losses, rewards = pair_losses(self.cfg, scores, batch.get("kl"))
        with torch.no_grad():
            self.figures = {
                name: values.sum()
                for name, values in pair_figures(scores, rewards, batch.get("kl")).items()
            }
        return losses.sum().float()

    def measure(self, model: Model, batch: Batch) -> Columns:
        pairs = self.count(batch)
        columns = {"example": batch["examples"][::2][:pairs], **self.scores(model, batch)}
        if self.cfg.loss == "kto":
            columns["drift"] = self._drift(model, batch)
        return {name: values.cpu().numpy() for name, values in columns.items()}

    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        scores = {
            name: torch.from_numpy(values) for name, values in columns.items() if name != "example"
        }
        kl = scores.pop("drift").mean().clamp(min=0) if self.cfg.loss == "kto" else None
        losses, rewards = pair_losses(self.cfg, scores, kl)
        figures = pair_figures(scores, rewards, kl)
        metrics = {"loss": losses, **figures}
        predictions = pair_predictions(store, columns["example"], rewards.numpy())
        means = {name: float(values.mean()) for name, values in metrics.items()}
        return means | {"pairs": len(losses)}, predictions

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        super().prepare(train, previous)
        if previous and self.needs_reference:
            self.reference = previous.get("reference")

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"reference": self.reference} if self.reference else {})

    def marks(self, batch: Batch) -> tuple[np.ndarray, list[str]]:
        marked, captions = super().marks(batch)
        return marked, [f"{SIDES[i % 2]}, {caption}" for i, caption in enumerate(captions)]


def answer_logps(model: Model, batch: Batch, **options: bool) -> Tensor:
    """Return the log-probability of each document's answer, (S,) fp64.

    Args:
        options: `adapter=False`: to the base model without its adapter.
    """
    labels = batch["labels"]
    losses = model(**flat_inputs(batch), labels=labels[None], per_token=True, **options)
    if "answer" in batch:
        losses = losses * batch["answer"]
    return -document_sums(losses, batch["cu_seqlens"])


def document_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum values (N,) over each document, (S,) fp64; the same order of additions on every device."""
    parts = values.double().split(torch.diff(cu_seqlens).tolist())
    return torch.stack([part.sum() for part in parts])


def pair_losses(cfg: PreferenceConfig, scores: Scores, kl: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each pair's loss (P,), and the rewards of its answers (P, 2), without a gradient.

    Args:
        kl: z of kto, a scalar.
    """
    beta, policy = cfg.beta, scores["policy"]
    by_length = cfg.loss in ("orpo", "simpo")
    ratio = policy / scores["lengths"] if by_length else policy - scores["reference"]
    rewards = beta * ratio
    chosen, rejected = rewards.unbind(1)
    match cfg.loss:
        case "dpo" | "simpo":
            margin = chosen - rejected - (cfg.gamma if cfg.loss == "simpo" else 0.0)
            right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
            losses = (1 - cfg.label_smoothing) * right + cfg.label_smoothing * wrong
        case "ipo":
            mean = ratio / scores["lengths"]
            losses = (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)).square()
        case "kto":
            assert kl is not None
            losses = (
                1 - (torch.sigmoid(chosen - beta * kl) + torch.sigmoid(beta * kl - rejected)) / 2
            )
        case "orpo":
            odds = ratio - torch.log(-torch.expm1(ratio))
            losses = scores["nll"] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
        case _:
            raise AssertionError(cfg.loss)
    return losses, rewards.detach()


def pair_figures(scores: Scores, rewards: Tensor, kl: Tensor | None) -> dict[str, Tensor]:
    """Return each pair's share in the metrics, (P,) each."""
    chosen, rejected = rewards.unbind(1)
    figures = {
        "accuracy": (chosen > rejected).double(),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    if kl is not None:
        figures["kl"] = kl.double().expand(len(chosen))
    elif "reference" in scores:
        drift = (scores["policy"].detach() - scores["reference"]).sum(1)
        figures["kl"] = drift / scores["lengths"].sum(1)
    return figures


def pair_predictions(store: Store, examples: np.ndarray, rewards: np.ndarray) -> list[dict]:
    """Return each pair's place and the rewards (P, 2) of its answers."""
    return [
        {
            "where": store.blob("where", int(example)).decode(),
            "chosen_reward": round(float(chosen), 6),
            "rejected_reward": round(float(rejected), 6),
        }
        for example, (chosen, rejected) in zip(examples, rewards, strict=True)
    ]
