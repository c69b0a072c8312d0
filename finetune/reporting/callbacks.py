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


class Callback:
    """Base class of callbacks. `record` is exactly the object on its line of metrics.jsonl."""

    def start(self, run: RunInfo) -> None: ...

    def train_step(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

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

    def start(self, run: RunInfo) -> None:
        self._tell("start", run)

    def train_step(self, record: dict[str, Any]) -> None:
        self._tell("train_step", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._tell("evaluation", record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._tell("sample", step, prompt, text)

    def checkpoint(self, step: int, path: str) -> None:
        self._tell("checkpoint", step, path)

    def finish(self, result: dict[str, Any]) -> None:
        self._tell("finish", result)

    def message(self, text: str) -> None:
        self._tell("message", text)

    def state(self) -> dict[str, Any]:
        """Return the callbacks' states by class name; callbacks without state are left out."""
        states = {}
        for callback in list(self.callbacks):
            try:
                state = callback.state()
            except Exception as error:
                self._disable(callback, "state", error)
                continue
            if state:
                states[type(callback).__name__] = state
        return states

    def restore(self, state: dict[str, Any]) -> None:
        for callback in list(self.callbacks):
            name = type(callback).__name__
            if name in state:
                self._call(callback, "restore", state[name])

    def _tell(self, moment: str, *args: Any) -> None:
        for callback in list(self.callbacks):
            self._call(callback, moment, *args)

    def _call(self, callback: Callback, moment: str, *args: Any) -> None:
        try:
            getattr(callback, moment)(*args)
        except Exception as error:
            self._disable(callback, moment, error)

    def _disable(self, callback: Callback, moment: str, error: Exception) -> None:
        if callback not in self.callbacks:
            return
        self.callbacks.remove(callback)
        log.warning(
            "%s failed in %s and is switched off for this run; training goes on. %s: %s",
            type(callback).__name__,
            moment,
            type(error).__name__,
            error,
        )
        log.debug("where %s failed:", type(callback).__name__, exc_info=error)
