"""Callbacks of a training run, and the list that forwards each event to all of them.

Flow: the trainer calls `CallbackList`, which calls each callback: metrics log, display, trackers,
report.
Order of a run: `restore` (only when resuming) -> `start` -> `train_step`, `evaluation`, `sample`,
`checkpoint` in the order they happen -> `finish`, also after a failure. `message` may come at any
time. Callbacks only observe: none can stop or change a run, and one that raises is disabled.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

log = logging.getLogger("finetune")


@dataclass
class RunInfo:
    """Facts about a run that are known just before its first step."""

    run_dir: Path
    name: str
    total_steps: int
    start_step: int = 0
    """Steps already done by earlier attempts: 0 unless resumed."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config as plain values."""
    parameters: dict[str, int] = field(default_factory=dict)
    """`total` and `trainable`, in parameters."""
    world_size: int = 1
    resumed: bool = False
    plan: dict[str, Any] | None = None
    """The object of plan.json."""
    data: dict[str, Any] = field(default_factory=dict)
    """Statistics of the data; `finetune/reporting/page/data.py` says which keys have a place on the page."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Versions and machine, with `overrides` (the words as typed) and `ranks_per_node`."""


class Callback:
    """Base class of callbacks. `record` is exactly the object on its line of metrics.jsonl."""

    def start(self, run: RunInfo) -> None: ...

    def train_step(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def answers(self, step: int, rows: list[dict[str, str]]) -> None:
        """Take an evaluation's answers: prompt, text, reference, and the set if there are several."""

    def checkpoint(self, step: int, path: str) -> None: ...

    def finish(self, result: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def state(self) -> dict[str, Any]:
        """Return the state to restore on resume, as JSON values; saved with every checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


class CallbackList(Callback):
    """Forward every event to all callbacks.

    A callback that raises is reported once and not called again; the run continues.
    """

    def __init__(self, callbacks: list[Callback]):
        self.callbacks = list(callbacks)

    def _forward(self, event: str, *args: Any) -> None:
        for callback in list(self.callbacks):
            self._call(callback, event, *args)

    start = partialmethod(_forward, "start")
    train_step = partialmethod(_forward, "train_step")
    evaluation = partialmethod(_forward, "evaluation")
    sample = partialmethod(_forward, "sample")
    answers = partialmethod(_forward, "answers")
    checkpoint = partialmethod(_forward, "checkpoint")
    finish = partialmethod(_forward, "finish")
    message = partialmethod(_forward, "message")

    def state(self) -> dict[str, Any]:
        """Return the callbacks' states by class name; callbacks without state are left out."""
        states = {type(c).__name__: self._call(c, "state") for c in list(self.callbacks)}
        return {name: state for name, state in states.items() if state}

    def restore(self, state: dict[str, Any]) -> None:
        for callback in list(self.callbacks):
            if (name := type(callback).__name__) in state:
                self._call(callback, "restore", state[name])

    def _call(self, callback: Callback, event: str, *args: Any) -> Any:
        try:
            return getattr(callback, event)(*args)
        except Exception as error:
            name = type(callback).__name__
            # A callback may end up here again from within its own event.
            if callback in self.callbacks:
                self.callbacks.remove(callback)
                log.warning(
                    "%s failed in %s and is switched off for this run; training goes on. %s: %s",
                    name,
                    event,
                    type(error).__name__,
                    error,
                )
                log.debug("where %s failed:", name, exc_info=error)
            return None
