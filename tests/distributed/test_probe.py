"""The step that is tried on the longest batch before step 1 changes nothing, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import metrics, run_cases

CASES = {
    "stage0": ["zero=stage0", "model.dtype=fp32"],
    "stage1-lora": ["zero=stage1", "model.dtype=bf16", "adapter=lora"],
    "stage2": ["zero=stage2", "model.dtype=bf16"],
    "stage3": ["zero=stage3", "model.dtype=fp32"],
}


@pytest.fixture(scope="module")
def runs(small_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("probe")
    base = ["recipe=clm_pile", f"model.path={small_gptj}", f"data.train={unequal_documents}", "data.eval=null",
            "task.max_length=64", "train.epochs=null", "train.steps=3", "train.micro_batch=1", "train.global_batch=4",
            "train.packing=false", "optim.lr=1e-2", "optim.warmup=0", "export.enabled=false", "train.eval_every=0",
            "adapter=full", "train.activation_checkpointing=false"]
    cases = []
    for name, words in CASES.items():
        kept = [word for word in base if word.split("=")[0] not in {w.split("=")[0] for w in words}]
        cases += [[*kept, *words, f"run_dir={root / name / str(on)}", f"train.probe={on}"] for on in ("true", "false")]
    run_cases(2, cases)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_probe_changes_nothing(runs, name):
    def figures(on: str) -> list[tuple]:
        return [(line["loss"], line["grad_norm"], line["lr"], line["skipped_steps"]) for line in metrics(runs / name / on)]

    tried, untried = figures("true"), figures("false")
    assert len(tried) == 3 and tried == untried
    assert tried[0][0] != tried[2][0]
