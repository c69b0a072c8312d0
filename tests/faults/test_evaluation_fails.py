"""An evaluation that fails takes no step with it: what is due is saved before, and its outcome is marked afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.checkpointing.format import read_state, step_folder
from finetune.reporting import metrics_log
from tests.faults.jobs import words


def jobs(folder: Path) -> list[dict]:
    """A run without faults, and one whose first and whose last evaluation fail before it goes through."""
    evaluated = [
        f"data.eval={folder / 'data.jsonl'}",
        "train.eval_every=4",
        "train.eval_batch=2",
        "zero=stage2",
        "checkpoint.every=4",
        "checkpoint.best=true",
    ]
    failing = words(folder, folder / "failing", *evaluated)
    return [
        {"name": "whole", "words": words(folder, folder / "whole", *evaluated)},
        {"name": "first", "words": failing, "fault": "fail eval.batch nth=3"},
        {"name": "last", "words": failing, "fault": "fail eval.batch nth=25"},
        {"name": "again", "words": failing},
    ]


@pytest.mark.slow
@pytest.mark.fault(
    happens="an exception in an evaluation, between two saves and after the last step",
    then="the checkpoint due at that step is saved; the next start evaluates it and continues",
)
def test_the_step_is_saved_before_it_is_evaluated(outcome, folder):
    first, last, again = (outcome[name] for name in ("first", "last", "again"))
    assert 1 in first["codes"].values() and first["valid"] == [4], first["output"]
    assert 1 in last["codes"].values() and max(last["valid"]) == 10, last["output"]
    assert again["codes"] == {"0": 0, "1": 0}, again["output"]
    kept = ("kind", "step", "loss")
    lines = [
        [
            [record.get(key) for key in kept]
            for record in metrics_log.read(folder / name / "metrics.jsonl")
        ]
        for name in ("whole", "failing")
    ]
    assert lines[0] == lines[1] and [step for kind, step, _ in lines[0] if kind == "eval"] == [
        4,
        8,
        10,
    ]


@pytest.mark.slow
def test_the_checkpoint_learns_how_it_evaluated(outcome, folder):
    evaluated = {
        line["step"]: line["loss"]
        for line in metrics_log.read(folder / "whole/metrics.jsonl")
        if line["kind"] == "eval"
    }
    best = min(evaluated, key=lambda step: evaluated[step])
    for name in ("whole", "failing"):
        state = read_state(step_folder(folder / name / "checkpoints", 10))["state"]
        assert (state["best"], state["best_step"], state["owes_evaluation"]) == (
            evaluated[best],
            best,
            False,
        )
        assert step_folder(folder / name / "checkpoints", best).is_dir()
