"""Batches ahead in a thread: the same as without, errors arrive, nothing hangs."""

from __future__ import annotations

import threading
import time

import pytest

from finetune.data.batches import Order, StepBatches, eval_batches


def batches(collate=lambda rows: {"rows": rows}, n=10, **changes):
    values = dict(
        global_batch=4, micro_batch=1, world_size=2, rank=0, start_step=0, end_step=6, prefetch=2
    )
    return StepBatches(collate, Order([n], 0, True), **{**values, **changes})


def rows_of(steps):
    return [[batch["rows"] for batch in step] for step in steps]


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


@pytest.mark.parametrize("prefetch", [1, 2, 50])
def test_prefetched_equals_synchronous(prefetch):
    expected = rows_of(batches(prefetch=0))
    assert len(expected) == 6 and all(len(step) == 2 for step in expected)
    assert rows_of(batches(prefetch=prefetch)) == expected
    assert not reader_threads()


def test_a_later_start_is_the_tail_of_the_run():
    assert rows_of(batches(start_step=4)) == rows_of(batches())[4:]
    assert len(batches(start_step=4)) == 2


def test_the_step_is_the_same_at_any_world_size_and_micro_batch():
    def step_rows(world_size, micro_batch):
        ranks = [
            rows_of(batches(world_size=world_size, micro_batch=micro_batch, rank=rank))
            for rank in range(world_size)
        ]
        return [
            sorted(row for rank in ranks for rows in rank[step] for row in rows)
            for step in range(6)
        ]

    assert (
        step_rows(1, 1) == step_rows(1, 4) == step_rows(2, 1) == step_rows(2, 2) == step_rows(4, 1)
    )


def test_the_last_partial_step_has_empty_micro_batches():
    steps = rows_of(batches(rank=1, end_step=3, end_position=9))
    assert [len(rows) for rows in steps[2]] == [0, 0]
    assert [len(rows) for rows in rows_of(batches(rank=0, end_step=3, end_position=9))[2]] == [1, 0]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_collate_reaches_the_consumer_at_its_step(prefetch):
    def collate(rows):
        if calls.append(rows) or len(calls) == 5:
            raise ValueError("bad row")
        return {"rows": rows}

    calls: list = []
    seen = []
    with pytest.raises(ValueError, match="bad row"):
        for step in batches(collate, prefetch=prefetch):
            seen.append(step)
    assert len(seen) == 2 and not reader_threads()


def test_leaving_early_ends_the_thread():
    for _ in batches(end_step=10**9):
        break
    assert not reader_threads()


def test_close_ends_a_running_loop():
    running = batches(end_step=10**9)
    iterator = iter(running)
    next(iterator)
    running.close()
    assert not reader_threads()
    assert list(iterator) == []


def test_it_prepares_ahead_but_not_without_bound():
    made = []
    iterator = iter(batches(lambda rows: made.append(rows), end_step=1000, prefetch=3))
    next(iterator)
    deadline = time.monotonic() + 60
    while len(made) < 2 * 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert (
        2 * 3 <= len(made) <= 2 * 6
    )  # two micro-steps each; one taken, three waiting, one or two in the making
    iterator.close()


@pytest.mark.parametrize(
    ("n_rows", "batch", "world_size"),
    [(7, 2, 2), (1, 4, 3), (0, 2, 2), (8, 2, 2), (9, 1, 4), (5, 8, 1)],
)
def test_eval_rows_are_seen_once_by_equally_long_ranks(n_rows, batch, world_size):
    ranks = [eval_batches(n_rows, batch, world_size, rank) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(row for rank in ranks for rows in rank for row in rows) == list(range(n_rows))
    assert all(len(rows) <= batch for rank in ranks for rows in rank)


def test_eval_batches_as_drawn():
    assert eval_batches(7, 2, 2, 0) == [[0, 1], [4, 5]]
    assert eval_batches(7, 2, 2, 1) == [[2, 3], [6]]
