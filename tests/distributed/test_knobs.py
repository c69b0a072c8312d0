"""Settings of training that change its steps: the same on one rank and two, at any stage, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from finetune.data.tokenizer import load_tokenizer
from finetune.planning.shape import LINEARS
from tests.distributed import reference
from tests.distributed.ranks import losses, metrics, run_cases


def overrides(model: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "recipe=clm_pile_lora",
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.train={data}",
        f"data.eval={data}",
        "task.max_length=64",
        "train.steps=3",
        "train.global_batch=4",
        "train.micro_batch=2",
        "train.activation_checkpointing=false",
        "train.eval_every=0",
        "train.eval_at_start=true",
        "optim.lr=1e-2",
        "optim.warmup=0",
        "checkpoint.every=0",
        "train.probe=false",
        "export.verify=false",
        f"run_dir={run_dir}",
        *more,
    ]


PLUS = [
    "adapter.lr_ratio=8",
    "adapter.rank=4",
    "adapter.alpha=8",
    "optim.weight_decay=0.1",
    "optim.min_lr=0",
    "seed=3",
]


@pytest.fixture(scope="module")
def runs(pocket_gptj: Path, unequal_documents: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("knobs")

    def case(name: str, *more: str) -> list[str]:
        return overrides(pocket_gptj, unequal_documents, root / name, *more)

    noise = ["train.neftune_alpha=5", "zero=stage0"]
    run_cases(
        1,
        [
            case("first", "zero=stage0"),
            case("noise-1", *noise),
            case("plus-1", "zero=stage0", *PLUS),
        ],
    )
    start = f"adapter.start={root / 'first'}"
    run_cases(
        2,
        [
            case("again-0", "zero=stage0", "train.micro_batch=1", start),
            case("again-3", "zero=stage3", "train.micro_batch=1", start),
            case("limited", "zero=stage2", "train.max_time=0.001"),
            case("limited", "zero=stage2", "train.max_time=600"),
            case("not-limited", "zero=stage2"),
            case("noise-2", *noise),
            case("plus-2", "zero=stage2", *PLUS),
            case("plus-3", "zero=stage3", *PLUS),
        ],
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_training_goes_on_from_an_adapter(runs, stage):
    """Also where both ranks hold a part of every tensor; optimizer states begin anew."""
    first, again = runs / "first", runs / f"again-{stage}"
    assert metrics(again, "eval")[0]["loss"] == pytest.approx(
        metrics(first, "eval")[-1]["loss"], abs=1e-5
    )
    assert losses(again) == pytest.approx(losses(runs / "again-0"), abs=1e-5)
    assert str(first) in (again / "export/README.md").read_text()


@pytest.mark.slow
def test_a_time_limit_stops_like_a_signal_and_the_same_command_goes_on(runs):
    """The first of two starts is over its limit before step 1: there was nothing to save."""
    assert losses(runs / "limited") == losses(runs / "not-limited")
    assert json.loads((runs / "limited/result.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_the_noise_on_embeddings_is_that_of_the_data_whichever_rank_reads_it(runs):
    """Micro-batches of two rows: two of one rank, or one of either rank."""
    assert losses(runs / "noise-2") == pytest.approx(losses(runs / "noise-1"), abs=1e-6)
    assert losses(runs / "noise-1")[0] != pytest.approx(losses(runs / "first")[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["plus-1", "plus-2", "plus-3"])
def test_lora_plus_trains_as_pefts_optimizer_does(runs, pocket_gptj, unequal_documents, run):
    """On one rank at stage 0 and on two ranks that share the groups at stages 2 and 3."""

    def wrap(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(LINEARS)
        )
        return peft.get_peft_model(model, config)

    def optimizer(model):
        words = {"lr": 1e-2, "loraplus_lr_ratio": 8, "loraplus_weight_decay": 0.1}
        return create_loraplus_optimizer(model, torch.optim.AdamW, **words)

    tokenizer = load_tokenizer(str(pocket_gptj))
    wanted = reference.three_steps(
        pocket_gptj, unequal_documents, tokenizer, wrap=wrap, optimizer=optimizer
    )
    assert losses(runs / run) == pytest.approx(wanted, abs=2e-5)
