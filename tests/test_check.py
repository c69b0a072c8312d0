"""Bounds and choices stand beside their fields, and `check` enforces each of them."""

from __future__ import annotations

import math
from dataclasses import MISSING

import pytest

from finetune.check import check, value_problems
from finetune.compose import compose_train
from finetune.config import Config, Limits, OptimConfig, QaConfig, TrainConfig, schema_keys
from finetune.errors import UserError

LIMITED = {
    key: (owner, item) for key, owner, item in schema_keys(Config) if "limits" in item.metadata
}


def refusal(key: str, value: object) -> UserError | None:
    """Return the problem of one value, in a section that has its defaults otherwise."""
    owner, item = LIMITED[key]
    section = owner()
    setattr(section, item.name, value)
    return next(value_problems(section, key.removesuffix(item.name)), None)


@pytest.mark.parametrize("key", LIMITED)
def test_defaults_and_proposed_values_are_allowed_and_others_are_not(key):
    _, item = LIMITED[key]
    limits: Limits = item.metadata["limits"]
    assert item.default is not MISSING and refusal(key, item.default) is None
    for value in limits.choices:
        assert refusal(key, value) is None
    error = refusal(key, "something else")
    assert error and error.problem.startswith(f"{key} = something else ")
    if limits.suggest is None:
        assert (
            error.remedy == f"Choose from {', '.join(str(one).lower() for one in limits.choices)}."
        )
        return
    assert refusal(key, limits.suggest) is None and error.remedy == f"Try {key}={limits.suggest}."
    outside = [
        limits.at_least - 1,
        limits.above,
        limits.at_most + 1,
        limits.below,
        math.nan,
        math.inf,
        -math.inf,
    ]
    assert all(refusal(key, value) for value in outside)
    assert all(
        refusal(key, value) is None
        for value in (limits.at_least, limits.at_most)
        if math.isfinite(value)
    )


def test_the_settings_with_limits_were_found():
    assert {
        "model.attn_pdrop",
        "task.problem",
        "adapter.rank",
        "zero.stage",
        "optim.lr",
        "train.micro_batch",
        "checkpoint.keep",
        "tracker.wandb.mode",
        "sweep.trials",
    } <= set(LIMITED)


@pytest.mark.parametrize(
    ("section", "prefix", "problem", "remedy"),
    [
        (
            TrainConfig(micro_batch="lots"),
            "train.",
            "train.micro_batch = lots must be at least 1, or auto",
            "Try train.micro_batch=1.",
        ),
        (
            OptimConfig(lr=math.inf),
            "optim.",
            "optim.lr = inf must be above 0 and finite",
            "Try optim.lr=0.0001.",
        ),
        (
            OptimConfig(min_lr=2.0),
            "optim.",
            "optim.min_lr = 2.0 must be at least 0 and at most 1",
            "Try optim.min_lr=0.0.",
        ),
        (
            QaConfig(n_best=0),
            "task.",
            "task.n_best = 0 must be at least 1",
            "Try task.n_best=20.",
        ),
    ],
)
def test_the_words_of_a_refusal(section, prefix, problem, remedy):
    (error,) = value_problems(section, prefix)
    assert (error.problem, error.remedy) == (problem, remedy)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.steps=null", "train.epochs=null"], "neither train.steps nor train.epochs"),
        (["task=qa", "task.stride=300", "task.max_length=512"], "task.stride = 300 must be less"),
        (["optim.betas=[0.9]"], "optim.betas = [0.9] must be two numbers"),
        (["checkpoint.best=true", "data.eval=null"], "checkpoint.best needs data.eval"),
        (["train.early_stopping=2", "train.eval_every=0"], "train.early_stopping needs data.eval"),
        (["checkpoint.final=none", "export.enabled=false"], "leave nothing of the trained model"),
        (["resume=nowhere"], "resume = nowhere is neither auto, never, nor a directory"),
        (["adapter.targets=[q_proj,lm_head]"], "GPT-J has no module 'lm_head'"),
        (["task.max_length=4"], "task.max_length = 4 is too short"),
        (["task=classify", "task.label_separator=comma"], "task.label_separator has no meaning"),
        (["data.train=null"], "no training data is given"),
        (
            ["adapter=full", "model.quantize=nf4"],
            "model.quantize = nf4 freezes the weights that adapter=full trains",
        ),
        (["adapter.modules_to_save=[lm_head]", "task=classify"], "lm_head cannot be trained whole"),
        (["task.tokens=[<a>,<a>]"], "task.tokens has <a> more than once"),
        (["task.tokens=[' ']"], "task.tokens: ' ' is empty, or begins or ends with a space"),
        (["task.tokens=[<a>]", "adapter=ia3"], "peft combines with LoRA and not with ia3"),
        (["task=instruct", "task.template=chatml", "adapter=prompt"], "and not with prompt"),
        (["task.tokens=[<a>]", "adapter=dora"], "DoRA would rescale all of them"),
        (["adapter.layers=some"], "adapter.layers = some is no list of blocks"),
        (["adapter.init=pissa", "adapter=dora"], "cannot be combined with adapter.dora=true"),
        (["adapter.init=olora", "model.quantize=nf4"], "be combined with model.quantize=nf4"),
        (["task=preference", "task.template=none.jinja"], "none.jinja"),
        (["task=preference", "task.loss=ipo", "task.label_smoothing=0.1"], "for task.loss=ipo"),
        (["task=classify", "task.class_weights=[0,0]"], "must not be negative, nor all zero"),
        (["task=classify", "task.class_weights=[a]"], "is neither balanced nor a list of numbers"),
        (
            ["task=classify", "task.problem=multi_label", "task.class_weights=balanced"],
            "task.class_weights=balanced is for texts with one label each",
        ),
    ],
)
def test_rules_of_several_settings(words, problem):
    with pytest.raises(UserError) as caught:
        check(compose_train(["recipe=quickstart", *words]), world_size=1, cuda=False)
    text = str(caught.value)
    assert text.startswith("1 problem in the configuration:") and problem in text
