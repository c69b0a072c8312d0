"""Exports of a run on a quantised base: the adapter on that base, and merged into the original one."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import GPTJForCausalLM

from finetune.cli.app import compose_config
from finetune.cli.export import run as export
from finetune.files import read_json
from tests.distributed.ranks import metrics, run_cases

FORMATS = ("nf4", "int8")

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def runs(pocket_gptj: Path, unequal_documents: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    common = [
        "recipe=clm_pile_lora", f"model.path={pocket_gptj}", "model.dtype=fp32",
        f"data.train={unequal_documents}", f"data.eval={unequal_documents}",
        "task.max_length=64", "train.steps=4", "train.micro_batch=2", "train.global_batch=4",
        "adapter.targets=all-linear", "optim.lr=2e-2", "optim.warmup=0",
    ]  # fmt: skip
    run_cases(1, [[*common, f"model.quantize={q}", f"run_dir={folder / q}"] for q in FORMATS])
    return folder


@pytest.fixture(scope="module")
def run(runs: Path) -> Path:
    return runs / "nf4"


@pytest.mark.slow
@pytest.mark.parametrize("quantize", FORMATS)
def test_the_adapter_is_proven_on_bitsandbytes_base(runs, quantize):
    export = runs / quantize / "export"
    about, figures = (read_json(export / name) for name in ("finetune.json", "export.json"))
    assert about["quantize"] == quantize and about["quantize_double"] and about["base_weights"]
    assert figures["verified"] and figures["relative_difference"] < 1e-5


@pytest.mark.slow
def test_merged_is_the_original_base_and_the_adapter(run, pocket_gptj, tmp_path):
    out = tmp_path / "merged"
    export(compose_config([f"run={run}", "kind=merged", f"out={out}"], "export"))
    assert read_json(out / "export.json")["verified"]
    merged = GPTJForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = GPTJForCausalLM.from_pretrained(pocket_gptj, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(base, run / "export").merge_and_unload()
    found = dict(merged.named_parameters())
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_evaluating_the_run_reads_the_base_as_training_did(run):
    from finetune.cli.evaluate import run as evaluate

    evaluate(compose_config([f"run={run}"], "evaluate"))
    assert read_json(run / "eval.json")["loss"] == pytest.approx(
        metrics(run, "eval")[-1]["loss"], rel=1e-6
    )
