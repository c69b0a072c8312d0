"""glibc's heap in CPU runs: a step's freed memory is kept for the next step, and given back once it is full of holes.

By default every big tensor is mapped, paged in and unmapped anew; on two cores that is a fifth of a step. Kept
instead, memory is reused at once, but batches of unequal documents slowly tear the heap into pieces that fit nothing.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX
GROWTH = 1.1
"""Resident memory against its lowest since the last time, at which free pages are given back."""


def one_arena() -> None:
    """All threads share one heap: call it before there are any. Does nothing where the C library is not glibc."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """From now on free() keeps memory in the process. For steps that repeat, not for loading: what is read, cast and
    gathered once would stay, twice the size of the model at stage 3."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def release() -> None:
    """Give free pages back to the system."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


class Watch:
    """Calls `release` when a run's resident memory between steps has grown by `GROWTH`."""

    def __init__(self) -> None:
        self.lowest = 0

    def after_step(self, host_bytes: int) -> None:
        """Args: host_bytes: resident memory now."""
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
