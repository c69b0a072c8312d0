"""Reward models against TRL's trainer and the formula on Hugging Face's classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from task_setup import CPU, EOS, assert_same_gradients, evaluate_on, models
from test_tasks_preference import ROWS, SIDES, documents, padded, trl

from finetune.config import RewardConfig
from finetune.errors import UserError
from finetune.tasks.base import to_device
from finetune.tasks.preview import preview

MARGINS = [0.0, 0.5, 1.0, 0.0]


def cfg(**options) -> RewardConfig:
    return RewardConfig(**{"template": "plain", "max_length": 64, **options})


def with_margins(rows=ROWS):
    return [row | {"margin": margin} for row, margin in zip(rows, MARGINS, strict=True)]


def rewards_of(model, pairs) -> torch.Tensor:
    """(P, 2) at the last token of each document alone."""
    rows = [pair["prompt_ids"] + pair[side] for pair in pairs for side in SIDES]
    return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in rows]).view(-1, 2)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("margins", [True, False])
def test_loss_and_gradients(make, packing, margins):
    made = make(cfg(), with_margins() if margins else ROWS, packing=packing)
    assert (made.task.head, made.task.num_labels) == ("classify", 1)
    ours, theirs = models("classify", num_labels=1)
    both = rewards_of(theirs, documents(made))
    wanted = -F.logsigmoid(both[:, 0] - both[:, 1] - torch.tensor(MARGINS) * margins).mean()
    found = made.loss(ours) / made.task.count(made.batch())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    parts = [made.loss(ours, [i]) for i in range(len(made.rows))] + [made.loss(ours, [])]
    torch.testing.assert_close(sum(parts) / 4, wanted, rtol=1e-5, atol=1e-6)
    found.backward()
    wanted.backward()
    assert_same_gradients(ours, theirs)


def test_trls_reward_trainer(make):
    pytest.importorskip("trl", "1.16")
    made = make(cfg(), with_margins())
    ours, theirs = models("classify", num_labels=1)
    theirs.config.pad_token_id = (
        EOS - 1
    )  # pooling there looks for the last token that is no padding
    rows = [pair["prompt_ids"] + pair[side] for side in SIDES for pair in documents(made)]
    inputs = {
        "input_ids": padded(rows, EOS - 1),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "margin": torch.tensor(MARGINS),
    }

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.training = False

        def forward(self, margin, **inputs):
            return theirs(**inputs)

    trainer = trl("reward", Model(), args=type("Args", (), {"center_rewards_coefficient": None}))
    wanted = trainer.compute_loss(trainer.model, inputs)
    found = made.loss(ours) / 4
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.backward()
    wanted.backward()
    assert_same_gradients(ours, theirs)
    alone, _ = evaluate_on(1, ours.eval(), made)
    for name in ("accuracy", "margin"):
        assert alone[0][name] == pytest.approx(trainer._metrics["eval"][name][0], abs=1e-5)


def test_evaluation_is_the_same_on_any_number_of_ranks(make):
    made = make(cfg(), with_margins(), packing=False)
    ours, theirs = models("classify", num_labels=1)
    alone, predictions = evaluate_on(1, ours.eval(), made, 1)
    many, also = evaluate_on(3, ours, made, 1)
    assert predictions == also and all(metrics == alone[0] for metrics in many)
    both = rewards_of(theirs, documents(made)).tolist()
    assert [[row["chosen_reward"], row["rejected_reward"]] for row in predictions] == [
        pytest.approx(pair, abs=1e-5) for pair in both
    ]
    assert made.task.figures == {} and made.loss(ours, [0]) > 0
    accuracy = [float(made.task.figures["accuracy"])]
    batch = to_device(made.batch([0]), CPU)
    chosen, rejected = made.task.rewards(ours, batch)[0].tolist()
    assert accuracy == [float(chosen > rejected)]


def test_a_preview_shows_the_tokens_that_are_read(make):
    made = make(cfg(), ROWS[2:3])
    shown = preview(made.task, made.store, made.rows, made.task.tokenizer, 2)
    assert shown.count("⟦<|endoftext|>⟧") == 2 and "tokens, rejected" in shown


def test_a_margin_is_a_number(make):
    with pytest.raises(UserError, match="field 'margin' is 'wide', not a number") as error:
        make(cfg(), [ROWS[0] | {"margin": "wide"}])
    assert "task.margin_field=null" in error.value.remedy
    assert make(cfg(margin_field=None), [ROWS[0] | {"margin": "wide"}])
