"""Find the first failure among the ranks of a run, not the lost connections that follow it.

A rank that fails writes its reason to run_dir/.failed/rank-N.json. The others lose their connection
to it, wait a moment for that file, and pass the reason on. A rank that left no reason although its
process is gone was killed.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import psutil
import torch.distributed as torch_dist

from finetune.dist import World, disconnect
from finetune.errors import EXIT_FAILED, EXIT_PREEMPTED, Preempted, RunFailed, UserError
from finetune.files import read_json, write_json
from finetune.reporting.redact import redact_text

PATIENCE_SECONDS = 5.0
POLL_SECONDS = 0.2
LOST = (
    "gloo/transport",
    "onnection closed by peer",
    "onnection reset",
    "Broken pipe",
    "NCCL",
    "ncclRemoteError",
    "failed to recv",
    "failed to send",
    "TCPStore",
)
"""Words of errors that only say that another rank cannot be reached."""


class RankFailures:
    """Reasons for which ranks ended, shared through files. Collective: every rank creates one."""

    def __init__(self, run_dir: Path, world: World):
        self.folder, self.world = run_dir / ".failed", world
        world.on_main(lambda: shutil.rmtree(self.folder, ignore_errors=True))
        self.processes: list[tuple[str, int]] = world.gather((socket.gethostname(), os.getpid()))

    def explain(self, error: BaseException) -> BaseException:
        """Return the error to report: `error`, or the failure on another rank that caused it.

        An error of this rank's own is recorded for the others, and this rank disconnects, so that
        they notice at once.
        """
        if self.world.size == 1:
            return error
        lost = isinstance(error, (torch_dist.DistError, ConnectionError)) or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
        )
        if lost and not isinstance(error, UserError):
            return self._cause() or error
        if isinstance(error, UserError):
            self.write(error.render(), error.exit_code)
        else:
            last = traceback.extract_tb(error.__traceback__)[-1:]
            where = f" ({last[0].filename}:{last[0].lineno})" if last else ""
            code = error.code if isinstance(error, SystemExit) else EXIT_FAILED
            text = f"{type(error).__name__}: {error}{where}"
            self.write(text, code if isinstance(code, int) else EXIT_FAILED)
        threading.Thread(target=disconnect, daemon=True).start()
        return error

    def write(self, text: str, code: int = EXIT_FAILED) -> None:
        """Record why this rank ends."""
        record = {"rank": self.world.rank, "text": redact_text(text), "exit_code": code}
        with suppress(OSError):  # a full disk must not hide the failure itself
            write_json(self.folder / f"rank-{self.world.rank:05d}.json", record)

    def speaks(self) -> bool:
        """Tell whether this rank writes the run's result.

        It is rank 0, or the first rank alive if rank 0 was killed.
        """
        return all(self._gone(rank) for rank in range(self.world.rank))

    def say(self, error: BaseException) -> None:
        """Print a reason in place of rank 0, which cannot."""
        if not self.world.main and isinstance(error, UserError):
            print(f"error: {redact_text(error.render())}", file=sys.stderr, flush=True)
            error.spoken = True

    def _cause(self) -> BaseException | None:
        """Return why another rank ended; a process that is gone without a record was killed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            dead = [rank for rank in range(self.world.size) if self._gone(rank)]
            for file in sorted(self.folder.glob("rank-*.json")):
                record = read_json(file)
                if record["exit_code"] == EXIT_PREEMPTED:
                    return Preempted(f"rank {record['rank']}, which was stopped")
                kind = RunFailed if record["exit_code"] == EXIT_FAILED else UserError
                return kind(f"rank {record['rank']} ended first: {record['text']}")
            if dead:
                named = [(rank, *self.processes[rank]) for rank in dead]
                who = ", ".join(
                    f"rank {rank} (process {pid} on {host})" for rank, host, pid in named
                )
                return RunFailed(
                    f"{who} was killed and left no word",
                    remedy="Out of memory is the usual reason: see `dmesg | tail`. "
                    "Run the same command again to continue from the last checkpoint.",
                )
            time.sleep(POLL_SECONDS)
        return None

    def _gone(self, rank: int) -> bool:
        """Tell whether the process of another rank on this machine has ended."""
        host, pid = self.processes[rank]
        if rank == self.world.rank or host != socket.gethostname():
            return False
        try:
            return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True
