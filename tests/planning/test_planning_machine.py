"""Machines: measured, overridden, and the presets; and the program from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from plan_cases import GIB

from finetune.config import MachineConfig
from finetune.errors import UserError
from finetune.planning import machine as module
from finetune.planning.machine import measure_machine

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "conf" / "machine").glob("*.yaml"))


def test_this_machine() -> None:
    machine = measure_machine(MachineConfig(), run_dir="runs/not/made/yet")
    assert machine.host_bytes > 0 and machine.disk_bytes > 0
    assert machine.gpus == len(module.gpu_free_bytes())


def test_given_values_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_free_bytes", lambda: [11 * GIB, 10 * GIB, 12 * GIB])
    machine = measure_machine(MachineConfig(gpus=16, gpu_gib=80, host_gib=100, disk_gib=7))
    assert (machine.gpus, machine.gpus_per_node, machine.nodes) == (16, 8, 2)
    assert (machine.gpu_bytes, machine.host_bytes, machine.disk_bytes) == (
        80 * GIB,
        100 * GIB,
        7 * GIB,
    )
    assert measure_machine(MachineConfig(gpus=4, gpu_gib=80, gpus_per_node=8)).gpus_per_node == 4
    measured = measure_machine(MachineConfig())
    assert (measured.gpus, measured.gpu_bytes) == (3, 10 * GIB), "the smallest GPU is the limit"
    assert measure_machine(MachineConfig(), world_size=1).gpus == 1
    six = measure_machine(MachineConfig(), world_size=6)
    assert (six.gpus, six.gpus_per_node, six.nodes) == (6, 3, 2)


def test_no_gpu_is_a_cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_free_bytes", lambda: [])
    machine = measure_machine(MachineConfig(), world_size=4)
    assert machine.gpus == 0 and machine.gpu_bytes == 0 and machine.name.startswith("CPU")
    with pytest.raises(UserError, match=r"machine\.gpu_gib"):
        measure_machine(MachineConfig(gpus=2))
    monkeypatch.setattr(module, "gpu_free_bytes", lambda: [GIB])
    assert measure_machine(MachineConfig(), world_size=1, cuda=False).gpus == 0


@pytest.mark.parametrize(
    "visible, left",
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2", [2]),
        ("1,0", [1, 0]),
        ("GPU-abc,GPU-def", [0, 1]),
        ("0,-1", [0]),
    ],
)
def test_visible_devices(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, left: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert module._visible(3) == left


def test_container_limit(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    assert module._cgroup_free(tmp_path, *names) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 150\n")
    assert module._cgroup_free(tmp_path, *names) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert module._cgroup_free(tmp_path, *names) == 550


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict) and set(values) <= {
        field.name for field in fields(MachineConfig)
    }
    OmegaConf.merge(OmegaConf.structured(MachineConfig), values)
    if path.stem != "local":
        advertised = float(path.stem.split("_")[-1])
        assert 0.9 * advertised <= values["gpu_gib"] <= advertised


def test_presets_were_found() -> None:
    assert {"local", "h100_80", "a100_80", "a100_40", "rtx4090_24", "l4_24", "v100_32"} <= {
        path.stem for path in PRESETS
    }


def planned_by_the_program(*words: str) -> dict:
    command = [sys.executable, "launch/plan.py", "recipe=clm_pile", "plan.format=json", *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout)


def test_the_program_prints_one_json_object() -> None:
    found = planned_by_the_program("machine=a100_80", "machine.gpus=4")
    assert found["fits"] and found["machine"]["gpus"] == 4 and found["world_size"] == 4


def test_this_machine_s_disk_does_not_limit_hardware_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = planned_by_the_program("machine.gpus=8", "machine.gpu_gib=80", "machine.host_gib=512")
    assert found["fits"] and found["chosen"]["zero"] == "stage1"
    monkeypatch.setattr(module, "disk_free_bytes", lambda path: 3 * GIB)
    elsewhere = measure_machine(MachineConfig(gpus=8, gpu_gib=80), nvme_path="/nvme")
    assert min(elsewhere.disk_bytes, elsewhere.nvme_bytes or 0) > 2**50
    assert (
        measure_machine(MachineConfig(gpus=8, gpu_gib=80, disk_gib=9), nvme_path="/nvme").nvme_bytes
        == 9 * GIB
    )
    assert (
        measure_machine(
            MachineConfig(gpus=1, gpu_gib=80), world_size=1, nvme_path="/nvme"
        ).nvme_bytes
        == 3 * GIB
    )


def test_nvme_is_planned_with_the_room_of_its_folder() -> None:
    found = planned_by_the_program("machine.gpus=1", "machine.gpu_gib=80", "machine.host_gib=64", "zero=auto",
                                   "zero.offload_optimizer=nvme", "zero.nvme_path=/tmp")  # fmt: skip
    assert found["fits"] and found["chosen"] == {
        "zero": "stage3",
        "offload_optimizer": "nvme",
        "offload_params": "none",
    }
