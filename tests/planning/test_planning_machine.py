"""Machines: measured, overridden, and the presets; and the program from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

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
    assert module.visible_gpus(3) == left


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup v2 hierarchy in which this process is in /pod/job."""
    (tmp_path / "membership").write_text("0::/pod/job\n")
    (tmp_path / "pod" / "job").mkdir(parents=True)
    monkeypatch.setattr(module, "CGROUPS", tmp_path)
    monkeypatch.setattr(module, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def limit(folder: Path, most: str, used: int = 600, cache: int = 150) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 400\ninactive_file {cache}\n")


def test_container_limit(cgroups: Path) -> None:
    node = module.host_total_bytes()
    assert module.memory_limit() is None and module.host_free_bytes() > 2000
    limit(cgroups, "max")
    assert module.memory_limit() is None and module.host_total_bytes() == node
    limit(cgroups / "pod/job", "1000")
    assert module.memory_limit() == module.host_total_bytes() == 1000
    assert module.host_free_bytes() == module.host_left_bytes() == 550
    limit(cgroups / "pod", "900", used=800)
    assert module.memory_limit() == 900 and module.host_free_bytes() == 250
    limit(cgroups / "pod", "900", used=1100, cache=0)
    assert module.host_free_bytes() == 0


def test_container_limit_of_the_older_hierarchy(cgroups: Path) -> None:
    (cgroups / "membership").write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n")
    root = cgroups / "memory"
    root.mkdir()
    (root / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert module.memory_limit() is None
    (root / "memory.limit_in_bytes").write_text("1000")
    (root / "memory.usage_in_bytes").write_text("700")
    (root / "memory.stat").write_text("total_inactive_file 100")
    assert (module.memory_limit(), module.host_free_bytes()) == (1000, 400)


def test_cpu_limit(cgroups: Path) -> None:
    assert module.cpu_limit() is None
    (cgroups / "pod/cpu.max").write_text("max 100000\n")
    assert module.cpu_limit() is None
    (cgroups / "pod/job/cpu.max").write_text("150000 100000\n")
    assert module.cpu_limit() == 1.5
    (cgroups / "membership").write_text("4:cpu,cpuacct:/\n")
    (cgroups / "cpu").mkdir()
    (cgroups / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (cgroups / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert module.cpu_limit() is None
    (cgroups / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    assert module.cpu_limit() == 0.5


def test_gpus_are_those_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose memory cannot be read counts as one without any, so that machine.gpu_gib is asked for."""
    pynvml = module.pynvml

    def memory(index: int) -> SimpleNamespace:
        if index == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return SimpleNamespace(free=(index + 1) * GIB)

    for name, value in (
        ("nvmlInit", lambda: None),
        ("nvmlShutdown", lambda: None),
        ("nvmlDeviceGetCount", lambda: 3),
        ("nvmlDeviceGetHandleByIndex", lambda index: index),
        ("nvmlDeviceGetMemoryInfo", memory),
    ):
        monkeypatch.setattr(pynvml, name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module.gpu_free_bytes() == [GIB, 0, 3 * GIB]


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
