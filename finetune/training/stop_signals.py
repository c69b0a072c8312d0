"""Requests to stop: signals, files in the run directory, a time limit, and a launcher that died.

During training they only set a flag, which the trainer reads between steps, where a checkpoint can
be written. Before, when there is nothing to save, and after, when the last step is saved, they end
the process immediately with exit code 75. A second Ctrl-C stops at once. DeepSpeed's launcher does
not forward signals and dies without notifying its ranks, so each rank also watches its ancestors.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from finetune.errors import Preempted

POLL_SECONDS = 1.0
DEAD_LAUNCHER = "the launcher's death"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_INTERRUPTED = 130
LAUNCHER_VARIABLE = "CROSS_RANK"
"""DeepSpeed's launcher sets it: where no launcher is above us although it is set, the launcher has died already."""


def end_on_signals() -> None:
    """Make signals end the process with exit code 75 until a run begins: nothing is lost."""

    def end(number: int, frame) -> None:
        if _held is not None:
            return _held.append(number)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Preempted(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, end)


_held: list[int] | None = None
"""Signals that wait for `deliver`; None: they do not wait. A mask would not do: other threads would take them."""


def hold() -> None:
    """Hold signals back from now on, while nothing could report that the run was stopped."""
    global _held
    _held = []


def deliver() -> None:
    """Deliver the signals that were held back since `hold`."""
    global _held
    waiting, _held = _held or [], None
    for number in waiting:
        signal.raise_signal(number)


class StopRequest:
    """A flag that becomes true once the run should save and end.

    Wrap the training itself in `with stop.flagged():`.

    Args:
        run_dir: a file STOP or SAVE in it is a request (checked by rank 0).
        max_time: seconds from now on after which to stop (checked by rank 0); 0: never.
    """

    def __init__(self, run_dir: Path, watch_files: bool, max_time: float = 0.0):
        self.run_dir, self.watch_files = run_dir, watch_files
        self.deadline = time.monotonic() + max_time if max_time and watch_files else math.inf
        self.reason = ""
        self._training, self._trained, self._orphaned, self._interrupts = False, False, False, 0
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._launcher = find_launcher()
        if self._launcher:
            self._watcher = threading.Thread(target=self._watch, daemon=True, name="launcher-watch")
            self._watcher.start()
        elif LAUNCHER_VARIABLE in os.environ:
            self._launcher_died()

    @contextmanager
    def flagged(self) -> Iterator[None]:
        """Make signals only set the flag inside this context; outside, they end the process.

        After a failed training, signals still only set the flag: the process ends with the failure,
        and the launcher, seeing another rank dead, sends SIGTERM while it is still being reported.
        """
        self._training = True
        yield
        self._training, self._trained = False, True

    def close(self, failed: bool = False) -> None:
        """Restore the signal handlers.

        After a failure, the launcher's SIGTERM must not cut the last message short.
        """
        self._closed.set()
        if self._watcher and self._watcher is not threading.current_thread():
            self._watcher.join(POLL_SECONDS)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if failed and number != signal.SIGINT else handler)

    def __bool__(self) -> bool:
        if not self.reason and self.watch_files and (self.run_dir / "STOP").exists():
            (self.run_dir / "STOP").unlink(missing_ok=True)
            self.reason = "file STOP"
        if not self.reason and time.monotonic() >= self.deadline:
            self.reason = "max_time"
        return bool(self.reason)

    def wants_save(self) -> bool:
        """Tell whether run_dir/SAVE requests a checkpoint now, and remove the file."""
        if self.watch_files and (self.run_dir / "SAVE").exists():
            (self.run_dir / "SAVE").unlink(missing_ok=True)
            return True
        return False

    def _handle(self, number: int, frame) -> None:
        if _held is not None:
            return _held.append(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(EXIT_INTERRUPTED)
        first = not self.reason
        self.reason = self.reason or (
            DEAD_LAUNCHER if self._orphaned else signal.Signals(number).name
        )
        if first and not self._training:
            raise Preempted(self.reason, self._trained)

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if ancestors(len(self._launcher)) != self._launcher:
                self._launcher_died()
                return

    def _launcher_died(self) -> None:
        self._orphaned = True
        os.kill(os.getpid(), signal.SIGTERM)


def ancestors(depth: int) -> list[psutil.Process]:
    """Return parent, grandparent, ... of this process, as far as they live."""
    with suppress(psutil.NoSuchProcess):  # one has died just now
        return psutil.Process().parents()[:depth]
    return []


def find_launcher() -> list[psutil.Process]:
    """Return the launcher above this process: [launch.py, deepspeed], [torchrun], or nothing."""
    above = ancestors(2)
    try:
        command = " ".join(above[0].cmdline())
    except (IndexError, psutil.Error):
        return []
    if "deepspeed" in command:
        return above
    return above[:1] if "torchrun" in command or "torch.distributed" in command else []
