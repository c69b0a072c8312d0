"""The doctor: stale locks by who holds them, findings with remedies, JSON and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.cli import doctor, doctor_checks
from finetune.cli import doctor as doctor_run
from finetune.cli.doctor_checks import Check
from finetune.dist import World
from finetune.errors import RunFailed
from finetune.sharding import engine, ops
from finetune.sharding.ops import find_stale_locks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lock(tmp_path: Path, monkeypatch) -> Path:
    """A minute-old lock of an op in a folder of extensions of our own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    path.touch()
    age(path, 60)
    return path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_a_lock_that_nobody_holds_is_stale(lock: Path):
    assert find_stale_locks() == [lock]
    finding = doctor_checks.build_locks()
    assert (finding.level, finding.remedy) == ("red", f"rm {lock}")


def test_a_stale_lock_stops_only_a_run_that_needs_the_op(lock: Path, monkeypatch):
    other = lock.parents[1] / "fused_adam" / "lock"
    other.parent.mkdir()
    lock.rename(other)
    age(other, 60)
    assert find_stale_locks() == [other] and find_stale_locks(op="deepspeed_shm_comm") == []
    assert doctor_checks.build_locks().level == "yellow"
    other.rename(lock)
    with pytest.raises(RunFailed, match=f"rm {lock}"):
        engine.connect_deepspeed(World(0, 1, 0, 1, torch.device("cpu")))


def test_a_run_on_cpus_knows_that_it_will_compile_first(tmp_path: Path, monkeypatch):
    cpu = World(0, 1, 0, 1, torch.device("cpu"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert engine.compiles_first(cpu) and not engine.compiles_first(
        World(0, 1, 0, 1, torch.device("meta"))
    )
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    assert not engine.compiles_first(cpu)


def test_no_lock_and_no_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "nowhere"))
    assert find_stale_locks() == []
    assert doctor_checks.build_locks().level == "green"


def test_a_lock_of_a_living_compile_is_left_alone_until_it_is_killed(lock: Path):
    # As torch's FileBaton does it: the descriptor of the file that it created stays open.
    lock.unlink()
    code = (
        "import os, sys, time; held = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True);"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        age(lock, 60)
        assert find_stale_locks() == []
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert find_stale_locks() == [lock]


def test_torch_holds_its_lock_open_while_it_compiles(lock: Path):
    from torch.utils.file_baton import FileBaton

    lock.unlink()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert find_stale_locks(min_age_seconds=0) == []
    baton.release()


def test_a_fresh_lock_is_left_alone(lock: Path):
    age(lock, 0)
    assert find_stale_locks() == []
    assert find_stale_locks(min_age_seconds=0) == [lock]


def test_only_age_counts_where_the_holder_may_be_out_of_sight(lock: Path, monkeypatch):
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(lock.parents[1]), fstype="nfs4"),
    ]
    monkeypatch.setattr(ops.psutil, "disk_partitions", lambda all: mounts)
    assert find_stale_locks() == []
    age(lock, 7200)
    assert find_stale_locks() == [lock]


def test_locks_of_other_pythons_do_not_count(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import torch

    version = (torch.version.cuda or "").replace(".", "")
    ours = (
        f"py{sys.version_info.major}{sys.version_info.minor}_{'cu' + version if version else 'cpu'}"
    )
    for folder in (ours, "py27_cpu"):
        (tmp_path / "torch_extensions" / folder / "cpu_adam").mkdir(parents=True)
        path = tmp_path / "torch_extensions" / folder / "cpu_adam" / "lock"
        path.touch()
        age(path, 60)
    assert [path.parts[-3] for path in find_stale_locks()] == [ours]


def test_json_is_all_that_is_printed_and_red_is_exit_code_1(lock: Path):
    # Importing deepspeed is what may hang: the doctor must not.
    code = (
        "import sys; from finetune.cli.doctor import main; code = main(json_only=True);"
        "assert 'deepspeed' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["ready"] is False
    reds = [check for check in found["checks"] if check["level"] == "red"]
    assert "build locks" in [check["name"] for check in reds]
    assert all(check["remedy"] for check in reds)


def test_every_finding_is_well_formed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = doctor.checks()
    assert {
        "python",
        "torch",
        "compiler",
        "deepspeed",
        "build locks",
        "communication",
        "versions",
        "memory",
        "disk",
        "open files",
        "master port",
        "hub cache",
    } <= {check.name for check in found}
    assert all(isinstance(check, Check) and check.finding for check in found)
    assert {check.level for check in found} <= {"green", "yellow", "red"}
    assert all(check.remedy for check in found if check.level == "red")


def test_exit_code_and_text(monkeypatch, capsys):
    fine = (lambda: Check("a", "green", "fine"), lambda: Check("b", "yellow", "so so"))
    monkeypatch.setattr(doctor_run, "CHECKS", fine)
    assert doctor.main() == 0
    assert "ready to train" in capsys.readouterr().out
    monkeypatch.setattr(doctor_run, "CHECKS", (lambda: [Check("c", "red", "bad [x]", "fix it")],))
    assert doctor.main() == 1
    assert "bad [x]" in (text := capsys.readouterr().out) and "fix it" in text


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def odd_thing():
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor_run, "CHECKS", (odd_thing,))
    assert doctor.checks() == [
        Check("odd thing", "yellow", "could not be checked: RuntimeError: boom")
    ]


def test_a_port_in_use_is_seen(monkeypatch):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        monkeypatch.setattr(doctor_checks, "PORT", server.getsockname()[1])
        assert doctor_checks.master_port().level == "yellow"
    assert doctor_checks.master_port().level == "green"


def test_offline_flags_are_named(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor_checks.hub_cache().remedy == "unset HF_HUB_OFFLINE, or give local paths"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert doctor_checks.hub_cache().level == "green"


def test_versions_outside_the_tested_range_and_missing_ones(monkeypatch):
    from email.message import Message

    metadata = Message()
    for line in ("rich<1", "numpy>=1", "nosuchthing>=2; extra == 'x'"):
        metadata["Requires-Dist"] = line
    monkeypatch.setattr(doctor_checks, "_metadata", lambda: metadata)
    finding = doctor_checks.tested_versions()
    assert (
        finding.level == "yellow" and "rich" in finding.finding and "numpy" not in finding.finding
    )
    metadata["Requires-Dist"] = "nosuchthing>=2"
    assert doctor_checks.tested_versions().level == "red"
    monkeypatch.setattr(doctor_checks, "_metadata", lambda: None)
    assert doctor_checks.tested_versions().level == "yellow"
