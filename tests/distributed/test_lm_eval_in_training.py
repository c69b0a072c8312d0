"""lm-eval's tasks in training: at one rank, at two and with sharded weights; training itself is bitwise as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.cli.app import compose_config
from finetune.cli.evaluate import run as evaluate
from tests.distributed.ranks import losses, metrics, run_cases
from tests.lm_eval_tasks import NAMES, write_tasks

STEPS = 4


@pytest.mark.slow
def test_the_figures_are_those_of_the_evaluate_command_on_any_ranks(
    pocket_gptj: Path, unequal_documents: Path, tmp_path: Path
):
    folder = write_tasks(tmp_path, rows=12)

    def words(name: str, *more: str) -> list[str]:
        return [
            "recipe=clm_pile",
            f"model.path={pocket_gptj}",
            "model.dtype=fp32",
            "model.resid_pdrop=0.1",
            f"data.train={unequal_documents}",
            "data.eval=0.1",
            f"run_dir={tmp_path / name}",
            "task.max_length=64",
            f"train.steps={STEPS}",
            "train.global_batch=4",
            "train.eval_every=1",
            "export.enabled=false",
            "zero=stage1",
            *more,
        ]

    asks = [f"eval.lm_eval=[{','.join(NAMES)}]", f"eval.task_dir={folder}", "eval.lm_eval_limit=6"]
    ranked = ["train.eval_every=2", "train.metric=own_text/word_perplexity"]
    run_cases(
        2,
        [
            words("plain"),
            words("two", *asks, "eval.lm_eval_every=3"),
            words("sharded", *asks, *ranked, "zero=stage3"),
        ],
    )
    run_cases(1, [words("one", *asks, "eval.lm_eval_every=3")])
    plain, two, sharded, one = (tmp_path / name for name in ("plain", "two", "sharded", "one"))

    # Training does not notice, and only some evaluations ask: every third one and the last.
    assert losses(two) == losses(plain)
    evaluated = metrics(two, "eval")
    assert [r["loss"] for r in evaluated] == [r["loss"] for r in metrics(plain, "eval")]
    assert [r["step"] for r in evaluated if "lm_eval" in r] == [3, 4]
    assert [r["step"] for r in metrics(sharded, "eval") if "lm_eval" in r] == [2, 4]

    # The last step's figures: those of the evaluate command, whatever the ranks and the stage.
    command = ["suite=lm_eval", f"tasks=[{','.join(NAMES)}]", f"task_dir={folder}", "limit=6"]
    assert evaluate(compose_config([f"run={two}", *command], "evaluate")) == 0
    wanted = json.loads((two / "eval.json").read_text())["lm_eval"]["tasks"]
    for run in (one, two, sharded):
        found = json.loads((run / "result.json").read_text())["eval"]
        for task, name in (
            ("own_words", "acc"),
            ("own_text", "word_perplexity"),
            ("own_text", "bits_per_byte"),
            ("own_answer", "exact_match"),
        ):
            assert found[f"{task}/{name}"] == pytest.approx(wanted[task][name], rel=1e-4)
            assert found["lm_eval"][task][name] == found[f"{task}/{name}"]

    result = json.loads((sharded / "result.json").read_text())
    figures = {r["step"]: r["own_text/word_perplexity"] for r in metrics(sharded, "eval")}
    assert result["best_metric"] == "own_text/word_perplexity"
    assert result["best_step"] == min(figures, key=figures.__getitem__)
    assert "own_words/acc" in (sharded / "report.html").read_text()
