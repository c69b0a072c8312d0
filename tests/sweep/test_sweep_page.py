"""sweep.html: places on its axes, who is best, and what a person reads; the live view without a terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from finetune.sweep.job import DONE, FAILED, Job
from finetune.sweep.page import (
    brief,
    build_sweep_page,
    lines,
    marks,
    metric_scale,
    scale_of,
    tone_of,
)
from finetune.sweep.search import Goal
from finetune.sweep.show import View, render, shortest


def job(n: int, status: str, value: float | None, lr: str, rank: str = "<4>") -> dict:
    return {
        "job": n,
        "status": status,
        "value": value,
        "chosen": {"optim.lr": lr, "adapter.rank": rank},
        "step": 6,
        "overrides": ["recipe=quickstart", f"optim.lr={lr}"],
        "run_dir": f"/x/{n}",
        "loss": value,
        "eval": {},
        "tokens_per_second": 10.0,
        "seconds": 61.0,
        "error": "it <broke>" if status == FAILED else None,
    }


JOBS = [job(2, DONE, 1.0, "1e-4"), job(0, DONE, 2.0, "1e-2"), job(1, FAILED, None, "1e-3", "8")]
SUMMARY = {
    "name": "s",
    "strategy": "grid",
    "total": 3,
    "words": [],
    "launcher": ["--num_gpus", "2"],
    "metric": "eval loss",
    "direction": "minimize",
    "best": 2,
    "jobs": JOBS,
}


def test_a_wide_spread_is_logarithmic_and_words_are_categories():
    rates = scale_of("optim.lr", [1e-4, 1e-2, 1e-3])
    assert (
        rates.log
        and rates.at(1e-3) == pytest.approx(0.5)
        and rates.at(1e-4) == pytest.approx(1 - rates.at(1e-2))
    )
    assert [text for _, text in rates.axis.ticks] == ["0.0001", "0.001", "0.01"]
    assert not scale_of("rank", [4.0, 8.0]).log and scale_of("x", [None]) is None
    words = scale_of("schedule", ["cosine", "linear", "cosine"])
    assert [words.at("cosine"), words.at("linear"), words.at("other")] == [0.25, 0.75, None]


def test_many_values_get_round_ticks():
    ticks = scale_of("warmup", [0.01 * n for n in range(1, 10)]).axis.ticks
    assert 3 <= len(ticks) <= 6


def test_lines_meet_the_axes_where_the_values_are():
    scales = [scale_of("optim.lr", [1e-4, 1e-2, 1e-3])]
    metric = metric_scale("loss", [1.0, 2.0])
    drawn = {line["job"]: line for line in lines(JOBS, scales, metric, tone_of(JOBS))}
    assert set(drawn) == {0, 2}, "a job without a figure has one point only"
    assert [drawn[n]["tone"] for n in (2, 0)] == [0, 100]
    x, y = re.findall(r"[\d.]+", drawn[2]["d"])[:2], re.findall(r"[\d.]+", drawn[2]["d"])[2:]
    assert [float(v) for v in x] == pytest.approx([0, 400 * (1 - scales[0].at(1e-4))], abs=0.1)
    assert [float(v) for v in y] == pytest.approx([1000, 400 * (1 - metric.at(1.0))], abs=0.1)
    drawn = marks(JOBS, scales[0], metric, tone_of(JOBS))
    assert {m["job"]: (m["x"], m["y"]) for m in drawn} == {
        n: (
            pytest.approx(100 * scales[0].at(lr), abs=0.01),
            pytest.approx(100 * metric.at(value), abs=0.01),
        )
        for n, lr, value in ((2, 1e-4, 1.0), (0, 1e-2, 2.0))
    }


def test_the_page_escapes_and_asks_nothing_of_the_network(tmp_path: Path):
    (tmp_path / "sweep.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "0").mkdir()
    (tmp_path / "0/report.html").write_text("")
    page = build_sweep_page(tmp_path).read_text()
    assert "it &lt;broke&gt;" in page and "<4>" not in page and "&lt;4&gt;" in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert 'href="0/report.html"' in page and 'href="1/output.log"' in page
    assert "deepspeed --num_gpus 2 launch/train.py recipe=quickstart optim.lr=1e-4" in page


def test_the_page_of_a_sweep_that_only_begins(tmp_path: Path):
    (tmp_path / "sweep.json").write_text(
        json.dumps(SUMMARY | {"best": None, "jobs": [job(0, "running", None, "1")]})
    )
    assert "No job has a figure yet" in build_sweep_page(tmp_path).read_text()


def test_a_sweep_that_was_stopped_is_not_running(tmp_path: Path):
    jobs = [job(0, DONE, 1.0, "1"), job(1, "stopped", None, "2"), job(2, "waiting", None, "3")]
    (tmp_path / "sweep.json").write_text(json.dumps(SUMMARY | {"jobs": jobs, "stopped": True}))
    page = build_sweep_page(tmp_path).read_text()
    assert "1 of 3 jobs done, stopped" in page and 'http-equiv="refresh"' not in page


def test_the_table_has_the_best_first_with_its_command():
    told = render(SUMMARY).splitlines()
    assert told[0].split() == ["job", "status", "eval", "loss", "lr", "rank", "steps", "time"]
    assert [line.split()[0] for line in told[1:4]] == ["2", "0", "1"] and "[1] it <broke>" in told
    assert any(line.startswith("best: job 2  eval loss 1.0000  optim.lr=1e-4") for line in told)


def test_short_names_and_figures():
    assert shortest(["optim.lr", "adapter.rank"]) == {"optim.lr": "lr", "adapter.rank": "rank"}
    assert shortest(["a.dropout", "b.dropout"]) == {
        "a.dropout": "a.dropout",
        "b.dropout": "b.dropout",
    }
    assert [brief(v) for v in ("0.00025687148", "cosine-annealing", "16")] == [
        "0.0002569",
        "cosine-annealing",
        "16",
    ]


def test_without_a_terminal_each_event_is_one_plain_line(tmp_path: Path):
    console = Console(file=io.StringIO(), force_terminal=False)
    view, one = View(Goal("loss", False), console), Job(3, tmp_path, ["a=1"], {"optim.lr": "1e-4"})
    view.open()
    view.started(one)
    one.status, one.error = FAILED, "no"
    view.show([one], [one], 1)
    view.ended(one)
    view.close()
    assert console.file.getvalue() == "[3] lr=1e-4\n[3] failed: no\n"


def test_a_sweep_in_a_folder_called_sweep_is_not_a_sweep_sweep(tmp_path: Path):
    for name, title in (
        ("sweep", "sweep"),
        ("lr-sweep", "lr-sweep"),
        ("20260101-120000", "sweep 20260101-120000"),
    ):
        (tmp_path / "sweep.json").write_text(json.dumps(SUMMARY | {"name": name}))
        assert f"<h1>{title}</h1>" in build_sweep_page(tmp_path).read_text()
