"""Order as a pure function, and positions that do not depend on the world size."""

from __future__ import annotations

import pytest

from finetune.data.batches import Order, permutation, step_positions


def test_permutation_is_the_same_on_every_machine():
    # Golden: a changed generator would silently reorder every resumed run.
    assert permutation(0, 0, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert permutation(42, 3, 8).tolist() == [4, 7, 1, 0, 2, 6, 5, 3]
    assert (
        permutation(0, 0, 10).tolist()
        != permutation(0, 1, 10).tolist()
        != permutation(1, 0, 10).tolist()
    )
    assert sorted(permutation(7, 3, 1000).tolist()) == list(range(1000))


def test_negative_and_large_seeds_are_seeds_too():
    assert permutation(-1, 0, 50).tolist() != permutation(-2, 0, 50).tolist()
    assert permutation(2**60, 0, 50).tolist() != permutation(2**60 + 1, 0, 50).tolist()


def test_order_crosses_the_epoch_boundary_and_can_go_back():
    order = Order([5], seed=3, shuffle=True)
    rows = [order[position] for position in range(15)]
    assert [sorted(rows[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert rows == [int(index) for epoch in range(3) for index in permutation(3, epoch, 5)]
    assert [order[position] for position in (14, 2, 7)] == [rows[14], rows[2], rows[7]]


def test_order_without_shuffling_is_the_files_order():
    order = Order([3], seed=9, shuffle=False)
    assert [order[position] for position in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_step_positions_as_drawn():
    assert step_positions(0, 8, 2, 2, 0) == [[0, 1], [4, 5]]
    assert step_positions(0, 8, 2, 2, 1) == [[2, 3], [6, 7]]
    assert step_positions(3, 4, 1, 2, 1) == [[13], [15]]


@pytest.mark.parametrize(
    ("micro_batch", "world_size"), [(1, 1), (2, 1), (12, 1), (1, 2), (3, 2), (6, 2), (1, 4), (3, 4)]
)
@pytest.mark.parametrize("end", [None, 31, 25, 24])
def test_a_step_holds_the_same_positions_for_any_layout(micro_batch, world_size, end):
    step = 2
    ranks = [
        step_positions(step, 12, micro_batch, world_size, rank, end) for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {12 // (micro_batch * world_size)}
    flat = [p for micro in zip(*ranks, strict=True) for positions in micro for p in positions]
    assert flat == [p for p in range(24, 36) if end is None or p < end]
    assert max(len(positions) for rank in ranks for positions in rank) <= micro_batch


def test_an_impossible_batch_is_our_own_bug():
    with pytest.raises(AssertionError):
        step_positions(0, 8, 3, 1, 0)
