"""Packing: which tokens of which examples share a sequence of at most `max_length`.

Flow: a store's offsets -> Sequences, by one of four policies -> `collate` cuts the segments out. No token is copied
here, and segments of one sequence never attend to each other. Three documents a b c, max_length 4:

    tokens               a a a a a a | b b | c c c
    stream_blocks        [a a a a] [a a|b b] [c c c]        nothing lost, the last sequence may be short
    document_chunks      [a a a a] [a a] [b b] [c c c]      a sequence holds one document
    best_fit             whole examples only (here max_length 6): [a a a a a a] [c c c|b b]
    one_per_sequence     [a a a a a a] [b b] [c c c]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sequences:
    """S segments in R sequences; sequence r has segments pointers[r] to pointers[r + 1]."""

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


def stream_blocks(offsets: np.ndarray, max_length: int) -> Sequences:
    """Cut the stream of all documents every `max_length` tokens; documents end segments."""
    offsets = np.asarray(offsets)
    sequence_starts = np.arange(0, offsets[-1], max_length, dtype=np.int64)
    starts = np.union1d(offsets[:-1][np.diff(offsets) > 0], sequence_starts)
    lengths = np.diff(starts, append=offsets[-1:])
    pointers = np.append(np.searchsorted(starts, sequence_starts), len(starts))
    examples = np.searchsorted(offsets, starts, side="right") - 1
    return Sequences(starts, lengths.astype(np.int32), examples, pointers)


def document_chunks(offsets: np.ndarray, max_length: int) -> Sequences:
    """Cut every document into sequences of its own, each `max_length` long but for its last."""
    offsets = np.asarray(offsets)
    lengths = np.diff(offsets)
    counts = -(-lengths // max_length)
    examples = np.repeat(np.arange(len(lengths)), counts)
    starts = offsets[examples] + ranges(np.zeros_like(counts), counts) * max_length
    cut = np.minimum(offsets[examples + 1] - starts, max_length)
    return Sequences(starts, cut.astype(np.int32), examples, np.arange(len(starts) + 1))


def one_per_sequence(offsets: np.ndarray) -> Sequences:
    """Make sequence i of example i."""
    offsets = np.asarray(offsets)
    n = len(offsets) - 1
    return Sequences(
        offsets[:-1].copy(), np.diff(offsets).astype(np.int32), np.arange(n), np.arange(n + 1)
    )


def best_fit(offsets: np.ndarray, max_length: int) -> Sequences:
    """Pack whole examples by best-fit decreasing: each into the fullest sequence that has room.

    Sequences are ordered by their first example. Examples of one length are placed together, and
    sequences with equal room are interchangeable, so the work grows with the number of different
    lengths and not with the number of examples.
    """
    offsets = np.asarray(offsets)
    lengths = np.diff(offsets)
    assert lengths.max(initial=0) <= max_length, "an example is longer than a sequence"

    # The sequence of every example; sequences are numbered in the order in which they are opened.
    sequence_of = np.zeros(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    distinct, starts = np.unique(-lengths[by_length], return_index=True)
    ends = np.append(starts[1:], len(by_length)).tolist()
    open_sequences = _OpenSequences(max_length)
    for length, start, end in zip((-distinct).tolist(), starts.tolist(), ends, strict=True):
        while length > 0 and start < end:
            taken = open_sequences.place(length, end - start)
            sequence_of[by_length[start : start + len(taken)]] = taken
            start += len(taken)

    order = np.argsort(sequence_of, kind="stable")
    order = order[lengths[order] > 0]
    firsts = np.flatnonzero(np.diff(sequence_of[order], prepend=-1))
    sizes = np.diff(firsts, append=len(order))
    by_first = np.argsort(order[firsts])
    examples = order[ranges(firsts[by_first], sizes[by_first])]
    pointers = np.concatenate([[0], np.cumsum(sizes[by_first])])
    return Sequences(offsets[examples], lengths[examples].astype(np.int32), examples, pointers)


def split_pairs(sequences: Sequences, split: np.ndarray) -> Sequences:
    """Cut every segment, a whole example each, in two behind its first `split[example]` tokens."""
    first = split[sequences.examples]
    return Sequences(
        np.stack([sequences.starts, sequences.starts + first], 1).ravel(),
        np.stack([first, sequences.lengths - first], 1).ravel().astype(np.int32),
        np.repeat(sequences.examples, 2),
        2 * sequences.pointers,
    )


class _OpenSequences:
    """Sequences by the room they have left, each group in arrays of their numbers."""

    def __init__(self, max_length: int):
        self.max_length, self.opened = max_length, 0
        self._by_room: list[list[np.ndarray]] = [[] for _ in range(max_length + 1)]
        self._any = np.zeros(max_length + 1, bool)

    def place(self, length: int, n: int) -> np.ndarray:
        """Place up to `n` examples of one length where the room is least.

        Returns:
            The sequence of each placed example, at least one.
        """
        room = length + int(np.argmax(self._any[length:]))
        if self._any[room]:
            each = room // length
            wanted, stack = -(-n // each), self._by_room[room]
            sequences = stack.pop()
            if len(sequences) > wanted:
                stack.append(sequences[wanted:])
                sequences = sequences[:wanted]
            self._any[room] = bool(stack)
        else:
            room = self.max_length
            each = room // length
            opened = self.opened - (-n // each)
            sequences, self.opened = np.arange(self.opened, opened), opened
        placed = np.repeat(sequences, each)[:n]
        # Only the last sequence may have got fewer: the examples of this length ran out.
        full = len(placed) // each
        for left, some in (
            (room - each * length, sequences[:full]),
            (room - (len(placed) - full * each) * length, sequences[full:]),
        ):
            if len(some) and left:
                self._by_room[left].append(some)
                self._any[left] = True
        return placed


def pack_chosen(
    pack: Callable[[np.ndarray], Sequences], offsets: np.ndarray, chosen: np.ndarray | None
) -> Sequences:
    """Pack some examples of a store as if no others stood between them; None: all of them.

    Args:
        pack: one of the policies, with its length.
        chosen: indices of examples, ascending.
    """
    if chosen is None:
        return pack(offsets)
    offsets = np.asarray(offsets)
    starts = offsets[chosen]
    own = np.concatenate([[0], np.cumsum(offsets[chosen + 1] - starts)])
    packed = pack(own)
    return Sequences(
        packed.starts + (starts - own[:-1])[packed.examples],
        packed.lengths,
        chosen[packed.examples],
        packed.pointers,
    )


def joined(parts: list[Sequences]) -> Sequences:
    """Return the sequences of several packings of one store, one packing behind the other."""
    firsts = np.cumsum([0, *(len(part.starts) for part in parts)])
    pointers = [part.pointers[:-1] + first for part, first in zip(parts, firsts[:-1], strict=True)]
    return Sequences(
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.examples for part in parts]),
        np.concatenate([*pointers, firsts[-1:]]),
    )


def sequence_tokens(sequences: Sequences) -> np.ndarray:
    """Return the number of tokens of each sequence, (R,) int64."""
    ends = np.concatenate([[0], np.cumsum(sequences.lengths, dtype=np.int64)])
    return np.diff(ends[sequences.pointers])


def efficiency(sequences: Sequences, max_length: int) -> float:
    """Return the share of the sequences' positions that hold a token."""
    return float(sequences.lengths.sum(dtype=np.int64)) / max(1, len(sequences) * max_length)


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return [starts[0], .. + sizes[0]), [starts[1], ..), ... one after another."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
