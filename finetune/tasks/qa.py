"""Extractive question answering: start and end of an answer in its context, or no answer.

questions (`data.windows`) -> one window per row -> two logits for every context token and the null
slot -> loss per window, (start cross-entropy + end cross-entropy) / 2, with the softmax over that
window's own slots:

    ids      q q n c1 c2 c3 E        slots  c1 c2 c3 E       targets: two of them, or E twice

A question's answer is the best valid span over its windows, each scored against the null slot of
its own window: a softmax per window does not fix the level of its logits, so only this difference
can be compared between windows. The answer is empty if the null slot wins by more than
`null_threshold` and the training data had unanswerable questions.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.check import refuse_task
from finetune.config import QaConfig
from finetune.data.collate import lm_batch
from finetune.data.columns import Encoder, Store
from finetune.data.encode_qa import SEPARATOR, QaEncoder
from finetune.data.packing import Sequences, one_per_sequence, pack_chosen
from finetune.tasks.base import Batch, Columns, Model, Task, flat_inputs
from finetune.tasks.squad_metrics import best_threshold, score, score_v1, summarise

NOTHING = -1e30
"""Score where there is no valid span; finite, so that differences stay numbers."""
SHOWN_ANSWERS = 5
"""Different answers kept of each question, the best first."""


class QaTask(Task):
    head = "qa"

    def __init__(self, cfg: QaConfig, tokenizer):
        refuse_task(cfg)
        self.cfg, self.tokenizer = cfg, tokenizer
        self.unanswerable = False

    def encoder(self) -> Encoder:
        return QaEncoder(self.tokenizer, self.cfg)

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        """Determine whether the training data has unanswerable questions."""
        if previous:
            self.unanswerable = previous["unanswerable"]
        elif train is not None:
            self.unanswerable = bool((train.column("answers") == 0).any())

    def rows(self, store: Store, chosen: np.ndarray | None = None) -> Sequences:
        return pack_chosen(one_per_sequence, store.offsets, chosen)

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        """Build a flat batch with each example's slots (among tokens) and targets (among slots).

        ids     q n c1 c2 E | q n c1 E       pool  2 3 4 7 8       sizes [3, 2]
                                             starts 0 1, ends 1 1: answer c1 c2, and no answer
        """
        batch = lm_batch(store, rows, indices)
        del batch["labels"]
        examples, ends = batch["examples"], batch["cu_seqlens"][1:].astype(np.int64)
        real = examples >= 0
        first = np.where(real, store.column("context_at")[np.maximum(examples, 0)], 0).astype(
            np.int64
        )
        begins = batch["cu_seqlens"][:-1] + first
        targets = {
            name: np.where(real, store.column(column)[np.maximum(examples, 0)] - first, 0)
            for name, column in (("starts", "start"), ("ends", "end"))
        }
        pool = np.concatenate([np.arange(a, b) for a, b in zip(begins, ends, strict=True)])
        return (
            batch
            | targets
            | {"pool": pool, "sizes": (ends - begins).tolist(), "weights": np.float32(real)}
        )

    def count(self, batch: Batch) -> int:
        return int(batch["weights"].sum())

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return (window_losses(self._slots(model, batch), batch) * batch["weights"]).sum()

    def measure(self, model: Model, batch: Batch) -> Columns:
        """Return the loss and the best spans of each window."""
        slots, cfg = self._slots(model, batch), self.cfg
        spans = [
            best_spans(window[:size], cfg.n_best, cfg.max_answer_tokens)
            for window, size in zip(slots.cpu().numpy(), batch["sizes"], strict=True)
        ]
        first, last, scores = (np.stack(column) for column in zip(*spans, strict=True))
        return {
            "example": batch["examples"].cpu().numpy(),
            "loss": window_losses(slots, batch).double().cpu().numpy(),
            "first": first,
            "last": last,
            "score": scores,
        }

    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        # Each question's best span over its windows, scored against the null slot.
        first_windows = np.flatnonzero(store.column("window") == 0)
        bounds = np.searchsorted(columns["example"], np.append(first_windows, len(store)))
        questions = [
            answered(store, int(example), {name: values[a:b] for name, values in columns.items()})
            for example, (a, b) in zip(first_windows, pairwise(bounds), strict=True)
            if a < b  # the others are not evaluated
        ]
        answerable = [bool(question["answers"]) for question in questions]
        may_be_silent = self.unanswerable or not all(answerable)
        for question in questions:
            silent = question["no_answer_score"] > self.cfg.null_threshold
            question["prediction"] = "" if may_be_silent and silent else question["span"]

        rules = score if not all(answerable) else score_v1
        scores = [rules(q["prediction"], q["answers"]) for q in questions]
        metrics = {
            "loss": float(columns["loss"].mean()),
            **summarise(scores, answerable),
            "windows": len(columns["loss"]),
        }
        if not all(answerable):
            spans = [score(q["span"], q["answers"])[1] for q in questions]
            margins = [q["no_answer_score"] for q in questions]
            metrics["best_null_threshold"], metrics["best_f1"] = best_threshold(
                spans, margins, answerable
            )
        predictions = [
            {name: question[name] for name in ("id", "where", "prediction", "answers")}
            | {
                "score": round(-question["no_answer_score"], 4),
                "exact_match": exact,
                "f1": f1,
                "n_best": [
                    {"text": text, "score": round(value, 4)}
                    for text, value in question["n_best"].items()
                ],
            }
            for question, (exact, f1) in zip(questions, scores, strict=True)
        ]
        return metrics, predictions

    def marks(self, batch: Batch) -> tuple[np.ndarray, list[str]]:
        marked, captions, first = np.zeros(len(batch["ids"]), bool), [], 0
        for start, end, size in zip(batch["starts"], batch["ends"], batch["sizes"], strict=True):
            marked[batch["pool"][first + start : first + end + 1]] = True
            null = start == size - 1
            captions.append(
                "no answer: the null slot" if null else f"answer of {end - start + 1} tokens"
            )
            first += size
        return marked, captions

    def describe(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "max_length": cfg.max_length,
            "stride": cfg.stride,
            "max_answer_tokens": cfg.max_answer_tokens,
            "n_best": cfg.n_best,
            "null_threshold": cfg.null_threshold,
            "unanswerable": self.unanswerable,
            "separator": SEPARATOR,
            "null_slot": "a closing eos",
        }

    def notes(self, store: Store) -> list[str]:
        window = np.asarray(store.column("window"))
        several = int((window == 1).sum())
        questions = int((window == 0).sum())
        found = (
            [
                f"{several:,} of {questions:,} contexts are read in several windows: "
                f"{len(store):,} in all"
            ]
            if several
            else []
        )
        start, end = np.asarray(store.column("start")), np.asarray(store.column("end"))
        null = start == np.diff(np.asarray(store.offsets)) - 1
        first = np.flatnonzero(window == 0)
        answered = np.asarray(store.column("answers"))[first] > 0
        lost = int((np.logical_and.reduceat(null, first) & answered).sum()) if len(first) else 0
        long = int((~null & (end - start >= self.cfg.max_answer_tokens)).sum())
        if lost:
            found.append(
                f"{lost:,} answers are whole in no window, so their questions count as unanswered: "
                "raise task.stride or task.max_length"
            )
        if long:
            found.append(
                f"{long:,} answers are longer than task.max_answer_tokens = "
                f"{self.cfg.max_answer_tokens}: they cannot be "
                "found"
            )
        return found

    @staticmethod
    def _slots(model: Model, batch: Batch) -> Tensor:
        """Return logits (B, longest, 2) of each window's slots, -inf after its null slot."""
        outputs = model(**flat_inputs(batch), positions=batch["pool"])
        return pad_sequence(
            list(outputs.split(batch["sizes"])), batch_first=True, padding_value=float("-inf")
        )


