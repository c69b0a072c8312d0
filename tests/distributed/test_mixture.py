"""A mixture goes on bitwise after a resume, across epochs, and is the same at one rank and at two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.cli.app import compose_config
from finetune.cli.evaluate import run as evaluate
from tests.distributed.ranks import losses, metrics, run_cases

STEPS, CUT = 8, 3


@pytest.mark.slow
def test_a_mixture_resumes_bitwise_and_does_not_depend_on_the_ranks(
    pocket_gptj: Path, unequal_documents: Path, tmp_path: Path
):
    lines = unequal_documents.read_text().splitlines(keepends=True)
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_text("".join(lines[:20]))
    large.write_text("".join(lines[20:]))

    def words(run: Path, *more: str) -> list[str]:
        return [
            "recipe=clm_pile",
            f"model.path={pocket_gptj}",
            "model.dtype=fp32",
            f"data.train=[{{path: {small}, weight: 2}}, {{path: {large}, weight: 1}}]",
            "data.eval=0.1",
            f"run_dir={run}",
            "task.max_length=128",
            f"train.steps={STEPS}",
            "train.global_batch=8",
            "train.micro_batch=2",
            "train.eval_every=4",
            "eval.generate=3",
            "eval.generate_tokens=6",
            "train.metric=chrf",
            f"checkpoint.every={CUT}",
            "checkpoint.keep=5",
            "export.enabled=false",
            "zero=stage1",
            *more,
        ]

    two, one, resumed = tmp_path / "two", tmp_path / "one", tmp_path / "resumed"
    run_cases(2, [words(two)])
    shutil.copytree(two, resumed)
    for later in (resumed / "checkpoints").glob("step-*"):
        if int(later.name[5:]) > CUT:
            shutil.rmtree(later)
    run_cases(2, [words(resumed)])
    run_cases(1, [words(one)])

    def sources(run: Path) -> list[dict]:
        return [record["sources"] for record in metrics(run)]

    assert losses(resumed) == losses(two)
    assert metrics(resumed, "eval")[-1]["loss"] == metrics(two, "eval")[-1]["loss"]
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    assert sources(one) == sources(two) == sources(resumed)
    # Two thirds of the tokens are the small file's, of which an epoch has several passes.
    stats = json.loads((two / "data_stats.json").read_text())
    assert sum(part["drawn"] for part in stats["train"]["sources"].values()) < STEPS * 8
    given = {name: counts["tokens"] for name, counts in sources(two)[-1].items()}
    assert sum(given.values()) == metrics(two)[-1]["tokens"]
    assert given["small.jsonl"] / sum(given.values()) == pytest.approx(2 / 3, abs=0.05)
    assert "Sources trained on" in (two / "report.html").read_text()
    # So are generated answers, of which a resumed run has each once.
    answers = [json.loads(line) for line in (two / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in answers] == [4] * 3 + [8] * 3
    assert all(
        (run / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
        for run in (one, resumed)
    )
    best = json.loads((two / "result.json").read_text())
    chrf = {record["step"]: record["chrf"] for record in metrics(two, "eval")}
    assert best["best_metric"] == "chrf" and chrf[best["best_step"]] == max(chrf.values())
    # The rows that a run held out are found again, on any ranks.
    assert evaluate(compose_config([f"run={one}"], "evaluate")) == 0
    again = json.loads((one / "eval.json").read_text())
    assert again["loss"] == pytest.approx(metrics(one, "eval")[-1]["loss"], rel=1e-6)
    assert again["tokens"] == metrics(one, "eval")[-1]["tokens"]
    # Other weights are another order: refused, and told.
    with pytest.raises(AssertionError, match="data: was"):
        run_cases(1, [words(one, f"data.train=[{small},{large}]", "train.steps=9")])
