"""Settings of training that change its steps: the same on one rank and two, at any stage, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def runs(pocket_gptj: Path, unequal_documents: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("knobs")

    def case(name: str, *more: str) -> list[str]:
        return overrides(pocket_gptj, unequal_documents, root / name, *more)

    run_cases(1, [case("first", "zero=stage0")])
    start = f"adapter.start={root / 'first'}"
    run_cases(
        2,
        [
            case("again-0", "zero=stage0", "train.micro_batch=1", start),
            case("again-3", "zero=stage3", "train.micro_batch=1", start),
            case("limited", "zero=stage2", "train.max_time=0.001"),
            case("limited", "zero=stage2", "train.max_time=600"),
            case("not-limited", "zero=stage2"),
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
