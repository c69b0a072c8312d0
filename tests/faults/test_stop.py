"""Signals to the launcher, to one rank and to all, and the files STOP and SAVE: saved, exit code 75, nothing runs on.

All stops follow each other in one directory, so each also shows that the run continued after the one before.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from finetune.errors import Preempted
from finetune.reporting import metrics_log
from finetune.training.stop_signals import StopRequest
from tests.faults.jobs import words

COMPARED = 30
LONG = ["zero=stage2", "train.steps=4000", "optim.schedule=constant", "checkpoint.every=0"]
TARGETS = {
    "launcher": ["launcher"],
    "one rank": ["1"],
    "all ranks": ["0", "1"],
    "everyone": ["launcher", "0", "1"],
}
STOPS = [
    (send, to)
    for send in ("SIGTERM", "SIGINT", "SIGUSR1")
    for to in ("launcher", "one rank", "all ranks")
]
STOPS += [("SIGKILL", "launcher"), ("SIGINT", "everyone"), ("STOP", "run_dir")]


def name(send: str, to: str) -> str:
    return f"{send} to {to}"


def jobs(folder: Path) -> list[dict]:
    run = words(folder, folder / "stops", *LONG)
    found = [
        {
            "name": "not stopped",
            "words": words(folder, folder / "not-stopped", *LONG, f"train.steps={COMPARED}"),
        }
    ]
    for send, to in STOPS:
        action = (
            {"steps": 2, "touch": "STOP"}
            if send == "STOP"
            else {"steps": 2, "send": send, "to": TARGETS[to]}
        )
        found.append({"name": name(send, to), "words": run, "actions": [action]})
    found.append(
        {
            "name": "SAVE",
            "words": run,
            "actions": [
                {"steps": 2, "touch": "SAVE"},
                {"steps": 10, "send": "SIGTERM", "to": ["0"]},
            ],
        }
    )
    found.append(
        {
            "name": "early",
            "words": words(folder, folder / "early"),
            "fault": "stop run.begin",
            "actions": [{"exists": ".lock", "send": "SIGTERM", "to": ["0", "1"]}],
        }
    )
    found.append(
        {
            "name": "twice",
            "words": words(folder, folder / "twice"),
            "fault": "stop save.begin rank=1",
            "actions": [
                {"steps": 2, "send": "SIGINT", "to": ["1"]},
                {"steps": 2, "send": "SIGINT", "to": ["1"]},
            ],
        }
    )
    evaluated = [
        f"data.eval={folder / 'data.jsonl'}",
        "train.eval_every=4",
        "train.eval_batch=2",
        "zero=stage3",
    ]
    found.append({"name": "evaluated", "words": words(folder, folder / "evaluated", *evaluated)})
    stopped = words(folder, folder / "evaluated-in-parts", *evaluated)
    found.append(
        {"name": "evaluation 1", "words": stopped, "fault": "term eval.batch rank=1 nth=3"}
    )
    found.append(
        {"name": "evaluation 2", "words": stopped, "fault": "term eval.batch rank=0 nth=25"}
    )
    found.append({"name": "evaluation 3", "words": stopped})
    return found


@pytest.mark.slow
@pytest.mark.fault(
    happens="SIGTERM, SIGINT, SIGUSR1 (and SIGKILL) to the launcher; SIGTERM, SIGINT, SIGUSR1 to one rank or "
    "to all; Ctrl-C to everyone; a file STOP",
    then="the step is finished, a checkpoint saved, every rank ends with 75 within 30 s",
)
@pytest.mark.parametrize(("send", "to"), STOPS)
def test_a_stop_saves_and_ends_every_process(outcome, send, to):
    names = [name(*stop) for stop in STOPS]
    found = outcome[name(send, to)]
    position = names.index(name(send, to))
    start = outcome[names[position - 1]]["result"]["step"] if position else 0
    assert found["codes"] == {"0": 75, "1": 75}, found["output"]
    assert not found["timeout"] and found["after_signal"] < 30
    assert found["result"]["status"] == "preempted" and found["result"]["step"] > start
    assert max(found["valid"]) == found["result"]["step"] and found["staging"] == []


@pytest.mark.slow
def test_the_stopped_run_is_the_one_that_was_not(outcome):
    whole = outcome["not stopped"]["losses"]
    found = outcome[name(*STOPS[-1])]["losses"]
    assert len(whole) == COMPARED <= len(found)
    assert {step: found[step] for step in whole} == whole


@pytest.mark.slow
@pytest.mark.fault(happens="a file SAVE", then="a checkpoint is saved, and the run continues")
def test_a_file_save_saves_and_goes_on(outcome):
    found = outcome["SAVE"]
    saved, last = sorted(found["valid"])[-2:]
    assert last == found["result"]["step"] and saved < last
    assert found["codes"] == {"0": 75, "1": 75}


@pytest.mark.slow
@pytest.mark.fault(
    happens="a signal while data and model are still loading",
    then="exit code 75 at once; there is nothing to save",
)
def test_a_signal_before_the_first_step(outcome):
    found = outcome["early"]
    assert found["codes"] == {"0": 75, "1": 75} and found["result"]["status"] == "preempted", found[
        "output"
    ]


def test_a_signal_after_the_last_step_says_that_it_is_saved(tmp_path):
    stop = StopRequest(tmp_path, watch_files=True)
    try:
        with stop.flagged():
            pass
        with pytest.raises(Preempted, match="stopped by SIGTERM; the last step is saved"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        stop.close()


@pytest.mark.slow
@pytest.mark.fault(happens="a second Ctrl-C", then="it stops at once, without saving")
def test_a_second_interrupt_ends_at_once(outcome):
    found = outcome["twice"]
    assert found["codes"]["1"] == 130 and not found["timeout"] and found["valid"] == [], found[
        "output"
    ]


@pytest.mark.slow
@pytest.mark.fault(
    happens="a signal in the middle of an evaluation",
    then="the evaluation stops, the step is saved, exit code 75; the next start evaluates it, with the same figures",
)
def test_an_evaluation_is_broken_off_and_made_up_for(outcome, folder):
    first, second, third = (outcome[f"evaluation {n}"] for n in (1, 2, 3))
    assert first["codes"] == second["codes"] == {"0": 75, "1": 75}, (
        first["output"] + second["output"]
    )
    assert first["result"]["step"] == 4 and second["result"]["step"] == 10
    assert third["codes"] == {"0": 0, "1": 0} and third["result"]["status"] == "done", third[
        "output"
    ]
    assert third["result"]["eval"] == outcome["evaluated"]["result"]["eval"]
    kept = ("kind", "step", "loss")
    lines = [
        [
            [record.get(key) for key in kept]
            for record in metrics_log.read(folder / name / "metrics.jsonl")
        ]
        for name in ("evaluated", "evaluated-in-parts")
    ]
    assert lines[0] == lines[1] and [line[1] for line in lines[0] if line[0] == "eval"] == [
        4,
        8,
        10,
    ]
