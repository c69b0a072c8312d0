"""Process settings: glibc's heap, OpenMP's waiting threads, launchers' variables, standard output.

The heap in CPU runs: a step's freed memory is kept for the next step, and released once it is too
fragmented. By default every big tensor is mapped, paged in and unmapped anew; on two cores that is
a fifth of a step. Memory that is kept is reused at once, but batches of unequal documents slowly
fragment the heap into pieces that fit nothing. The few largest blocks of a step (`LARGE`) stay out
of it: between them small ones would settle, so that the next large one does not fit. Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import socket
from collections.abc import MutableMapping
from typing import Any, TextIO

from finetune.errors import UserError

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = (
    -1,
    -3,
    -8,
)  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX
LARGE = 32 << 20
"""Bytes of a block that has pages of its own and returns them when it is freed."""
GROWTH = 1.1
"""Resident memory against its lowest since the last time, at which free pages are given back."""


def one_arena() -> None:
    """Make all threads share one heap. Call it before there are any threads.

    Does nothing if the C library is not glibc.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Make free() keep memory in the process from now on, except that of large blocks.

    Use it for steps that repeat, not for loading: memory for reading, casting and gathering weights
    would stay, twice the size of the model at stage 3.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(MMAP_THRESHOLD, LARGE)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def release() -> None:
    """Return free pages to the system."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


class Watch:
    """Calls `release` when a run's resident memory between steps has grown by `GROWTH`."""

    def __init__(self) -> None:
        self.lowest = 0

    def after_step(self, host_bytes: int) -> None:
        """Release free memory if the resident memory has grown too much.

        Args:
            host_bytes: resident memory now.
        """
        self.lowest = min(self.lowest or host_bytes, host_bytes)
        if host_bytes > GROWTH * self.lowest:
            release()
            self.lowest = 0


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


# Variables that launchers put into the environment. Needs no torch.
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "ROLE_RANK",
    "TORCHELASTIC_RUN_ID",
)


def free_port() -> int:
    """Return a TCP port that nobody listens on at this moment.

    It lies below the ports that systems hand to connections by themselves (from 32768 on Linux), so
    that no connection takes it before the launcher's ranks have met there. Processes that choose at
    the same time choose at random.
    """
    for port in random.SystemRandom().sample(range(20000, 29000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise UserError("none of 100 ports between 20000 and 29000 is free")


# The time that an idle CPU thread spins before it sleeps; it must be set before torch is imported.
#
# GNU's OpenMP spins for 300,000 rounds, about a millisecond. If another program wants a core, the
# thread that all others wait for is itself waiting for a core, and the spinning threads keep it
# from getting one. 1000 rounds cost nothing on an idle machine and nearly double the speed on a
# shared one (docs/performance.md).
ROUNDS = "1000"


def spin_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set GOMP_SPINCOUNT unless the user configured how threads wait."""
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", ROUNDS)


# Standard output into a pipe whose reader has left, as `| head -1` leaves after one line. Python
# raises BrokenPipeError at the next write, and prints a traceback at exit if text is left over.
STDOUT = 1


def reader_has_left() -> bool:
    """Tell whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(STDOUT, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def drop_output() -> None:
    """Send everything that is still printed, buffered text included, nowhere."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), STDOUT)


class LastingOutput:
    """Standard output of a program that goes on without output when its reader has left.

    Everything but writing is the stream's own.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            drop_output()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            drop_output()
