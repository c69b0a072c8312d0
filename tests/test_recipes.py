"""Every recipe composes, is valid, states itself, and trains two steps under debug=tiny."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from finetune.check import check, planning_problems
from finetune.cli.app import compose_config
from finetune.cli.help import first_comment
from finetune.compose import RECIPES, compose_train, compose_words, settle
from finetune.config import SCHEDULES, OptimConfig
from finetune.errors import UserError
from finetune.training.inputs import absent
from finetune.training.schedule import learning_rate, warmup_note
from tests.distributed.ranks import metrics, run_cases

ALL = sorted(p.stem for p in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize(
    "word",
    [
        "optim.lr=0",
        "optim.lr=nan",
        "optim.lr=inf",
        "optim.eps=-1",
        "optim.weight_decay=nan",
        "adapter.alpha=0",
        "zero.bucket_elements=0",
        "data.max_bad_rows=-1",
        "optim.grad_clip=-1",
    ],
)
def test_numbers_that_train_nothing_or_never_end_are_refused(word):
    with pytest.raises(UserError, match=f"1 problem in the configuration:\n  {word.split('=')[0]}"):
        check(compose_train(["recipe=quickstart", word]), world_size=1, cuda=False)


def test_some_recipes_were_found():
    assert {
        "quickstart",
        "clm_pile",
        "clm_pile_lora",
        "instruct_lora",
        "classify_lora",
        "qa_lora",
    } <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_composes_and_is_valid(name):
    cfg = compose_train([f"recipe={name}", "data.train=x.jsonl"])
    assert cfg.name == name
    check(cfg, world_size=1, cuda=True)


@pytest.mark.parametrize("name", ALL)
def test_header_states_purpose_command_and_hardware(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert (
        text.startswith("# @package _global_") and len(first_comment(RECIPES / f"{name}.yaml")) > 20
    )
    assert "# Command" in text and f"recipe={name}" in text and "# Hardware" in text


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    # Verified exports of language models are in tests/launch and tests/export.
    run_cases(
        1,
        [
            [
                f"recipe={name}",
                "debug=tiny",
                "train.steps=2",
                f"run_dir={root / name}",
                "train.threads=1",
                "data.max_rows=12",
                f"export.verify={str(name in ('classify_lora', 'qa_lora')).lower()}",
            ]
            for name in ALL
        ],
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_trains_two_steps_under_debug_tiny(tiny_runs, name):
    result = json.loads((tiny_runs / name / "result.json").read_text())
    assert result["status"] == "done" and result["step"] == 2 and result["export"] == "export"
    assert len(metrics(tiny_runs / name)) == 2 and result["eval"]


def test_the_command_line_decides_between_steps_and_epochs():
    assert compose_train(["recipe=quickstart", "train.epochs=2"]).train.steps is None
    assert compose_train(["recipe=clm_pile", "train.steps=7"]).train.epochs is None
    both = compose_train(["recipe=clm_pile", "train.steps=7", "train.epochs=2"]).train
    assert (both.steps, both.epochs) == (7, 2)


def test_all_problems_at_once():
    cfg = compose_train(
        [
            "recipe=quickstart",
            "task.max_length=4096",
            "train.global_batch=50",
            "optim.schedule=zigzag",
            "zero=stage2",
            "zero.offload_params=cpu",
        ]
    )
    with pytest.raises(UserError) as caught:
        check(cfg, world_size=8, cuda=False)
    text = str(caught.value)
    assert text.startswith("4 problems in the configuration:")
    assert (
        "train.global_batch = 50 is not a multiple of train.micro_batch x ranks = 4 x 8 = 32"
        in text
    )
    assert "Try train.global_batch=64" in text and "Try task.max_length=2048." in text


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["task.max_length=256"],
            "task.max_length = 256 exceeds the model's 128 positions (n_positions in its config.json)",
        ),
        (["task.max_length=3000"], "task.max_length = 3000 exceeds the model's 128 positions"),
        (
            ["adapter=prefix", "adapter.virtual_tokens=20", "task.max_length=120"],
            "adapter.virtual_tokens = 20 and task.max_length = 120 exceed the model's 128 positions",
        ),
    ],
)
def test_sequences_fit_the_model_and_not_only_gptj(tmp_path, words, problem):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gptj",
                "n_embd": 32,
                "n_layer": 1,
                "n_head": 2,
                "vocab_size": 50400,
                "n_positions": 128,
            }
        )
    )
    cfg = compose_train(
        ["recipe=quickstart", f"model.path={tmp_path}", "model.init=random", *words]
    )
    for refuse in (
        lambda: check(cfg, 1, False, absent),
        lambda: planning_problems(cfg, 1, False, 128),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        text = str(caught.value)
        assert text.startswith("1 problem") and problem in text
        assert f"Try task.max_length={108 if 'adapter=prefix' in words else 128}." in text
    check(
        compose_train(["recipe=quickstart", f"model.path={tmp_path}", "task.max_length=128"]),
        1,
        False,
        absent,
    )
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("128", "4096")
    )
    check(cfg, 1, False, absent)  # longer than GPT-J's own 2048


@pytest.mark.parametrize(
    "words",
    [
        ["train.eval_batch=0"],
        ["train.eval_batch=-1"],
        ["train.early_stopping=-1"],
        ["train.sample_prompts=[]"],
        ["task.problem=odd", "task=classify"],
        ["task.class_weights=[0,-1]", "task=classify"],
        ["task.n_best=0", "task=qa"],
        ["task.truncation=tail", "task=classify"],
        ["task.format=odd", "task=instruct"],
        ["task.template=odd", "task=instruct"],
        ["tracker.wandb.mode=sometimes"],
        ["train.activation_checkpointing=some"],
        ["train.max_skipped=-1"],
        ["train.max_time=-1"],
        ["train.neftune_alpha=-5"],
        ["optim.cycles=0"],
        ["optim.decay=-0.1"],
        ["adapter.lr_ratio=0"],
        ["adapter.init=svd"],
        ["adapter.layers=last"],
        ["adapter.modules_to_save=[h]"],
        ["task.class_weights=even", "task=classify"],
        ["task.class_weights=balanced", "task=classify", "task.problem=multi_label"],
    ],
)
def test_numbers_that_would_fail_later_are_refused_now(words):
    with pytest.raises(UserError) as caught:
        check(compose_train(["recipe=quickstart", *words]), world_size=1, cuda=False)
    assert words[0].split("=")[0] in str(caught.value) and re.search(
        r"(Try|Choose) ", str(caught.value)
    )


def test_adapter_key_of_another_kind_is_refused():
    with pytest.raises(UserError, match="Key 'rank' not in 'FullConfig'"):
        compose_config(["recipe=quickstart", "adapter=full", "adapter.rank=4"])


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("qa_lora", "lora"),
        ("qa_lora", "rslora"),
        ("qa_lora", "dora"),
        ("qa_lora", "ia3"),
        ("qa_lora", "prompt"),
        ("qa_lora", "prefix"),
        *((n, "full") for n in ALL),
    ],
)
def test_any_recipe_takes_any_adapter(name, adapter):
    """A recipe's numbers for its own kind fall away; those for the same kind stay."""
    cfg = compose_train([f"recipe={name}", f"adapter={adapter}"]).adapter
    if adapter in ("lora", "rslora", "dora"):
        assert (cfg.rank, cfg.targets) == (16, "all-linear")
        assert (cfg.rslora, cfg.dora) == (adapter == "rslora", adapter == "dora")
    else:
        assert type(cfg).__name__ == f"{adapter.title()}Config" and cfg == type(cfg)()


