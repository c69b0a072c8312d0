"""checkpoint.final: what a run that is done keeps, that it can still be exported, and that nothing restarts unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.checkpointing.format import (
    StateReader,
    folder_bytes,
    step_folder,
    step_folders,
    verify,
)
from finetune.compose import compose_train
from finetune.errors import UserError
from finetune.export.reopen import checkpoint_of
from finetune.planning.choose import plan
from finetune.planning.machine import Machine
from finetune.planning.shape import ModelShape
from finetune.training.run_dir import refuse_finished
from tests.distributed.ranks import run_cases

CASES = {
    "full": ["zero=stage1", "checkpoint.final=full"],
    "weights": ["zero=stage1", "checkpoint.final=weights"],
    "weights-of-several": ["zero=stage1", "checkpoint.final=weights", "checkpoint.every=2"],
    "none": ["zero=stage1", "checkpoint.final=none", "checkpoint.every=2"],
}


def words(model: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "recipe=clm_pile",
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.train={data}",
        "task.max_length=64",
        "train.steps=4",
        "train.global_batch=4",
        "train.micro_batch=2",
        "export.verify=false",
        f"run_dir={run_dir}",
        *more,
    ]


@pytest.fixture(scope="module")
def runs(
    pocket_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("final")
    run_cases(
        2,
        [words(pocket_gptj, unequal_documents, root / name, *case) for name, case in CASES.items()],
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "weights-of-several"])
def test_the_weights_of_the_last_step_are_kept_in_a_third_of_the_room(runs, name):
    (folder,) = step_folders(runs / name / "checkpoints")
    full = step_folder(runs / "full" / "checkpoints", 4)
    assert folder.name == full.name and verify(folder) is None
    assert folder_bytes(folder) < 0.35 * folder_bytes(full)
    _, checkpoint = checkpoint_of(runs / name)
    kept, reference = StateReader(checkpoint), StateReader(full)
    sizes = reference.sizes("master")
    assert sorted(kept.names()) == sorted(sizes) and len(sizes) > 10
    for parameter, numel in sizes.items():
        wanted = reference.read(parameter, "master", 0, numel)
        assert torch.equal(kept.read(parameter, "master", 0, numel), wanted)
    result = json.loads((runs / name / "result.json").read_text())
    assert result["checkpoint"] == "weights" and (runs / name / "export").is_dir()


@pytest.mark.slow
def test_nothing_is_kept_but_the_export(runs):
    assert not step_folders(runs / "none" / "checkpoints")
    assert (runs / "none" / "export" / "model.safetensors").is_file()
    with pytest.raises(UserError, match=r"its export is .*none/export"):
        checkpoint_of(runs / "none")
    with pytest.raises(UserError, match="resume=never"):
        refuse_finished(runs / "none")
    refuse_finished(runs / "weights")


@pytest.mark.slow
def test_weights_alone_are_not_trained_on(runs, pocket_gptj, unequal_documents):
    """The same command again has nothing to do; with more steps it is refused, and nothing is lost."""
    case = words(pocket_gptj, unequal_documents, runs / "weights", *CASES["weights"])
    before = (step_folders(runs / "weights" / "checkpoints")[0] / "manifest.json").read_bytes()
    run_cases(2, [case])
    with pytest.raises(AssertionError, match="holds weights alone"):
        run_cases(2, [[word.replace("train.steps=4", "train.steps=6") for word in case]])
    after = (step_folders(runs / "weights" / "checkpoints")[0] / "manifest.json").read_bytes()
    assert before == after


def test_the_plan_counts_what_is_written(pocket_gptj):
    """GPT-J-6B in full: 12 bytes a parameter, 4 for the weights alone, and 2 for the export in bf16."""

    def disk(*more: str) -> int:
        cfg = compose_train(["recipe=clm_pile", "data.train=x.jsonl", "train.micro_batch=1", *more])
        shape = ModelShape.from_config("finetune/assets/gptj_6b/config.json")
        machine = Machine(8, 8, 80 * 2**30, 2**40, 2**45, None)
        planned = plan(cfg, machine, shape, 8)
        return planned.chosen.disk_bytes // planned.parameters["trainable"]

    kinds = ("full", "weights", "none")
    only_at_end = [disk(f"checkpoint.final={kind}", "checkpoint.every=0") for kind in kinds]
    assert only_at_end == [14, 6, 2]
    assert disk("checkpoint.final=none", "checkpoint.every=100") == 2 + 3 * 12
