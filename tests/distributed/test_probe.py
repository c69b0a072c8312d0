"""The step that is tried on the longest batch before step 1 changes nothing, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.distributed.ranks import metrics, run_cases

CASES = {
    "stage0": ["zero=stage0", "model.dtype=fp32"],
    "stage1-lora": ["zero=stage1", "model.dtype=bf16", "adapter=lora"],
    "stage2": ["zero=stage2", "model.dtype=bf16"],
    "stage3": ["zero=stage3", "model.dtype=fp32"],
}


@pytest.fixture(scope="module")
def runs(
    pocket_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("probe")
    base = [
        "recipe=clm_pile",
        f"model.path={pocket_gptj}",
        f"data.train={unequal_documents}",
        "data.eval=null",
        "task.max_length=64",
        "train.epochs=null",
        "train.steps=3",
        "train.micro_batch=1",
        "train.global_batch=4",
        "train.packing=false",
        "optim.lr=1e-2",
        "optim.warmup=0",
        "export.enabled=false",
        "train.eval_every=0",
        "adapter=full",
        "train.activation_checkpointing=false",
    ]
    cases = []
    for name, words in CASES.items():
        kept = [word for word in base if word.split("=")[0] not in {w.split("=")[0] for w in words}]
        cases += [
            [*kept, *words, f"run_dir={root / name / str(on)}", f"train.probe={on}"]
            for on in ("true", "false")
        ]
    for stage in (0, 3):
        kept = [word for word in base if not word.startswith("train.micro_batch")]
        cases.append(
            [
                *kept,
                f"zero=stage{stage}",
                "model.dtype=fp32",
                "train.micro_batch=auto",
                f"run_dir={root / f'auto{stage}'}",
            ]
        )
    run_cases(2, cases)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_probe_changes_nothing(runs, name):
    def figures(on: str) -> list[tuple]:
        return [
            (line["loss"], line["grad_norm"], line["lr"], line["skipped_steps"])
            for line in metrics(runs / name / on)
        ]

    tried, untried = figures("true"), figures("false")
    assert len(tried) == 3 and tried == untried
    assert tried[0][0] != tried[2][0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_micro_batch_auto_takes_all_of_a_rank_s_share_where_it_fits_and_keeps_the_step(runs, stage):
    found = OmegaConf.load(runs / f"auto{stage}" / "config.yaml").train
    assert (found.micro_batch, found.global_batch) == (2, 4)
    one_at_a_time = [line["loss"] for line in metrics(runs / f"stage{stage}" / "true")]
    assert [line["loss"] for line in metrics(runs / f"auto{stage}")] == pytest.approx(
        one_at_a_time, rel=1e-5
    )
