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
from pathlib import Path

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


class LastWords:
    """The reasons why ranks ended, shared through files. Collective: every rank creates one."""

    def __init__(self, run_dir: Path, world: World):
        self.folder, self.world = run_dir / ".failed", world
        world.on_main(lambda: shutil.rmtree(self.folder, ignore_errors=True))
        self.processes: list[tuple[str, int]] = world.gather((socket.gethostname(), os.getpid()))

    def explain(self, error: BaseException) -> BaseException:
        """Return the error to report: `error`, or the failure on another rank that caused it."""
        if self.world.size == 1:
            return error
        if not _is_lost_connection(error):
            self.leave(error)
            return error
        found = self._of_others()
        return found or error

    def leave(self, error: BaseException) -> None:
        """Record why this rank ends, and disconnect so that the others notice at once."""
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({last[0].filename}:{last[0].lineno})" if last else ""
        text = (
            error.render()
            if isinstance(error, UserError)
            else f"{type(error).__name__}: {error}{where}"
        )
        self.write(text, error.exit_code if isinstance(error, UserError) else _exit_code(error))
        threading.Thread(target=disconnect, daemon=True).start()

    def write(self, text: str, code: int = EXIT_FAILED) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            file = self.folder / f"rank-{self.world.rank:05d}.json"
            told = {"rank": self.world.rank, "text": redact_text(text), "exit_code": code}
            write_json(file, told)
        except OSError:
            return  # a full disk must not hide the failure itself

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

    def _of_others(self) -> BaseException | None:
        """Return the reason that another rank left, or the death of a rank that left none."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            dead = [rank for rank in range(self.world.size) if self._gone(rank)]
            for file in sorted(self.folder.glob("rank-*.json")):
                return _as_error(read_json(file))
            if dead:
                return self._killed(dead)
            time.sleep(POLL_SECONDS)
        return None

    def _killed(self, ranks: list[int]) -> RunFailed:
        who = ", ".join(
            f"rank {rank} (process {self.processes[rank][1]} on {self.processes[rank][0]})"
            for rank in ranks
        )
        return RunFailed(
            f"{who} was killed and left no word",
            remedy="Out of memory is the usual reason: see `dmesg | tail`. "
            "Run the same command again to continue from the last checkpoint.",
        )

    def _gone(self, rank: int) -> bool:
        host, pid = self.processes[rank]
        if rank == self.world.rank or host != socket.gethostname():
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except OSError:
            return True


def _is_lost_connection(error: BaseException) -> bool:
    if isinstance(error, UserError):
        return False
    kinds = (torch_dist.DistError, ConnectionError)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
    )


def _exit_code(error: BaseException) -> int:
    return (
        error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else EXIT_FAILED
    )


def _as_error(told: dict) -> BaseException:
    if told["exit_code"] == EXIT_PREEMPTED:
        return Preempted(f"rank {told['rank']}, which was stopped")
    kind = RunFailed if told["exit_code"] == EXIT_FAILED else UserError
    return kind(f"rank {told['rank']} ended first: {told['text']}")
