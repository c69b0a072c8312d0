"""Batches of a run, prepared ahead in a thread, and the split of an evaluation over ranks.

Flow: step -> positions (`order`) -> rows -> collate -> a list with one batch per micro-step. Everything but the
step number is fixed at construction; iterating twice gives the same batches. Moves nothing to a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from finetune.data.order import Order, step_positions

Batch = dict[str, Any]
POLL_SECONDS = 0.1


class StepBatches:
    """Iterates over steps; each item is the list of this rank's batches of one step, one per micro-step."""

    def __init__(self, collate: Callable[[list[int]], Batch], order: Order, *, global_batch: int, micro_batch: int,
                 world_size: int, rank: int, start_step: int, end_step: int, end_position: int | None = None,
                 prefetch: int = 2):
        self.collate, self.order = collate, order
        self.layout = (global_batch, micro_batch, world_size, rank, end_position)
        self.steps, self.prefetch = range(start_step, end_step), prefetch
        self._running: list[_Ahead] = []

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        if self.prefetch < 1:
            yield from map(self.step, self.steps)
            return
        ahead = _Ahead(map(self.step, self.steps), self.prefetch)
        self._running.append(ahead)
        try:
            yield from ahead
        finally:  # also when the consumer leaves its loop early
            ahead.close()
            self._running.remove(ahead)

    def step(self, step: int) -> list[Batch]:
        """The batches of one step, made here and now."""
        micro_steps = step_positions(step, *self.layout)
        return [self.collate([self.order[position] for position in positions]) for positions in micro_steps]

    def close(self) -> None:
        """End the threads; a loop that still runs over this object ends before its next step."""
        for ahead in list(self._running):
            ahead.close()


class _Ahead:
    """Runs an iterator in a thread, up to `size` items ahead of its consumer."""

    def __init__(self, source: Iterator[Any], size: int):
        self._source, self._queue, self._stop = source, Queue(size), Event()
        self._thread = Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        while not self._stop.is_set():
            try:
                item, error = self._queue.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._offer(item, None):
                    return
            self._offer(None, None)
        except BaseException as error:
            self._offer(None, error)

    def _offer(self, item: Any, error: BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put((item, error), timeout=POLL_SECONDS)
                return True
            except Full:
                continue
        return False


def eval_batches(n_rows: int, batch: int, world_size: int, rank: int) -> list[list[int]]:
    """Row indices of this rank's batches: every row on exactly one rank, equally many batches on all ranks.

    Seven rows in batches of 2 over two ranks: rank 0 has [0, 1] [4, 5], rank 1 has [2, 3] [6]. Missing batches are
    empty, because every rank must take part in every forward pass.
    """
    per_rank = -(-n_rows // (batch * world_size))
    starts = ((i * world_size + rank) * batch for i in range(per_rank))
    return [list(range(start, max(start, min(start + batch, n_rows)))) for start in starts]
