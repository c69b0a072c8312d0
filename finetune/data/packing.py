"""Rows made of segments: which tokens of which examples share a sequence of at most `max_length`.

Flow: a store's offsets -> Rows, by one of four policies -> `collate` cuts the segments out. No token is copied here
and segments of one row never attend to each other. Three documents a b c, max_length 4:

    tokens               a a a a a a | b b | c c c
    stream_blocks        [a a a a] [a a|b b] [c c c]        nothing lost, the last row may be short
    document_chunks      [a a a a] [a a] [b b] [c c c]      rows hold one document each
    best_fit             whole examples only (here max_length 6): [a a a a a a] [c c c|b b]
    one_per_row          [a a a a a a] [b b] [c c c]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """S segments in R rows; row r has segments pointers[r] to pointers[r + 1]."""

    starts: np.ndarray
    """(S,) int64: offset of the segment's first token in the store."""
    lengths: np.ndarray
    """(S,) int32: its length in tokens, at least 1."""
    examples: np.ndarray
    """(S,) int64: the example that it belongs to."""
    pointers: np.ndarray
    """(R + 1,) int64."""

    def __len__(self) -> int:
        return len(self.pointers) - 1


def stream_blocks(offsets: np.ndarray, max_length: int) -> Rows:
    """All documents one after another, cut every `max_length` tokens, their boundaries kept as segments."""
    offsets = np.asarray(offsets)
    row_starts = np.arange(0, offsets[-1], max_length, dtype=np.int64)
    starts = np.union1d(offsets[:-1][np.diff(offsets) > 0], row_starts)
    lengths = np.diff(starts, append=offsets[-1:])
    pointers = np.append(np.searchsorted(starts, row_starts), len(starts))
    return Rows(starts, lengths.astype(np.int32), _example_of(offsets, starts), pointers)


def document_chunks(offsets: np.ndarray, max_length: int) -> Rows:
    """Every document in rows of its own, each `max_length` long but for its last."""
    offsets = np.asarray(offsets)
    lengths = np.diff(offsets)
    counts = -(-lengths // max_length)
    examples = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(examples)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[examples] + nth * max_length
    cut = np.minimum(offsets[examples + 1] - starts, max_length)
    return Rows(starts, cut.astype(np.int32), examples, np.arange(len(starts) + 1))


def one_per_row(offsets: np.ndarray) -> Rows:
    """Row i is example i."""
    offsets = np.asarray(offsets)
    n = len(offsets) - 1
    return Rows(
        offsets[:-1].copy(), np.diff(offsets).astype(np.int32), np.arange(n), np.arange(n + 1)
    )


def best_fit(offsets: np.ndarray, max_length: int) -> Rows:
    """Whole examples packed by best-fit decreasing: each into the fullest row that still has room.

    Examples of one length are placed together, and rows with equal room are interchangeable, so the work grows with
    the number of different lengths and not with the number of examples. Rows are ordered by their first example.
    """
    offsets = np.asarray(offsets)
    lengths = np.diff(offsets)
    assert lengths.max(initial=0) <= max_length, "an example is longer than a row"
    row_of = _assign(lengths, max_length)
    order = np.argsort(row_of, kind="stable")
    order = order[lengths[order] > 0]
    firsts = np.flatnonzero(np.diff(row_of[order], prepend=-1))
    sizes = np.diff(firsts, append=len(order))
    by_first = np.argsort(order[firsts])
    examples = order[_ranges(firsts[by_first], sizes[by_first])]
    pointers = np.concatenate([[0], np.cumsum(sizes[by_first])])
    return Rows(offsets[examples], lengths[examples].astype(np.int32), examples, pointers)


def efficiency(rows: Rows, max_length: int) -> float:
    """Share of the rows' positions that hold a token."""
    return float(rows.lengths.sum(dtype=np.int64)) / max(1, len(rows) * max_length)


def _assign(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """The row of every example; rows are numbered in the order in which they are opened."""
    row_of = np.zeros(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    distinct, starts = np.unique(-lengths[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    rooms = _Rooms(max_length)
    for length, start, end in zip(
        (-distinct).tolist(), starts.tolist(), ends.tolist(), strict=True
    ):
        while length > 0 and start < end:
            rows, each = rooms.take(length, end - start)
            placed = np.repeat(rows, each)[: end - start]
            row_of[order[start : start + len(placed)]] = placed
            start += len(placed)
            rooms.give_back(rows, each, length, len(placed))
    return row_of


class _Rooms:
    """Open rows by the room they have left."""

    def __init__(self, max_length: int):
        self.max_length, self.opened, self.room = max_length, 0, 0
        self._rows: list[list[np.ndarray]] = [[] for _ in range(max_length + 1)]
        self._any = np.zeros(max_length + 1, bool)

    def take(self, length: int, wanted: int) -> tuple[np.ndarray, int]:
        """Rows with the least room that fits `length`, and how many of that length each of them takes."""
        self.room = length + int(np.argmax(self._any[length:]))
        if not self._any[self.room]:
            self.room = self.max_length
            n_rows = -(-wanted // (self.room // length))
            self.opened += n_rows
            return np.arange(self.opened - n_rows, self.opened), self.room // length
        each = self.room // length
        return self._pop(-(-wanted // each)), each

    def give_back(self, rows: np.ndarray, each: int, length: int, placed: int) -> None:
        full = placed // each
        self._push(self.room - each * length, rows[:full])
        # Only the last row may have got fewer: the examples of this length ran out.
        self._push(self.room - (placed - full * each) * length, rows[full:])

    def _pop(self, n_rows: int) -> np.ndarray:
        stack = self._rows[self.room]
        rows = stack.pop()
        if len(rows) > n_rows:
            stack.append(rows[n_rows:])
        self._any[self.room] = bool(stack)
        return rows[:n_rows]

    def _push(self, room: int, rows: np.ndarray) -> None:
        if len(rows) and room:
            self._rows[room].append(rows)
            self._any[room] = True


def _example_of(offsets: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(offsets, starts, side="right") - 1


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[starts[0], .. + sizes[0]), [starts[1], ..), ... one after another."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
