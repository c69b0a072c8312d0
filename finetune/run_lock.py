"""One run at a time in a run directory: two would write over each other's checkpoints and metrics.

The lock goes with the process that holds it, however it ends. A run that was just stopped may still be saving, so a
newcomer waits for it before it refuses.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from finetune.errors import RunFailed, UserError

PATIENCE_SECONDS = 60.0


class RunLock:
    """Taken by rank 0 for as long as the run lasts."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / ".lock"
        self._descriptor: int | None = None

    def take(self, say=None) -> None:
        """Wait for the lock, a minute at most.

        Raises:
            RunFailed: another process goes on holding it.
            UserError: the directory cannot be written.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", str(self.path.parent), "Try run_dir=DIR.") from None
        deadline = time.monotonic() + PATIENCE_SECONDS
        told = False
        while not _locked(descriptor):
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise RunFailed(f"another run is at work here: {holder or 'unknown process'}", str(self.path.parent),
                                "Stop it (touch STOP in that directory), or choose another run_dir.")
            if say and not told:
                say(f"waiting for {holder or 'another process'} to leave this run directory")
                told = True
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nothing to go by
    return True
