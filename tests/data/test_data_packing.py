"""Every packing policy against hand-made sequences and against naive loops."""

from __future__ import annotations

import time

import numpy as np
import pytest

from finetune.data.packing import (
    Sequences,
    best_fit,
    document_chunks,
    efficiency,
    one_per_sequence,
    stream_blocks,
)


def offsets_of(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def as_lists(sequences: Sequences) -> list[list[tuple[int, int, int]]]:
    segments = list(
        zip(
            sequences.starts.tolist(),
            sequences.lengths.tolist(),
            sequences.examples.tolist(),
            strict=True,
        )
    )
    return [
        segments[a:b]
        for a, b in zip(
            sequences.pointers[:-1].tolist(), sequences.pointers[1:].tolist(), strict=True
        )
    ]


def naive_stream(lengths, max_length):
    tokens = [(document, i) for document, length in enumerate(lengths) for i in range(length)]
    sequences = []
    for first in range(0, len(tokens), max_length):
        row = []
        for at, (document, _) in enumerate(tokens[first : first + max_length], first):
            if row and row[-1][2] == document:
                row[-1] = (row[-1][0], row[-1][1] + 1, document)
            else:
                row.append((at, 1, document))
        sequences.append(row)
    return sequences


def naive_chunks(lengths, max_length):
    sequences, start = [], 0
    for document, length in enumerate(lengths):
        for first in range(0, length, max_length):
            sequences.append([(start + first, min(max_length, length - first), document)])
        start += length
    return sequences


def test_stream_blocks_cuts_the_stream_and_keeps_boundaries():
    sequences = stream_blocks(offsets_of([6, 2, 3]), 4)
    assert as_lists(sequences) == [[(0, 4, 0)], [(4, 2, 0), (6, 2, 1)], [(8, 3, 2)]]


def test_document_chunks_cuts_each_document():
    sequences = document_chunks(offsets_of([6, 2, 3]), 4)
    assert as_lists(sequences) == [[(0, 4, 0)], [(4, 2, 0)], [(6, 2, 1)], [(8, 3, 2)]]


def test_one_per_row():
    assert as_lists(one_per_sequence(offsets_of([6, 2, 3]))) == [
        [(0, 6, 0)],
        [(6, 2, 1)],
        [(8, 3, 2)],
    ]


def test_best_fit_fills_the_tightest_row():
    # 6 and 5 open sequences; 4 needs a third; 3 goes to 5+3; 2 to 6+2; 2 to 4+2.
    sequences = best_fit(offsets_of([2, 5, 3, 6, 4, 2]), 8)
    assert as_lists(sequences) == [
        [(0, 2, 0), (10, 6, 3)],
        [(2, 5, 1), (7, 3, 2)],
        [(16, 4, 4), (20, 2, 5)],
    ]


@pytest.mark.parametrize("seed", range(25))
def test_streams_and_chunks_equal_naive_loops(seed):
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(0, 30, rng.integers(1, 40)).tolist(), 1]
    max_length = int(rng.integers(1, 17))
    assert as_lists(stream_blocks(offsets_of(lengths), max_length)) == naive_stream(
        lengths, max_length
    )
    assert as_lists(document_chunks(offsets_of(lengths), max_length)) == naive_chunks(
        lengths, max_length
    )


def naive_best_fit(lengths, max_length):
    """Textbook best-fit decreasing, item by item; returns the number of sequences and the multiset of their fills."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            tightest = min(fitting, key=lambda i: rooms[i])
            rooms[tightest] -= length
        else:
            rooms.append(max_length - length)
    return sorted(max_length - room for room in rooms)


@pytest.mark.parametrize("seed", range(25))
def test_best_fit_equals_the_textbook_algorithm(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, 200)
    sequences = best_fit(offsets_of(lengths), 20)
    fills = sorted(sum(length for _, length, _ in row) for row in as_lists(sequences))
    assert fills == naive_best_fit(lengths.tolist(), 20)
    assert sorted(sequences.examples.tolist()) == list(range(200))
    assert (offsets_of(lengths)[sequences.examples] == sequences.starts).all() and (
        lengths[sequences.examples] == sequences.lengths
    ).all()
    assert all(row == sorted(row) for row in as_lists(sequences))
    assert [row[0] for row in as_lists(sequences)] == sorted(row[0] for row in as_lists(sequences))


def test_best_fit_of_alpaca_like_lengths_is_full_fast_and_deterministic():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(110), 0.8, 300_000).astype(int), 5, 2048)
    started = time.monotonic()
    sequences = best_fit(offsets_of(lengths), 2048)
    assert time.monotonic() - started < 5
    assert efficiency(sequences, 2048) > 0.97
    again = best_fit(offsets_of(lengths), 2048)
    assert (sequences.examples == again.examples).all() and (
        sequences.pointers == again.pointers
    ).all()


def test_best_fit_refuses_what_cannot_fit():
    with pytest.raises(AssertionError):
        best_fit(offsets_of([3, 9]), 8)


def test_efficiency():
    assert efficiency(stream_blocks(offsets_of([6, 2, 3]), 4), 4) == 11 / 12
    assert efficiency(one_per_sequence(offsets_of([6, 2])), 8) == 0.5
