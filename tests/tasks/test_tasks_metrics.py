"""What ranks evaluations: every metric that can be named is one that evaluations have, and its better end is right."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.check import check
from finetune.compose import compose_train
from finetune.config import METRICS, ClassifyConfig, InstructConfig, QaConfig, best_metric
from finetune.errors import UserError
from finetune.tasks.classify_metrics import (
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)
from finetune.tasks.clm import lm_metrics
from finetune.tasks.squad_metrics import score, summarise
from finetune.training.answers import text_metrics

CLASSES, FLAGS, NUMBERS = (
    np.array([0, 1, 2, 1]),
    np.array([[1, 0], [0, 1], [1, 1]]),
    np.array([0.0, 1.0, 4.0]),
)


def of_classes(right: bool) -> dict:
    return single_label_metrics(CLASSES, CLASSES if right else (CLASSES + 1) % 3, ["a", "b", "c"])


def of_flags(right: bool) -> dict:
    return multi_label_metrics(FLAGS, FLAGS if right else 1 - FLAGS, ["a", "b"])


def of_numbers(right: bool) -> dict:
    return regression_metrics(NUMBERS, NUMBERS if right else -NUMBERS)


def of_answers(right: bool) -> dict:
    return summarise([score("the cat" if right else "a dog", ["cat"])], [True])


def of_tokens(right: bool) -> dict:
    said = "the cat sat on the mat" if right else "the cat sat under a tree"
    answered = text_metrics([said], ["the cat sat on the mat"])
    return lm_metrics(1.0 if right else 9.0, 2) | answered


@pytest.mark.parametrize(
    ("kind", "evaluated"),
    [
        ("single_label", of_classes),
        ("multi_label", of_flags),
        ("qa", of_answers),
        ("regression", of_numbers),
        ("clm", of_tokens),
        ("instruct", of_tokens),
    ],
)
def test_each_metric_is_measured_and_its_better_end_is_right(kind, evaluated):
    good, bad = evaluated(right=True) | {"loss": 0.5}, evaluated(right=False) | {"loss": 4.5}
    for name, better in METRICS[kind].items():
        assert (good[name] > bad[name]) == (better == "max"), name


def test_the_task_has_a_metric_of_its_own_and_the_user_may_choose_another():
    assert best_metric(InstructConfig(), None) == ("loss", "min")
    assert best_metric(ClassifyConfig(), None) == ("accuracy", "max")
    assert best_metric(ClassifyConfig(problem="multi_label"), None) == ("f1", "max")
    assert best_metric(ClassifyConfig(problem="regression"), None) == ("mse", "min")
    assert best_metric(QaConfig(), None) == ("f1", "max")
    assert best_metric(ClassifyConfig(), "loss") == ("loss", "min")
    assert best_metric(QaConfig(), "exact_match") == ("exact_match", "max")


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        (["recipe=quickstart", "train.metric=accuracy"], "Choose from loss, perplexity"),
        (["recipe=classify_lora", "train.metric=mse"], "Choose from accuracy, f1, loss"),
        (
            ["recipe=classify_lora", "task.problem=regression", "train.metric=accuracy"],
            "Choose from mse, pearson, loss",
        ),
        (["recipe=qa_lora", "train.metric=em"], "Choose from f1, exact_match, loss"),
    ],
)
def test_a_metric_that_the_task_has_not_is_refused_with_those_it_has(words, choice):
    with pytest.raises(UserError) as caught:
        check(compose_train([*words, "data.train=t.jsonl", "data.eval=e.jsonl"]), 1, False)
    assert words[-1].replace("=", " = ") in str(caught.value) and choice in str(caught.value)
