"""Out of memory: recognised, explained with numbers, answered with commands that fit; seen before step 1 if ever."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_cases import CPU, GIB, TINY, config, gpu_machine

from finetune.config import FullConfig, LoraConfig
from finetune.data.packing import one_per_sequence, stream_blocks
from finetune.dist import World
from finetune.errors import RunFailed
from finetune.planning.choose import after_overflow, plan
from finetune.planning.shape import ModelShape
from finetune.training import out_of_memory
from finetune.training.out_of_memory import OutOfMemory, is_host_overflow
from finetune.training.rehearsal import longest_rows

ROOT = Path(__file__).resolve().parents[2]
GPTJ = {
    "model_type": "gptj",
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
}


def test_longest_rows_first_and_repeated_where_there_are_too_few():
    rows = one_per_sequence(np.array([0, 3, 10, 12, 19]))
    assert longest_rows(rows, 3) == [1, 3, 0] and longest_rows(rows, 6) == [1, 3, 0, 2, 1, 3]
    assert longest_rows(stream_blocks(np.array([0, 5, 9]), 4), 1) == [0]


def six_b(**changes):
    cfg = config(FullConfig(), length=2048, accumulation=4, micro_batch=4, **changes)
    return cfg, ModelShape.from_config(GPTJ)


def test_what_is_offered_needs_less_than_what_failed_and_fits_the_limit():
    cfg, shape = six_b(ranks=4)
    planned = plan(cfg, gpu_machine(4, 80), shape, 4)
    limit = planned.chosen.gpu_bytes - 8 * GIB
    found = after_overflow(cfg, planned, gpu_bytes=limit)
    assert found and "train.activation_checkpointing=true" in " ".join(words for words, _ in found)
    for words, numbers in found:
        needed, given = (float(number) for number in re.findall(r"([\d.]+) GiB", numbers)[:2])
        assert needed <= given == pytest.approx(limit / GIB, abs=0.01), words
    smaller = [words for words, _ in found if words.startswith("train.micro_batch=")]
    assert all(1 <= int(words.split()[0].split("=")[1]) < 4 for words in smaller)


def alone() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"))


def test_the_message_compares_and_offers_commands_without_what_they_replace(monkeypatch):
    cfg, shape = six_b()
    words = ["recipe=clm_pile", "zero=stage1", "zero.offload_optimizer=cpu", "run_dir=/a b"]
    story = OutOfMemory(cfg, words, Path("/a b"), alone())
    story.plan = plan(cfg, gpu_machine(1, 80), shape, 1)
    story.activity = "training"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70 * GIB)
    error = story.explain(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
    )
    assert isinstance(error, RunFailed) and error.exit_code == 1
    text = error.render()
    assert text.startswith(
        "while training: out of GPU memory: 2.50 GiB more were asked for, 1.00 GiB of 80.00 GiB are free"
    )
    assert (
        "weights 11.27 GiB" in text
        and "this rank holds 70.00 GiB" in text
        and "other programs hold 9.00 GiB" in text
    )
    commands = [line.strip() for line in text.splitlines() if "launch/train.py" in line]
    assert commands and all(
        line.startswith("deepspeed --num_gpus 1 launch/train.py recipe=clm_pile ")
        for line in commands
    )
    assert all("\"run_dir='/a b'\"" in line and line.count(" zero=") <= 1 for line in commands)


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)],
)
def test_the_allocators_own_errors_are_recognised(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_host_overflow(caught.value)
    text = (
        OutOfMemory(config(FullConfig()), [], Path("runs/x"), alone())
        .explain(caught.value)
        .render()
    )
    assert "out of host memory: 1073741824.00 GiB more were asked for" in text


def test_other_errors_pass_unchanged():
    error = RuntimeError("shape mismatch")
    assert OutOfMemory(config(FullConfig()), [], Path("runs/x"), alone()).explain(error) is error


def test_nothing_smaller_is_said():
    cfg = config(LoraConfig(), checkpointing=True, stage=2, quantize="nf4")
    story = OutOfMemory(cfg, [], Path("runs/x"), alone())
    story.plan = plan(cfg, CPU, ModelShape.from_config(TINY), 1)
    assert "Nothing smaller on this machine" in story.host_runs_out(1 << 20).render()


def test_a_process_that_is_short_of_memory_says_so_and_ends():
    script = (
        "import time; from finetune.training.out_of_memory import HostWatch\n"
        "with HostWatch(lambda free: print('free', free, flush=True), free=lambda: 5): time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "free 5\n")


def test_enough_memory_is_left_alone():
    with out_of_memory.HostWatch(
        lambda free: pytest.fail("not low"), free=lambda: 1 << 40
    ) as watch:
        assert watch.reserve <= 192 << 20


@pytest.mark.slow
def test_a_batch_that_does_not_fit_ends_the_run_before_its_first_step(tmp_path):
    """A limit on the address space makes a real allocation fail in a real run."""
    words = [
        "recipe=quickstart",
        "debug=tiny",
        "train.threads=1",
        "zero=stage0",
        "task.max_length=2048",
        "train.micro_batch=64",
        "train.global_batch=64",
        f"run_dir={tmp_path}",
    ]
    limit = 5_600_000_000
    done = subprocess.run(
        [sys.executable, "launch/train.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["step"]) == ("failed", 0)
    assert "while trying the longest batch: out of host memory" in result["error"]
    assert (
        "predicted for this rank" in result["error"]
        and "train.activation_checkpointing=true" in result["error"]
    )
    assert (tmp_path / "report.html").exists()
