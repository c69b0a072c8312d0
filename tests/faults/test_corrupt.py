"""Every file of a checkpoint truncated, changed, emptied and removed: never loaded, always named."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from finetune.checkpointing.format import (
    FORMAT,
    Pieces,
    find_resume,
    verify,
    write_manifest,
    write_tensors,
)
from finetune.errors import UserError

FILES = [
    "manifest.json",
    "state.json",
    "optim-00000-of-00002.safetensors",
    "optim-00001-of-00002.safetensors",
]


def make_checkpoint(folder: Path, step: int) -> None:
    """A checkpoint as two ranks write it."""
    folder.mkdir(parents=True)
    files = {}
    for rank in range(2):
        pieces = [
            (f"w{i}.weight|{rank * 50}|{kind}", torch.randn(50))
            for i in range(3)
            for kind in ("master", "exp_avg", "exp_avg_sq")
        ]
        files[FILES[2 + rank]] = write_tensors(folder / FILES[2 + rank], Pieces.of(pieces))
    (folder / "state.json").write_text(
        json.dumps({"format": FORMAT, "state": {"step": step}, "identity": {}})
    )
    from finetune.checkpointing.format import entry_of

    files["state.json"] = entry_of(folder / "state.json")
    write_manifest(folder, step, files)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    for step in (2, 4):
        make_checkpoint(run / f"checkpoints/step-{step:08d}", step)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_instead(path: Path) -> None:
    """The right bytes, but from outside the directory."""
    outside = path.parents[2] / f"outside-{path.name}"
    shutil.move(path, outside)
    path.symlink_to(outside)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" {")


def pickle_instead(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


DAMAGES = [truncate, cut_last_byte, empty, remove, folder_instead, longer, pickle_instead]


@pytest.mark.fault(
    happens="a file of the newest checkpoint is truncated, emptied, removed, replaced or grown",
    then="the message names the file; the previous checkpoint is used",
)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_used(run, name, damage):
    said: list[str] = []
    damage(run / "checkpoints/step-00000004" / name)
    assert find_resume("auto", run, said.append) == run / "checkpoints/step-00000002"
    assert len(said) == 1 and f"step-00000004/{name}" in said[0]


@pytest.mark.fault(
    happens="one byte of any file of the newest checkpoint is flipped",
    then="the message names the file; the previous checkpoint is used",
)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(run, name, cases):
    path = run / "checkpoints/step-00000004" / name
    content = path.read_bytes()
    places = (
        range(len(content))
        if len(content) < 900
        else random.Random(0).sample(range(len(content)), 300)
    )
    cases(len(places))
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        said: list[str] = []
        found = find_resume("auto", run, said.append)
        if name == "manifest.json" and json_equal(bytes(flipped), content):
            assert found is not None  # a space became another white space
            continue
        assert found == run / "checkpoints/step-00000002" and f"step-00000004/{name}" in said[0], (
            place
        )


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.fault(
    happens="no checkpoint of the run is valid",
    then="refused with exit code 2; the message names each file",
)
@pytest.mark.parametrize("name", FILES)
def test_nothing_valid_is_an_error_not_a_fresh_start(run, name):
    said: list[str] = []
    for step in (2, 4):
        truncate(run / f"checkpoints/step-{step:08d}" / name)
    with pytest.raises(UserError, match="none of the checkpoints here is valid"):
        find_resume("auto", run, said.append)
    assert len(said) == 2 and all(name in line for line in said)


@pytest.mark.fault(
    happens="`resume=` names a damaged checkpoint, or a place without one",
    then="refused with exit code 2; the message names the file",
)
def test_a_named_checkpoint_must_be_valid(run, tmp_path, cases):
    cases(3)
    truncate(run / "checkpoints/step-00000004/state.json")
    with pytest.raises(UserError, match=r"step-00000004/state.json"):
        find_resume(str(run / "checkpoints/step-00000004"), tmp_path / "new", print)
    with pytest.raises(UserError, match="no valid checkpoint"):
        find_resume(str(tmp_path), tmp_path / "new", print)
    assert find_resume(str(run), tmp_path / "new", print) == run / "checkpoints/step-00000002"


@pytest.mark.fault(
    happens="a manifest names files outside its directory, or a file is a link out of it",
    then="refused; the message names the manifest or the file",
)
@pytest.mark.parametrize(
    "name", ["../step-00000002/state.json", "/etc/hostname", "a/../state.json", ".."]
)
def test_a_manifest_cannot_leave_its_directory(run, name, cases):
    folder = run / "checkpoints/step-00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (folder / "manifest.json").unlink()
    write_manifest(folder, 4, manifest["files"])
    assert "outside its directory" in str(verify(folder))


def test_a_link_out_of_the_directory_is_refused(run):
    link_instead(run / "checkpoints/step-00000004/state.json")
    assert "outside its directory" in str(verify(run / "checkpoints/step-00000004"))


def test_names_that_are_no_steps_are_no_checkpoints(run):
    """What a kill, a person or another program left beside the checkpoints is not taken for one."""
    for name in (
        ".tmp-step-00000009",
        "step-9",
        "step-00000009.bak",
        "set-aside-20260101-000000-step-00000008",
        "latest",
    ):
        shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints" / name)
    assert find_resume("auto", run, print) == run / "checkpoints/step-00000004"


def test_a_copied_step_is_not_another_step(run):
    said: list[str] = []
    shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints/step-00000099")
    assert find_resume("auto", run, said.append) == run / "checkpoints/step-00000004"
    assert "step-00000099/manifest.json" in said[0]


def test_the_written_file_is_plain_safetensors(tmp_path):
    """Our one-pass writer against the library's reader."""
    from safetensors.torch import load_file

    wanted = {
        "a|0|master": torch.randn(7),
        "b|3|exp_avg": torch.randn(6),
        "none|0|master": torch.empty(0),
    }
    entry = write_tensors(tmp_path / "x.safetensors", Pieces.of(list(wanted.items())))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    from finetune.checkpointing.format import entry_of

    assert entry == entry_of(tmp_path / "x.safetensors")
