"""DeepSpeed's own launcher, as people start it: what it does to its ranks, and what the ranks make of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.checkpointing.format import newest_valid, step_of
from finetune.process import free_port
from finetune.reporting import metrics_log
from tests.faults.jobs import ROOT, words

BIN = Path(sys.executable).parent


def start(folder: Path, run_dir: Path) -> subprocess.Popen:
    command = [
        str(BIN / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",  # commands of the docs, which tests in another process run, take the default
        str(free_port()),
        "launch/train.py",
        *words(folder, run_dir, "train.steps=4000", "checkpoint.every=3"),
    ]
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (
            sum(line["kind"] == "train" for line in metrics_log.read(run_dir / "metrics.jsonl"))
            >= 4
        ):
            return process
        time.sleep(0.05)
    raise AssertionError(process.communicate(timeout=10)[0][-3000:])


def rank_processes(run_dir: Path) -> dict[int, int]:
    """Rank -> process id of the run in `run_dir`, from /proc."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words_of = place.joinpath("cmdline").read_bytes().decode().split("\0")
            environment = place.joinpath("environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if f"run_dir={run_dir}" in words_of and any(
            word.startswith("--local_rank=") for word in words_of
        ):
            ranks = [word[5:] for word in environment if word.startswith("RANK=")]
            if (
                ranks
                and "launch/train.py" in words_of
                and "deepspeed.launcher.launch" not in words_of
            ):
                found[int(ranks[0])] = int(place.name)
    return found


def assert_saved_where_it_stopped(run_dir: Path) -> None:
    found = json.loads((run_dir / "result.json").read_text())
    newest = newest_valid(run_dir / "checkpoints", print)
    assert (
        found["status"] == "preempted" and newest is not None and step_of(newest) == found["step"]
    )


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.fault(
    happens="SIGTERM to `deepspeed` itself, which dies at once without informing its ranks",
    then="the ranks notice, save and end with 75",
)
def test_sigterm_to_the_real_launcher(folder, tmp_path):
    process = start(folder, tmp_path)
    pids = rank_processes(tmp_path)
    assert set(pids) == {0, 1}
    process.send_signal(signal.SIGTERM)
    assert gone(list(pids.values()), 60)
    process.communicate(timeout=30)
    assert_saved_where_it_stopped(tmp_path)


@pytest.mark.slow
@pytest.mark.fault(
    happens="a file STOP under `deepspeed`",
    then="both ranks save and end with 75, and so does `deepspeed` itself",
)
def test_stop_under_the_real_launcher(folder, tmp_path):
    process = start(folder, tmp_path)
    (tmp_path / "STOP").touch()
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 75, output[-3000:]
    assert_saved_where_it_stopped(tmp_path)
    assert not (tmp_path / "STOP").exists()


@pytest.mark.slow
@pytest.mark.fault(
    happens="`kill -9` of a rank under `deepspeed`",
    then="everything ends within a minute; the dead rank is named",
)
def test_a_killed_rank_under_the_real_launcher(folder, tmp_path):
    process = start(folder, tmp_path)
    pids = rank_processes(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, 75)
    assert gone(list(pids.values()), 5)
    assert f"rank 1 (process {pids[1]}" in output, output[-3000:]
    assert "Connection closed" not in output.split(f"rank 1 (process {pids[1]}")[0]
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"
    assert newest_valid(tmp_path / "checkpoints", print) is not None
