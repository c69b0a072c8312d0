"""Every packing policy against hand-made rows and against naive loops."""

from __future__ import annotations

import time

import numpy as np
import pytest

from finetune.data.packing import (
    Rows,
    best_fit,
    document_chunks,
    efficiency,
    one_per_row,
    stream_blocks,
)


def offsets_of(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def as_lists(rows: Rows) -> list[list[tuple[int, int, int]]]:
    segments = list(
        zip(rows.starts.tolist(), rows.lengths.tolist(), rows.examples.tolist(), strict=True)
    )
    return [
        segments[a:b]
        for a, b in zip(rows.pointers[:-1].tolist(), rows.pointers[1:].tolist(), strict=True)
    ]


def naive_stream(lengths, max_length):
    tokens = [(document, i) for document, length in enumerate(lengths) for i in range(length)]
    rows = []
    for first in range(0, len(tokens), max_length):
        row = []
        for at, (document, _) in enumerate(tokens[first : first + max_length], first):
            if row and row[-1][2] == document:
                row[-1] = (row[-1][0], row[-1][1] + 1, document)
            else:
                row.append((at, 1, document))
        rows.append(row)
    return rows


def naive_chunks(lengths, max_length):
    rows, start = [], 0
    for document, length in enumerate(lengths):
        for first in range(0, length, max_length):
            rows.append([(start + first, min(max_length, length - first), document)])
        start += length
    return rows


def test_stream_blocks_cuts_the_stream_and_keeps_boundaries():
    rows = stream_blocks(offsets_of([6, 2, 3]), 4)
    assert as_lists(rows) == [[(0, 4, 0)], [(4, 2, 0), (6, 2, 1)], [(8, 3, 2)]]


def test_document_chunks_cuts_each_document():
    rows = document_chunks(offsets_of([6, 2, 3]), 4)
    assert as_lists(rows) == [[(0, 4, 0)], [(4, 2, 0)], [(6, 2, 1)], [(8, 3, 2)]]


def test_one_per_row():
    assert as_lists(one_per_row(offsets_of([6, 2, 3]))) == [[(0, 6, 0)], [(6, 2, 1)], [(8, 3, 2)]]


def test_best_fit_fills_the_tightest_row():
    # 6 and 5 open rows; 4 needs a third; 3 goes to 5+3; 2 to 6+2; 2 to 4+2.
    rows = best_fit(offsets_of([2, 5, 3, 6, 4, 2]), 8)
    assert as_lists(rows) == [
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
    """Textbook best-fit decreasing, item by item; returns the number of rows and the multiset of their fills."""
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
    rows = best_fit(offsets_of(lengths), 20)
    fills = sorted(sum(length for _, length, _ in row) for row in as_lists(rows))
    assert fills == naive_best_fit(lengths.tolist(), 20)
    assert sorted(rows.examples.tolist()) == list(range(200))
    assert (offsets_of(lengths)[rows.examples] == rows.starts).all() and (
        lengths[rows.examples] == rows.lengths
    ).all()
    assert all(row == sorted(row) for row in as_lists(rows))
    assert [row[0] for row in as_lists(rows)] == sorted(row[0] for row in as_lists(rows))


def test_best_fit_of_alpaca_like_lengths_is_full_fast_and_deterministic():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(110), 0.8, 300_000).astype(int), 5, 2048)
    started = time.monotonic()
    rows = best_fit(offsets_of(lengths), 2048)
    assert time.monotonic() - started < 5
    assert efficiency(rows, 2048) > 0.97
    again = best_fit(offsets_of(lengths), 2048)
    assert (rows.examples == again.examples).all() and (rows.pointers == again.pointers).all()


def test_best_fit_refuses_what_cannot_fit():
    with pytest.raises(AssertionError):
        best_fit(offsets_of([3, 9]), 8)


def test_efficiency():
    assert efficiency(stream_blocks(offsets_of([6, 2, 3]), 4), 4) == 11 / 12
    assert efficiency(one_per_row(offsets_of([6, 2])), 8) == 0.5
