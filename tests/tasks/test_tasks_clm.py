"""Plain text: evaluation in all and per subset, against Hugging Face's GPT-J one document at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from task_setup import EOS, evaluate_on, models

from finetune.config import ClmConfig

TEXTS = [
    ("A", "The Senate met."),
    ("B", "Rates of growth, by year:"),
    ("A", "It adjourned at noon until the following day."),
    ("C", "x"),
    ("B", "Total 1 2 3 4 5 6 7 8 9"),
    ("A", "Mr. Adams spoke."),
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_perplexity_per_subset(make, tokenizer, ranks, packing):
    rows = [{"text": text, "meta": {"pile_set_name": name}} for name, text in TEXTS]
    made = make(ClmConfig(max_length=16), rows, packing=packing)
    ours, theirs = models("lm", seed=2)
    found, _ = evaluate_on(ranks, ours, made)
    sums: dict[str, list[float]] = {}
    for piece, target, name in _pieces(tokenizer, packing):
        logits = theirs(input_ids=torch.tensor([piece])).logits[0]
        loss = F.cross_entropy(
            logits, torch.tensor(target), ignore_index=-100, reduction="sum"
        ).item()
        total = sums.setdefault(name, [0.0, 0])
        total[0], total[1] = total[0] + loss, total[1] + sum(t >= 0 for t in target)
    for metrics in found:
        assert {name: row["tokens"] for name, row in metrics["subsets"].items()} == {
            n: c for n, (_, c) in sums.items() if c
        }
        for name, (loss, count) in sums.items():
            if count:
                assert metrics["subsets"][name]["loss"] == pytest.approx(loss / count, rel=1e-5)
                assert metrics["subsets"][name]["perplexity"] == pytest.approx(
                    math.exp(loss / count), rel=1e-4
                )
        whole = sum(loss for loss, _ in sums.values()) / sum(count for _, count in sums.values())
        assert metrics["loss"] == pytest.approx(whole, rel=1e-5)
        assert metrics["perplexity"] == pytest.approx(math.exp(whole), rel=1e-4)


def _pieces(tokenizer, packing: bool):
    """(ids, targets, subset) of every stretch that is read at once: rows of 16 tokens cut documents, packed or each alone."""
    documents = [(name, [*tokenizer(text)["input_ids"], EOS]) for name, text in TEXTS]
    position = 0
    for name, ids in documents:
        start = 0
        while start < len(ids):
            room = 16 - (position % 16 if packing else 0)
            end = min(len(ids), start + room)
            targets = [ids[i + 1] if i + 1 < len(ids) else -100 for i in range(start, end)]
            yield ids[start:end], targets, name
            position, start = position + end - start, end


def test_rows_carry_their_subset_by_any_field(make):
    rows = [{"text": text, "source": name} for name, text in TEXTS]
    made = make(ClmConfig(max_length=16, subset_field="source"), rows)
    (metrics,), _ = evaluate_on(1, models("lm")[0], made)
    assert set(metrics["subsets"]) == {"A", "B", "C"} and json.dumps(metrics)