def answered(store: Store, example: int, windows: Columns) -> dict[str, Any]:
    """Return a question with its best spans, each text once, the best first.

    Args:
        example: the question's first window.
        windows: of `QaTask.measure`, those of this question.
    """
    question = json.loads(store.blob("question", example))
    window, rank = np.unravel_index(
        np.argsort(-windows["score"], axis=None, kind="stable"), windows["score"].shape
    )
    best: dict[str, float] = {}
    for at in zip(window, rank, strict=True):
        value = float(windows["score"][at])
        if value < NOTHING / 2 or len(best) == SHOWN_ANSWERS:
            break
        # Slots are tokens from the context's first one on; theirs may begin with a blank.
        part = int(windows["example"][at[0]])
        slot = int(store.offsets[part]) + int(store.column("context_at")[part])
        begin = store.column("char_start")[slot + int(windows["first"][at])]
        end = store.column("char_end")[slot + int(windows["last"][at])]
        if text := question["context"][begin:end].strip():  # blanks alone are no answer
            best.setdefault(text, value)
    span = next(iter(best), "")
    return {
        "id": question["id"],
        "where": question["where"],
        "answers": question["answers"],
        "span": span,
        "no_answer_score": -best.get(span, NOTHING),
        "n_best": best,
    }


def window_losses(slots: Tensor, batch: Batch) -> Tensor:
    """Return (B,): the mean of start and end cross-entropy over each window's slots."""
    start = F.cross_entropy(slots[..., 0], batch["starts"], reduction="none")
    return (start + F.cross_entropy(slots[..., 1], batch["ends"], reduction="none")) / 2


def best_spans(
    window: np.ndarray, n_best: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the `n_best` valid spans of a window, best first.

    Returns first slots, last slots and scores against the null slot. Valid: start <= end, at most
    `max_tokens` long, on context tokens. Candidates are the `n_best` starts and ends.

    Args:
        window: (slots, 2) start and end logits, the null slot last.
    """
    null, context = window[-1].sum(), window[:-1]
    starts, ends = (np.argsort(-context[:, side], kind="stable")[:n_best] for side in (0, 1))
    first, last = (grid.ravel() for grid in np.meshgrid(starts, ends, indexing="ij"))
    valid = (first <= last) & (last - first < max_tokens)
    first, last = first[valid], last[valid]
    scores = context[first, 0] + context[last, 1] - null
    order = np.argsort(-scores, kind="stable")[:n_best]
    missing = (0, n_best - len(order))
    return (
        np.pad(first[order], missing).astype(np.int32),
        np.pad(last[order], missing).astype(np.int32),
        np.pad(scores[order], missing, constant_values=NOTHING).astype(np.float32),
    )
