"""Batches of a run, prepared ahead in a thread, and the split of an evaluation over ranks.

Flow: step -> positions of this rank's micro-batches -> sequences (`Order`) -> collate -> a list with one batch per
micro-step. Positions count from 0 through all epochs, so a resumed run needs one integer, and neither the world size
nor the accumulation changes which sequences a step holds. Iterating twice gives the same batches. Moves nothing to a
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

Batch = dict[str, Any]
PASS_SEED = 0x9E3779B97F4A7C15
"""Distance between the seeds of the sources' own passes, far beyond any seed that a user gives."""
POLL_SECONDS = 0.1
"""Seconds after which a thread that waits for the queue looks whether it has been closed."""


class StepBatches:
    """Iterable over steps; each item is the list of this rank's batches of one step, one per micro-step."""

    def __init__(
        self,
        collate: Callable[[list[int]], Batch],
        order: Order,
        *,
        global_batch: int,
        micro_batch: int,
        world_size: int,
        rank: int,
        start_step: int,
        end_step: int,
        end_position: int | None = None,
        prefetch: int = 2,
    ):
        self.collate, self.order = collate, order
        self.layout = (global_batch, micro_batch, world_size, rank, end_position)
        self.steps, self.prefetch = range(start_step, end_step), prefetch
        self._running: list[Prefetch] = []

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        if self.prefetch < 1:
            yield from map(self.step, self.steps)
            return
        ahead = Prefetch(map(self.step, self.steps), self.prefetch, "batches")
        self._running.append(ahead)
        try:
            yield from ahead
        finally:  # also when the consumer leaves its loop early
            ahead.close()
            self._running.remove(ahead)

    def step(self, step: int) -> list[Batch]:
        """Make the batches of one step here and now."""
        return [
            self.collate([self.order[position] for position in positions])
            for positions in step_positions(step, *self.layout)
        ]

    def close(self) -> None:
        """End the threads; a loop that still runs over this object ends before its next step."""
        for ahead in list(self._running):
            ahead.close()


class Prefetch:
    """Iterator that runs another one in a thread, up to `size` items ahead of its consumer.

    An error of the source is raised after the items that precede it.
    """

    def __init__(self, source: Iterator[Any], size: int, name: str):
        self._source, self._queue, self._stop = source, Queue(size), Event()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        while not self._stop.is_set():
            try:
                item, error, ended = self._queue.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if error is not None:
                raise error
            if ended:
                return
            yield item

    def close(self) -> None:
        """End the thread, and wait until it has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put((item, None, False)):
                    return
            self._put((None, None, True))
        except BaseException as error:
            self._put((None, error, True))

    def _put(self, entry: tuple[Any, BaseException | None, bool]) -> bool:
        """Wait for room in the queue; False if the queue was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=POLL_SECONDS)
                return True
            except Full:
                continue
        return False


def eval_batches(n: int, batch: int, world_size: int, rank: int) -> list[list[int]]:
    """Return the indices of this rank's batches out of `n` sequences.

    Every sequence is on exactly one rank, and all ranks have equally many batches. Seven sequences
    in batches of 2 over two ranks: rank 0 has [0, 1] [4, 5], rank 1 has [2, 3] [6]. Missing batches
    are empty, because every rank must take part in every forward pass.
    """
    per_rank = -(-n // (batch * world_size))
    starts = ((i * world_size + rank) * batch for i in range(per_rank))
    return [list(range(start, max(start, min(start + batch, n)))) for start in starts]


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of `n` sequences in an epoch, (n,) int64.

    It is the same on every machine, because Philox is counter-based.
    """
    mask = (1 << 64) - 1
    key = np.array([seed & mask, epoch & mask], np.uint64)  # a list would pass through float64
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


class Order:
    """The sequence at each position of a run: a pure function of seed, epoch and position.

    An epoch draws `counts[i]` sequences of source i: whole passes, and where these do not come out
    even the next ones of an endless row of shuffled passes, so that over the epochs every sequence of
    a source is drawn equally often. Two sources of 2 and 3 sequences, of which an epoch draws 3 and 3:

        source 0 is 0 1, source 1 is 2 3 4      epoch 0 holds 0 1 2 3 4 and 1, epoch 1 0 1 2 3 4 and 0

    Keeps the epoch it was asked for last.

    Args:
        sizes: sequences of each source; the sequences are numbered through all of them.
        counts: how many of each an epoch draws; None: each once.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, shuffle: bool, counts: Sequence[int] | None = None
    ):
        self.sizes, self.counts = list(sizes), list(counts or sizes)
        assert min(self.sizes) > 0 and min(self.counts) > 0
        self.n, self.seed, self.shuffle = sum(self.counts), seed, shuffle
        self._epoch, self._sequences = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.n)
        return int(self.epoch(epoch)[index])

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the sequences of one epoch in order, (n,) int64."""
        if epoch == self._epoch:
            return self._sequences
        drawn, first = [], 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            passes, rest = divmod(count, size)
            drawn.append(np.tile(np.arange(first, first + size), passes))
            if rest:
                begin, end = epoch * rest, (epoch + 1) * rest
                shuffled = [
                    permutation(self.seed + PASS_SEED * (source + 1), number, size)
                    for number in range(begin // size, -(-end // size))
                ]
                begin %= size
                drawn.append(first + np.concatenate(shuffled)[begin : begin + rest])
            first += size
        self._epoch, self._sequences = epoch, np.concatenate(drawn)
        if self.shuffle:
            self._sequences = self._sequences[permutation(self.seed, epoch, self.n)]
        return self._sequences


class Drawn:
    """Sequences and tokens of each source among the first positions of an order.

    Counts on from the position it was asked for last, and anew for an earlier one.

    Args:
        names: of the sources.
        tokens: of every sequence.
    """

    def __init__(self, order: Order, names: Sequence[str], tokens: np.ndarray):
        self.order, self.names, self.tokens = order, names, tokens
        self._ends = np.cumsum(order.sizes)
        self._position, self._counts = 0, np.zeros((2, len(names)), np.int64)

    def until(self, position: int) -> dict[str, dict[str, int]]:
        """Return `sequences` and `tokens` of each source at positions before this one."""
        if position < self._position:
            self._position, self._counts = 0, np.zeros_like(self._counts)
        while self._position < position:
            epoch, start = divmod(self._position, self.order.n)
            end = min(self.order.n, start + position - self._position)
            sequences = self.order.epoch(epoch)[start:end]
            source = np.searchsorted(self._ends, sequences, side="right")
            for row, weights in zip(self._counts, (None, self.tokens[sequences]), strict=True):
                row += np.bincount(source, weights, len(self.names)).astype(np.int64)
            self._position += end - start
        return {
            name: {"sequences": int(sequences), "tokens": int(tokens)}
            for name, sequences, tokens in zip(self.names, *self._counts, strict=True)
        }


def step_positions(
    step: int,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    rank: int,
    end: int | None = None,
) -> list[list[int]]:
    """Return the positions of each micro-batch of one rank in one step; steps count from 0.

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
