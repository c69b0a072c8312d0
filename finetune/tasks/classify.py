"""Sequence classification: one label, several labels or a number per text, at its last token.

labelled texts (`data.labels`) -> one per row -> head at the position of the closing eos -> loss per
example.

The loss of an example, and the trainer's divisor of the sum:

    single_label   weight[y] * cross-entropy      sum of weight[y]: as CrossEntropyLoss of torch.nn
    multi_label    mean over labels of weight * binary cross-entropy         examples
    regression     squared error                                             examples

Label names are learnt from the training data (or an export), sorted. Metrics are in
`classify_metrics`.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.check import refuse_task
from finetune.config import ClassifyConfig
from finetune.data.collate import lm_batch
from finetune.data.columns import Store
from finetune.data.encode_classify import (
    LAST_TOKEN,
    NO_ZEROS_AND_ONES,
    SEPARATOR,
    ClassifyEncoder,
    PlainText,
    label_key,
    refuse_double_spellings,
    sort_names,
    unseen,
)
from finetune.data.packing import Sequences, one_per_sequence, pack_chosen
from finetune.errors import UserError, plural
from finetune.tasks.base import Batch, Columns, Model, Task, cut_note, flat_inputs
from finetune.tasks.classify_metrics import (
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)

BALANCED = "balanced"
"""task.class_weights by which every class weighs the same in all."""


class ClassifyTask(Task):
    head = "classify"

    def __init__(self, cfg: ClassifyConfig, tokenizer):
        refuse_task(cfg)
        self.cfg, self.tokenizer = cfg, tokenizer
        self.regression, self.multi = cfg.problem == "regression", cfg.problem == "multi_label"
        self.num_labels = 1 if self.regression else None
        self.names: list[str] | None = None
        self.by_index = False
        self.plain: PlainText | None = None
        self.class_weights: list[float] | None = (
            None if cfg.class_weights == BALANCED else cfg.class_weights
        )
        """Loss weights of the classes; of `balanced` ones only `prepare` knows them."""
        self._targets = lru_cache(4)(self._target_table)
        if cfg.labels:
            self._learn(
                [str(name).lower() if isinstance(name, bool) else str(name) for name in cfg.labels],
                by_index=True,
            )

    def encoder(self) -> ClassifyEncoder:
        return ClassifyEncoder(self.tokenizer, self.cfg, self.names, self.by_index, self.plain)

    def text_ids(self, texts: list[str]) -> list[int]:
        """Return the ids of one text or a pair as `encoder` builds them; the last id is pooled.

        Raises:
            UserError: there are no ids.
        """
        ids = self._encoder.text_ids([texts])[0][0]
        if not ids:
            raise UserError("the text is empty: there is no token to judge", "text", "Give a text.")
        return ids

    @cached_property
    def _encoder(self) -> ClassifyEncoder:
        return self.encoder()

    def prepare(self, train: Store | None, previous: dict | None) -> None:
        if previous and previous.get("pooling") == LAST_TOKEN:
            self.plain = PlainText(self.tokenizer, previous.get("pad_token_id"))
            if self.cfg.truncation != "head":
                raise UserError(
                    f"task.truncation = {self.cfg.truncation}, and this classifier was not trained "
                    "here: its texts are cut by its own tokenizer",
                    "task.truncation",
                    "Leave it out.",
                )
        if self.regression:
            return
        if previous:
            # The default names of transformers give way to those that the user gives.
            defaults = [f"LABEL_{i}" for i in range(len(self.names or []))]
            names = previous["labels"]
            if self.names and names == defaults:
                names = self.names
            elif self.cfg.labels and [*map(label_key, self.names or [])] != [
                *map(label_key, names)
            ]:
                raise UserError(
                    f"task.labels = {self.names}, but the model was trained with {names}",
                    "task.labels",
                    "Leave task.labels away: the model carries its names.",
                )
            self._learn(names, previous["labels_by_index"])
        elif self.names is None:
            assert train is not None
            rows = [json.loads(row) if self.multi else [row] for row in train.names("label")]
            names = {name for row in rows for name in row}
            if self.multi and names == {"0", "1"} and all(len(row) != 1 for row in rows):
                where = train.blob("where", 0).decode()
                raise UserError(
                    f"field '{self.cfg.label_field}' holds a 0 and a 1 in every row: zeros and "
                    "ones, not labels",
                    where,
                    NO_ZEROS_AND_ONES,
                )
            refuse_double_spellings(list(names), self.cfg.label_field)
            self._learn(sort_names(list(names)), by_index=False)
        if self.cfg.class_weights == BALANCED:
            kept = (previous or {}).get("class_weights")
            self.class_weights = kept if train is None else self._balanced(train)

    def _balanced(self, train: Store) -> list[float]:
        """Return examples / (classes x examples of the class); 0 for a class without examples."""
        assert self.names is not None
        counts = np.bincount(self._targets(train), minlength=len(self.names))
        return [len(train) / (len(counts) * n) if n else 0.0 for n in counts.tolist()]

    def rows(self, store: Store, chosen: np.ndarray | None = None) -> Sequences:
        """Return rows of one example each.

        Raises:
            UserError: the data has a label that the head has no output for.
        """
        self._targets(store)
        return pack_chosen(one_per_sequence, store.offsets, chosen)

    def collate(self, store: Store, rows: Sequences, indices: list[int]) -> Batch:
        """Build a flat batch with each example's pooled position, target and weight.

            ids   a b c E | d E      pool 3 5      targets 0 1      weights 1 1

        Without rows: the single token of an empty batch, with weight 0.
        """
        batch = lm_batch(store, rows, indices)
        del batch["labels"]
        examples = batch["examples"]
        targets = self._targets(store)[np.maximum(examples, 0)]
        weights = np.float32(examples >= 0)
        if self.class_weights and not self.multi:
            weights *= np.array(self.class_weights, np.float32)[targets]
        pool = batch["cu_seqlens"][1:].astype(np.int64) - 1
        return batch | {"pool": pool, "targets": targets, "weights": weights}

    def count(self, batch: Batch) -> float:
        """Return the number of examples, or the sum of their class weights."""
        return float(batch["weights"].sum(dtype=np.float64))

    def loss(self, model: Model, batch: Batch) -> Tensor:
        outputs = model(**flat_inputs(batch), positions=batch["pool"])
        return (self.losses(outputs, batch["targets"]) * batch["weights"]).sum()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the unweighted loss of each example, (B,), from outputs (B, labels).

        Weights of single labels are in `weights`.
        """
        match self.cfg.problem:
            case "single_label":
                return F.cross_entropy(outputs, targets, reduction="none")
            case "multi_label":
                weight = (
                    torch.tensor(self.class_weights, device=outputs.device)
                    if self.class_weights
                    else None
                )
                return F.binary_cross_entropy_with_logits(
                    outputs, targets, weight=weight, reduction="none"
                ).mean(-1)
            case _:
                return (outputs[:, 0] - targets).square()

    def measure(self, model: Model, batch: Batch) -> Columns:
        """Return each example's loss, weight, target, decision and score."""
        outputs = model(**flat_inputs(batch), positions=batch["pool"])
        decided, score = decide(outputs, self.cfg.problem)
        columns = {
            "example": batch["examples"],
            "loss": self.losses(outputs, batch["targets"]).double(),
            "weight": batch["weights"].double(),
            "target": batch["targets"],
            "decided": decided,
            "score": score,
        }
        return {name: values.cpu().numpy() for name, values in columns.items()}

    def metrics(self, store: Store, columns: Columns) -> tuple[dict[str, Any], list | None]:
        examples, decided, targets, weights = (
            columns[name] for name in ("example", "decided", "target", "weight")
        )
        loss = float((columns["loss"] * weights).sum() / max(weights.sum(), 1e-12))
        if self.regression:
            # The store's own numbers: fp32 targets would be rounded.
            figures = regression_metrics(np.asarray(store.column("label"))[examples], decided)
        else:
            by_problem = multi_label_metrics if self.multi else single_label_metrics
            figures = by_problem(targets, decided, self.names or [])
        predictions = [
            {
                "where": store.blob("where", int(example)).decode(),
                "prediction": self.read_target(decision),
                "label": self.read_target(target),
                "score": np.round(score.astype(float), 6).tolist(),
            }
            for example, decision, target, score in zip(
                examples, decided, targets, columns["score"], strict=True
            )
        ]
        return {"loss": loss, **figures}, predictions

    def marks(self, batch: Batch) -> tuple[np.ndarray, list[str]]:
        captions = []
        for target, weight in zip(batch["targets"], batch["weights"].tolist(), strict=True):
            label = json.dumps(self.read_target(target), ensure_ascii=False)
            captions.append(f"target {label}" + (f", weight {weight:g}" if weight != 1 else ""))
        return np.isin(np.arange(len(batch["ids"])), batch["pool"]), captions

    def describe(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "problem": cfg.problem,
            "labels": self.names,
            "labels_by_index": self.by_index,
            "class_weights": self.class_weights,
            "max_length": cfg.max_length,
            "truncation": cfg.truncation,
            "pair_separator": SEPARATOR,
            **(
                {"pooling": LAST_TOKEN, "pad_token_id": self.plain.pad}
                if self.plain
                else {"pooling": "a closing eos, by position"}
            ),
        }

    def notes(self, store: Store) -> list[str]:
        return cut_note(
            store, f"texts lost tokens (truncation {self.cfg.truncation})", self.cfg.max_length
        )

    def read_target(self, value: np.ndarray) -> Any:
        """Convert a target or decision to a number, a label, or a list of labels."""
        if self.regression:
            return float(value)
        assert self.names is not None
        return (
            [self.names[i] for i in np.flatnonzero(value)] if self.multi else self.names[int(value)]
        )

    def _learn(self, names: list[str], by_index: bool) -> None:
        """Take the names of the labels, in the order of the head's outputs.

        Raises:
            UserError: they are too few, or repeated, or do not agree with task.class_weights.
        """
        if len(names) < (1 if self.multi else 2):
            field = self.cfg.label_field
            raise UserError(
                f"{plural(len(names), 'label')} ({', '.join(names) or 'none'}): there is "
                "nothing to tell apart",
                "task.label_field",
                f"Check that task.label_field={field} is the label, or name all: task.labels=[...]",
            )
        if len(set(names)) != len(names):
            raise UserError(
                f"task.labels = {names} names a label twice", remedy="Name each label once."
            )
        weights = self.class_weights
        if weights and len(weights) != len(names):
            raise UserError(
                f"task.class_weights has {len(weights)} numbers for {len(names)} labels "
                f"({', '.join(names)})",
                remedy=f"Try task.class_weights={[1.0] * len(names)}.",
            )
        self.names, self.by_index, self.num_labels = names, by_index, len(names)

    def _target_table(self, store: Store) -> np.ndarray:
        """Return all targets: (N,) class index or number, or (N, labels) zeros and ones."""
        column = store.column("label")
        if self.regression:
            return np.asarray(column, np.float32)
        assert self.names is not None, "prepare comes first"
        index = {name: i for i, name in enumerate(self.names)}
        by_category = [
            [index.get(name, -1) for name in (json.loads(row) if self.multi else [row])]
            for row in store.names("label")
        ]
        for category, row in enumerate(by_category):
            if -1 in row:
                names = store.names("label")[category]
                name = (json.loads(names) if self.multi else [names])[row.index(-1)]
                example = int(np.argmax(column == category))
                where = store.blob("where", example).decode()
                raise unseen(name, self.names, self.by_index, where)
        if not self.multi:
            return np.array(by_category, np.int64)[:, 0][column]
        table = np.zeros((len(by_category), len(self.names)), np.float32)
        for category, row in enumerate(by_category):
            table[category, row] = 1
        return table[column]


def decide(outputs: Tensor, problem: str) -> tuple[Tensor, Tensor]:
    """Return (decision, score) of each example.

    By problem: the class and its probability; the labels above one half and all probabilities; the
    number.
    """
    match problem:
        case "single_label":
            probability, choice = outputs.softmax(-1).max(-1)
            return choice, probability
        case "multi_label":
            return outputs > 0, outputs.sigmoid()
        case _:
            return outputs[:, 0].double(), outputs[:, 0]
