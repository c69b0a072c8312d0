"""Requests to stop: signals, files in the run directory, and a launcher that died.

They only raise a flag; the trainer looks at it between steps, where a checkpoint can be written. A second Ctrl-C
stops at once. DeepSpeed's launcher does not pass signals on and dies without telling its ranks, so each rank also
watches its ancestors.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

POLL_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Becomes true once the run should save and end; `save` asks for a checkpoint without ending.

    Args:
        run_dir: a file STOP or SAVE in it is a request (rank 0 looks).
    """

    def __init__(self, run_dir: Path, watch_files: bool):
        self.run_dir, self.watch_files = run_dir, watch_files
        self.reason = ""
        self._interrupts = 0
        for number in SIGNALS:
            signal.signal(number, self._handle)
        launcher = _launcher()
        if launcher:
            threading.Thread(target=self._watch, args=(launcher,), daemon=True, name="launcher-watch").start()

    def __bool__(self) -> bool:
        if not self.reason and self.watch_files and (self.run_dir / "STOP").exists():
            (self.run_dir / "STOP").unlink(missing_ok=True)
            self.reason = "file STOP"
        return bool(self.reason)

    def wants_save(self) -> bool:
        """Whether run_dir/SAVE asks for a checkpoint now; the file is taken away."""
        if self.watch_files and (self.run_dir / "SAVE").exists():
            (self.run_dir / "SAVE").unlink(missing_ok=True)
            return True
        return False

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(130)
        self.reason = self.reason or signal.Signals(number).name

    def _watch(self, launcher: list[int]) -> None:
        wait = threading.Event()
        while not wait.wait(POLL_SECONDS):
            if _ancestors(len(launcher)) != launcher:
                self.reason = self.reason or "the launcher died"
                return


def _ancestors(depth: int) -> list[int]:
    """Process ids of parent, grandparent, ...; 1 or 0 where the line was cut."""
    found, pid = [], os.getpid()
    for _ in range(depth):
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            pid = 0
        found.append(pid)
        if pid <= 1:
            break
    return found


def _launcher() -> list[int]:
    """The launcher's process ids above us: [launch.py, deepspeed] or [torchrun]; empty without a launcher."""
    parents = _ancestors(2)
    try:
        command = Path(f"/proc/{parents[0]}/cmdline").read_bytes()
    except OSError:
        return []
    if b"deepspeed" in command:
        return parents
    return parents[:1] if b"torchrun" in command or b"torch.distributed" in command else []
