"""Callbacks: fan-out, one that fails, and state that survives a resume."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from finetune.reporting.callbacks import Callback, CallbackList, RunInfo


class Ear(Callback):
    def __init__(self):
        self.heard: list = []

    def train_step(self, record):
        self.heard.append(record["step"])

    def finish(self, result):
        self.heard.append(result["status"])

    def state(self):
        return {"heard": len(self.heard)}

    def restore(self, state):
        self.heard.append(("restored", state["heard"]))


class Broken(Callback):
    calls = 0

    def train_step(self, record):
        Broken.calls += 1
        raise OSError("disk full")


def test_a_failing_callback_is_reported_once_and_the_others_go_on(caplog):
    ear = Ear()
    callbacks = CallbackList([Broken(), ear])
    with caplog.at_level(logging.WARNING, "finetune"):
        for step in (1, 2, 3):
            callbacks.train_step({"step": step})
        callbacks.finish({"status": "done"})
    assert ear.heard == [1, 2, 3, "done"]
    assert Broken.calls == 1
    assert [
        record.getMessage() for record in caplog.records if "Broken" in record.getMessage()
    ] == [
        "Broken failed in train_step and is switched off for this run; training goes on. OSError: disk full"
    ]


def test_interrupts_are_not_swallowed():
    class Interrupted(Callback):
        def message(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CallbackList([Interrupted()]).message("hello")


def test_state_goes_back_to_the_callback_it_came_from():
    before, after = Ear(), Ear()
    before.train_step({"step": 1})
    state = CallbackList([Callback(), before]).state()
    assert state == {"Ear": {"heard": 1}}
    CallbackList([after, Callback()]).restore({**state, "Gone": {}})
    assert after.heard == [("restored", 1)]


def test_every_moment_reaches_the_callbacks(tmp_path: Path):
    moments = {
        "start": (RunInfo(tmp_path, "r", 1),),
        "train_step": ({"step": 1},),
        "evaluation": ({"step": 1},),
        "sample": (1, "a", "b"),
        "checkpoint": (1, "p"),
        "finish": ({},),
        "message": ("m",),
    }
    heard = []
    listener = Callback()
    for name in moments:
        setattr(listener, name, lambda *args, name=name: heard.append((name, args)))
    callbacks = CallbackList([listener])
    for name, args in moments.items():
        getattr(callbacks, name)(*args)
    assert heard == list(moments.items())
