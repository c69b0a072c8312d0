"""metrics.jsonl: strict JSON, flushed lines, torn lines, truncation before a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.reporting.metrics_log import (
    MetricsLog,
    newest,
    read,
    training_seconds,
    truncate,
    write_result,
)

RECORD = {
    "kind": "train",
    "step": 1,
    "loss": 2.5,
    "lr": 1e-4,
    "grad_norm": 1.0,
    "tokens": 512,
    "tokens_per_second": 100.0,
    "host_bytes": 1 << 30,
    "gpu_bytes": 0,
}


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def test_a_record_is_one_line_with_exactly_its_keys(tmp_path: Path):
    log = MetricsLog(tmp_path / "new")
    log.train_step(RECORD)
    evaluation = {"kind": "eval", "step": 1, "loss": 2.0, "perplexity": 7.39}
    log.evaluation(evaluation)
    # Still open: what is written must be readable at once.
    lines = (tmp_path / "new/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [RECORD, evaluation]


def test_nan_and_infinity_become_null_and_tensors_numbers(tmp_path: Path):
    log = MetricsLog(tmp_path)
    nan = float("nan")
    log.train_step(
        {
            "step": 1,
            "loss": nan,
            "grad_norm": float("inf"),
            "subsets": {"a": {"loss": nan}},
            "lr": torch.tensor(0.5),
            "tokens": np.int64(7),
            "bad": np.float32("nan"),
        }
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse_constant) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "subsets": {"a": {"loss": None}},
        "lr": 0.5,
        "tokens": 7,
        "bad": None,
    }


def test_lines_survive_a_kill(tmp_path: Path):
    code = (
        "import os, sys; from finetune.reporting.metrics_log import MetricsLog; log = MetricsLog(sys.argv[1]);"
        "[log.train_step({'step': s}) for s in range(1, 6)]; os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == -9
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "torn", [b'{"kind": "train", "st', b'{"step": 9, "text": "\xc3', b"12", b""]
)
def test_a_torn_last_line_is_left_out_and_later_lines_are_not_lost(tmp_path: Path, torn: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert read(path) == [{"step": 1}, {"step": 2}]
    MetricsLog(tmp_path).train_step({"step": 3})
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_truncate_drops_what_the_checkpoint_does_not_know(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    steps = [("train", 1), ("eval", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]
    path.write_text(
        "".join(json.dumps({"kind": k, "step": s}) + "\n" for k, s in steps) + '{"kind": "tr'
    )
    assert truncate(path, 2) == 3
    assert [(record["kind"], record["step"]) for record in read(path)] == steps[:4]
    assert list(tmp_path.iterdir()) == [path], "no scratch file may stay"
    log = MetricsLog(tmp_path)
    log.train_step({"kind": "train", "step": 3})
    assert [record["step"] for record in read(path)] == [1, 1, 2, 2, 3]


def test_truncate_to_nothing_and_without_a_file(tmp_path: Path):
    assert truncate(tmp_path / "metrics.jsonl", 5) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert truncate(tmp_path / "metrics.jsonl", 0) == 1
    assert read(tmp_path / "metrics.jsonl") == []


def test_result_replaces_the_old_one_whole(tmp_path: Path):
    write_result(tmp_path, {"status": "failed", "loss": float("nan"), "error": "x" * 5000})
    path = write_result(tmp_path, {"status": "done", "loss": 1.0})
    assert json.loads(path.read_text()) == {"status": "done", "loss": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_run_logged_tells_of_its_time_and_of_a_step(tmp_path: Path):
    log = MetricsLog(tmp_path)
    assert training_seconds(tmp_path) == 0 and newest(tmp_path) == ({}, {})
    log.train_step({**RECORD, "step": 1, "tokens": 500, "tokens_per_second": 100.0})
    log.evaluation({"kind": "eval", "step": 2, "loss": 2.0, "perplexity": 7.39})
    log.train_step({**RECORD, "step": 2, "loss": 2.25, "tokens": 800, "tokens_per_second": 50.0})
    assert training_seconds(tmp_path) == 500 / 100 + 300 / 50
    trained, metrics = newest(tmp_path)
    assert (
        trained["step"] == 2
        and trained["loss"] == 2.25
        and metrics == {"loss": 2.0, "perplexity": 7.39}
    )
    trained, metrics = newest(tmp_path, 1)
    assert trained["step"] == 1 and trained["loss"] == 2.5 and metrics == {}
