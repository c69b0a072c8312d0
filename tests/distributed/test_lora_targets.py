"""LoRA on any choice of layers: two ranks at stage 3 have the losses of one at stage 0, recomputed blocks too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import losses, run_cases

TARGETS = {
    "one": ["adapter.targets=[q_proj]"],
    "two": ["adapter.targets=[q_proj,v_proj]"],
    "outer": ["adapter.targets=[out_proj,fc_in]"],
    "mixed": ["adapter.targets=[k_proj,out_proj,fc_out]"],
    "second block": ["adapter.layers=[1]"],
    "whole modules": ["adapter.modules_to_save=[wte,ln_f,lm_head]"],
}


@pytest.fixture(scope="module")
def runs(pocket_gptj: Path, unequal_documents: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("targets")
    for ranks, stage in ((1, 0), (2, 3)):
        run_cases(
            ranks,
            [
                [
                    "recipe=clm_pile_lora",
                    f"model.path={pocket_gptj}",
                    "model.dtype=fp32",
                    f"data.train={unequal_documents}",
                    "task.max_length=64",
                    "train.steps=3",
                    "train.global_batch=4",
                    "train.micro_batch=2",
                    f"train.activation_checkpointing={str(name == 'mixed').lower()}",
                    *words,
                    "optim.lr=1e-2",
                    "optim.warmup=0",
                    f"zero=stage{stage}",
                    "export.enabled=false",
                    f"run_dir={root / f'{name}-{stage}'}",
                ]
                for name, words in TARGETS.items()
            ],
        )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_stage_3_has_the_losses_of_stage_0(runs, name):
    reference = losses(runs / f"{name}-0")
    assert losses(runs / f"{name}-3") == pytest.approx(reference, abs=1e-5)
    assert len(set(reference)) == 3
