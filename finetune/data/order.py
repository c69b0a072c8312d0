"""Which row stands at which position of a run: a pure function of seed, epoch and position.

Flow: step -> positions of this rank's micro-batches -> rows. Positions count from 0 through all epochs, so a resumed
run needs one integer, and neither the world size nor the accumulation changes which rows a step holds.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) int64: the rows in the order of this epoch; the same on every machine (Philox is counter-based)."""
    key = np.array([seed & _MASK, epoch & _MASK], np.uint64)  # a list would pass through float64
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


def row_at(position: int, n: int, seed: int, shuffle: bool) -> int:
    epoch, index = divmod(position, n)
    return int(permutation(seed, epoch, n)[index]) if shuffle else index


class Order:
    """`row_at` for one data set; keeps the permutation of the epoch it was asked for last."""

    def __init__(self, n: int, seed: int, shuffle: bool):
        assert n > 0
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.n)
        if not self.shuffle:
            return index
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self.seed, epoch, self.n)
        return int(self._permutation[index])


def step_positions(step: int, global_batch: int, micro_batch: int, world_size: int, rank: int,
                   end: int | None = None) -> list[list[int]]:
    """Positions of each micro-batch of one rank in one step; steps count from 0.

    Global batch 8, micro-batch 2, two ranks, step 0 (accumulation 2):

        micro-step      0           1
        rank 0       [0, 1]      [4, 5]
        rank 1       [2, 3]      [6, 7]

    Positions from `end` on are left out, so the last step's micro-batches may be short or empty.
    """
    share = micro_batch * world_size
    assert global_batch % share == 0, "global_batch is not a multiple of micro_batch x world_size"
    first = step * global_batch + rank * micro_batch
    starts = range(first, first + global_batch, share)
    limit = first + global_batch if end is None else end
    return [list(range(start, max(start, min(start + micro_batch, limit)))) for start in starts]
