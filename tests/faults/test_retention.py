"""Which checkpoints are kept, set aside and refused; real files, one process, no engine."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from finetune.checkpointing import faults
from finetune.checkpointing.checkpoints import Checkpoints, _Save
from finetune.checkpointing.format import (
    Pieces,
    find_resume,
    newest_valid,
    read_state,
    step_folders,
    step_of,
)
from finetune.checkpointing.train_state import TrainState
from finetune.dist import World
from finetune.errors import RunFailed, UserError

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
IDENTITY = {"data": "abc", "seed": 0}


def opened(run: Path, **more) -> Checkpoints:
    return Checkpoints(run / "checkpoints", 2, WORLD, IDENTITY, [], **more)


def write(checkpoints: Checkpoints, step: int, best: int = 0) -> Path:
    about = {"format": 1, "identity": checkpoints.identity, "origin": checkpoints.origin}
    about["state"] = asdict(TrainState(step, best_step=best))
    checkpoints._write(
        _Save(step, Pieces.of([("w|0|master", torch.full((4,), float(step)))]), about, 16), WORLD
    )
    return checkpoints.folder / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    return [step_of(path) for path in step_folders(run / "checkpoints")]


def damage(path: Path) -> None:
    os.truncate(path / "state.json", 3)


def test_the_newest_are_kept(tmp_path):
    checkpoints = opened(tmp_path)
    for step in (1, 2, 3, 4):
        write(checkpoints, step)
    assert steps(tmp_path) == [3, 4] and checkpoints.newest() == 4
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]


def test_the_best_is_kept_until_there_is_a_better(tmp_path):
    checkpoints = opened(tmp_path, best=True)
    for step, best, kept in (
        (1, 1, [1]),
        (2, 1, [1, 2]),
        (3, 1, [1, 2, 3]),
        (4, 1, [1, 3, 4]),
        (5, 5, [4, 5]),
    ):
        write(checkpoints, step, best)
        assert steps(tmp_path) == kept


def test_damaged_newer_ones_never_push_out_the_valid(tmp_path):
    """Two damaged steps ahead of the one that is continued from: counted by number they would be the two newest."""
    first = opened(tmp_path)
    kept = write(first, 2)
    for step in (8, 9):
        damage(write(opened(tmp_path), step))
    again = opened(tmp_path)
    again._continue_from(kept)
    write(again, 3)
    assert steps(tmp_path) == [2, 3, 8, 9]
    assert (
        newest_valid(tmp_path / "checkpoints", lambda text: None)
        == tmp_path / "checkpoints/step-00000003"
    )
    for step in (4, 8, 9, 10):
        write(again, step)
        assert (
            newest_valid(tmp_path / "checkpoints", lambda text: None)
            == tmp_path / f"checkpoints/step-{step:08d}"
        )
    assert steps(tmp_path) == [9, 10]


def test_going_back_sets_newer_steps_aside_and_the_same_command_goes_on(tmp_path):
    first = opened(tmp_path)
    for step in (2, 3):
        write(first, step)
    back = tmp_path / "checkpoints/step-00000002"
    assert find_resume(str(back), tmp_path, print) == back
    again = opened(tmp_path, origin=back.name)
    again._continue_from(back)
    assert steps(tmp_path) == [2]
    aside = [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith("set-aside-")]
    assert len(aside) == 1 and read_state(aside[0])["state"]["step"] == 3
    write(again, 3)
    assert find_resume(str(back), tmp_path, print) == tmp_path / "checkpoints/step-00000003"
    assert find_resume("auto", tmp_path, print) == tmp_path / "checkpoints/step-00000003"


def test_a_step_is_written_again_over_a_damaged_one(tmp_path):
    checkpoints = opened(tmp_path)
    damage(write(checkpoints, 5))
    write(checkpoints, 5)
    assert find_resume("auto", tmp_path, print) == tmp_path / "checkpoints/step-00000005"


def test_what_changed_is_named(tmp_path):
    checkpoints = opened(tmp_path)
    saved = read_state(write(checkpoints, 1))
    changed = Checkpoints(tmp_path / "checkpoints", 2, WORLD, {"data": "xyz", "seed": 0}, [])
    with pytest.raises(UserError, match=r"data: was abc, is xyz(.|\n)*resume_changed=\[data\]"):
        changed._check_identity(saved, tmp_path)
    allowed = Checkpoints(tmp_path / "checkpoints", 2, WORLD, {"data": "xyz", "seed": 0}, ["data"])
    allowed._check_identity(saved, tmp_path)


def test_of_a_section_only_the_changed_settings_are_named(tmp_path):
    """Also against older checkpoints, which keep sections as text."""
    now = {
        "optim": {"lr": 0.001, "schedule": "cosine", "betas": [0.9, 0.95]},
        "adapter": {"rank": 4, "kind": "lora"},
    }
    older = {
        "optim": "OptimConfig(lr=0.01, schedule='cosine', betas=[0.9, 0.999])",
        "adapter": "LoraConfig(rank=4)",
    }
    newer = {"optim": now["optim"] | {"lr": 0.01, "betas": [0.9, 0.999]}, "adapter": now["adapter"]}
    for before in (older, newer):
        with pytest.raises(UserError) as caught:
            Checkpoints(tmp_path, 2, WORLD, now, [])._check_identity({"identity": before}, tmp_path)
        assert caught.value.problem.splitlines()[1:] == [
            "  optim.lr: was 0.01, is 0.001",
            "  optim.betas: was [0.9, 0.999], is [0.9, 0.95]",
        ]
        assert "'resume_changed=[optim.lr,optim.betas]'" in caught.value.remedy
        for allowed in (["optim"], ["optim.lr", "optim.betas"]):
            Checkpoints(tmp_path, 2, WORLD, now, allowed)._check_identity(
                {"identity": before}, tmp_path
            )
    with pytest.raises(UserError, match=r"adapter\.kind: was full, is lora"):
        Checkpoints(tmp_path, 2, WORLD, now, [])._check_identity(
            {"identity": {"adapter": "FullConfig()"}}, tmp_path
        )


def test_a_save_in_the_background_fails_aloud(tmp_path):
    checkpoints = opened(tmp_path, background=True)
    write(checkpoints, 1)
    faults.arm("nospace save.state")
    try:
        checkpoints._write_behind(_Save(2, [("w|0|master", torch.zeros(4))], {}, 16))
    finally:
        faults.arm("")
    assert checkpoints.broken
    with pytest.raises(RunFailed, match="the checkpoint of step 2 could not be written"):
        checkpoints.wait()
    assert not checkpoints.broken and steps(tmp_path) == [1]
    assert checkpoints.finished() == [(1, str(tmp_path / "checkpoints/step-00000001"))]


def test_room_is_checked_beforehand(tmp_path):
    with pytest.raises(
        RunFailed, match=r"the run needs .* GiB and the disk has .* free: .* are missing"
    ):
        opened(tmp_path)._require(1 << 60, "the run")