@pytest.mark.parametrize(
    ("train", "kept"),
    [("data/not/fetched.jsonl.zst", False), ("mine/*.jsonl", True), ("me/set", True)],
)
def test_debug_replaces_only_a_recipe_s_file_that_is_not_there(train, kept):
    """Globs, directories and hub ids are the recipe's own business: were they replaced, nobody would notice."""
    for words, stays in (["recipe=quickstart"], kept), ([f"data.train={train}"], True):
        composed = compose_words([*words, "debug=tiny"])
        composed.config.data.train = train
        assert (settle(composed).data.train == train) == stays


def test_any_recipe_takes_any_task():
    task = compose_train(["recipe=qa_lora", "task=classify", "task.truncation=head_tail"]).task
    assert (type(task).__name__, task.max_length, task.truncation) == (
        "ClassifyConfig",
        512,
        "head_tail",
    )


def test_several_trackers():
    cfg = compose_train(["recipe=quickstart", "tracker=[tensorboard,wandb]"])
    assert cfg.tracker.tensorboard.enabled and cfg.tracker.wandb.enabled


@pytest.mark.parametrize("schedule,last", [("linear", 0.1), ("cosine", 0.1), ("constant", 1.0)])
def test_schedules(schedule, last):
    optim = compose_train(
        [
            "recipe=quickstart",
            f"optim.schedule={schedule}",
            "optim.lr=1",
            "optim.warmup=10",
            "optim.min_lr=0.1",
        ]
    ).optim
    rates = [learning_rate(optim, step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert (
        last <= rates[-1] <= last + 1 / 90
    )  # the floor would be reached one step later: no step trains nothing


@pytest.mark.parametrize("warmup", [10, 0])
def test_schedules_are_those_of_transformers(warmup):
    """Ours is a step ahead behind the warmup: it begins at the peak once more, and never trains at zero."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedules = {
        "linear": get_linear_schedule_with_warmup(optimizer, warmup, 100),
        "cosine": get_cosine_schedule_with_warmup(optimizer, warmup, 100),
        "cosine_restarts": get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, warmup, 100, num_cycles=4
        ),
        "inverse_sqrt": get_inverse_sqrt_schedule(optimizer, warmup),
        "wsd": get_wsd_schedule(optimizer, warmup, 20, 100, decay_type="1-sqrt"),
        "constant": get_constant_schedule_with_warmup(optimizer, warmup),
    }
    assert set(schedules) == set(SCHEDULES)
    for name, theirs in schedules.items():
        optim = OptimConfig(lr=1.0, schedule=name, warmup=warmup, cycles=4, decay=0.2)
        wanted = [theirs.lr_lambdas[0](step) for step in range(101)]
        for step in range(1, 101):
            rate = learning_rate(optim, step, 100)
            assert rate == pytest.approx(wanted[step if step <= warmup else step - 1]), (name, step)
            floor = learning_rate(replace(optim, min_lr=0.1), step, 100)
            if step > warmup and name != "constant":
                assert floor == pytest.approx(0.1 + 0.9 * rate), (name, step)


def test_a_warmup_longer_than_the_run_is_told():
    optim = compose_train(["recipe=quickstart", "optim.warmup=10"]).optim
    assert "10 steps is longer than the run, which has 4" in str(
        warmup_note(optim, 4)
    ) and "40%" in str(warmup_note(optim, 4))
    assert warmup_note(optim, 10) is None and learning_rate(optim, 10, 10) == optim.lr


def test_a_single_step_trains():
    optim = compose_train(
        ["recipe=quickstart", "optim.lr=1", "optim.warmup=0", "optim.min_lr=0"]
    ).optim
    assert [learning_rate(optim, step, 2) for step in (1, 2)] == pytest.approx([1.0, 0.5])
    assert learning_rate(optim, 1, 1) == 1.0
