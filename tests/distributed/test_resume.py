"""n steps == k steps + resume + (n - k) steps, bit by bit on the same ranks; test_elastic.py has the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import losses, metrics, run_cases

STEPS, CUT = 10, 3


def overrides(small: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    """Dropout, accumulation 2 on two ranks, and an epoch boundary inside: 60 documents make few rows of 128 tokens."""
    return [
        "recipe=clm_pile",
        f"model.path={small}",
        "model.dtype=fp32",
        f"data.train={data}",
        f"data.eval={data}",
        f"run_dir={run_dir}",
        "task.max_length=128",
        f"train.steps={STEPS}",
        "train.global_batch=8",
        "seed=5",
        "train.micro_batch=2",
        "optim.lr=1e-3",
        "train.eval_every=5",
        "train.activation_checkpointing=false",
        "model.attn_pdrop=0.1",
        "model.resid_pdrop=0.1",
        "model.embd_pdrop=0.1",
        f"checkpoint.every={CUT}",
        "checkpoint.keep=5",
        "export.enabled=false",
        "train.sample_every=5",
        "train.sample_tokens=3",
        "train.sample_prompts=[The,One]",
        *more,
    ]


VARIANTS = {
    "stage0": ["zero=stage0"],
    "stage2": ["zero=stage2"],
    "stage3": ["zero=stage3"],
    "stage2-bf16": ["zero=stage2", "model.dtype=bf16"],
    "stage1-bf16": ["zero=stage1", "model.dtype=bf16"],
    "stage3-lora": [
        "zero=stage3",
        "adapter=lora",
        "adapter.dropout=0.1",
        "adapter.lr_ratio=4",
        "train.neftune_alpha=5",
    ],
}
PATIENCE = 4
WITHOUT_GAIN = [
    "zero=stage1",
    "optim.lr=1e-30",
    "train.eval_every=1",
    f"train.early_stopping={PATIENCE}",
]
"""Weights stay as they are, so no evaluation is better than the first: CUT is one of those without a gain."""


def branch(run: Path, name: str) -> Path:
    """A copy of `run` as a kill right after the save of step CUT would have left it (with later metrics lines)."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for later in (copy / "checkpoints").glob("step-*"):
        if int(later.name[5:]) > CUT:
            shutil.rmtree(later)
    return copy


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in (run / f"checkpoints/step-{STEPS:08d}").glob("optim-*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def runs(
    pocket_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("resume")

    def case(name: str, *more: str) -> list[str]:
        return overrides(pocket_gptj, unequal_documents, root / name, *more)

    all_runs = VARIANTS | {"without-gain": WITHOUT_GAIN}
    run_cases(2, [case(name, *words) for name, words in all_runs.items()])
    for name in all_runs:
        branch(root / name, f"{name}-again")
    again = [case(f"{name}-again", *words) for name, words in all_runs.items()]
    lora = branch(root / "stage3-lora", "stage3-lora-to-stage1")
    lora_words = [word for word in VARIANTS["stage3-lora"] if not word.startswith("zero=")]
    run_cases(
        2, [*again, overrides(pocket_gptj, unequal_documents, lora, *lora_words, "zero=stage1")]
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_bitwise_on_the_same_ranks(runs, name):
    whole, again = runs / name, runs / f"{name}-again"
    assert losses(again) == losses(whole)
    assert [r["step"] for r in metrics(again)] == list(range(1, STEPS + 1))
    assert [(r["step"], r["loss"]) for r in metrics(again, "eval")] == [
        (r["step"], r["loss"]) for r in metrics(whole, "eval")
    ]
    a, b = tensors(again), tensors(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["without-gain", "without-gain-again"])
def test_evaluations_without_a_gain_count_on_across_a_resume(runs, name):
    run = runs / name
    last = 1 + PATIENCE
    assert CUT < last < STEPS and [r["step"] for r in metrics(run, "eval")] == list(
        range(1, last + 1)
    )
    state = json.loads((run / f"checkpoints/step-{last:08d}/state.json").read_text())["state"]
    assert (state["step"], state["best_step"], state["without_gain"]) == (last, 1, PATIENCE)
    assert json.loads((run / "result.json").read_text())["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_samples_are_written_and_the_same_after_a_resume(runs, name):
    """Also where every word takes gathering the weights from both ranks; drawing them leaves training as it is (above)."""
    whole, again = (samples(runs / folder) for folder in (name, f"{name}-again"))
    assert [(sample["step"], sample["prompt"]) for sample in whole] == [
        (5, "The"),
        (5, "One"),
        (10, "The"),
        (10, "One"),
    ]
    assert all(sample["text"] for sample in whole) and again[-4:] == whole


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_adapter_moves_to_another_stage(runs):
    for a, b in zip(
        losses(runs / "stage3-lora-to-stage1"), losses(runs / "stage3-lora"), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-5)
    assert all("lora_" in name for name in tensors(runs / "stage3-lora")), (
        "frozen weights are not saved"
    )


@pytest.mark.slow
def test_the_epoch_boundary_was_crossed(runs):
    stats = json.loads((runs / "stage0" / "data_stats.json").read_text())["train"]
    assert (
        CUT * 8 % stats["rows"] != 0 and CUT * 8 // stats["rows"] < (STEPS * 8 - 1) // stats["rows"]
    )
