"""The building pipeline: reader thread -> encoder -> writer thread, in bounded memory.

Flow: rows are read and parsed in one thread, encoded in the caller's (where the tokenizer starts its own threads)
and written in a third; a few batches wait between them. Bad rows are counted or raised in the order of the data.
Knows nothing of folders, locks and fingerprints (`cache`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

from finetune.data.columns import ColumnWriter, Encoder, Example, PartlyBad, WriterThread
from finetune.data.formats import Row
from finetune.data.sources import Source
from finetune.data.tokenizer import TokenLimit
from finetune.errors import UserError

BATCH_BYTES = 2 << 20
BATCH_RECORDS = 4096
QUEUED_BATCHES = 2
PROGRESS_SECONDS = 0.25
SHOWN_BAD_ROWS = 5

Progress = Callable[[int, int, int], None]
"""progress(done_bytes, total_bytes, tokens)"""


def run(
    source: Source,
    encoder: Encoder,
    rows: BadRows,
    writer: ColumnWriter,
    meter: Meter,
    limit: TokenLimit | None = None,
) -> int:
    """Pump all batches through the encoder; returns the number of good documents.

    Raises:
        UserError: a bad row that ends the build, or a token beyond `limit`, whatever is done with bad rows.
    """
    documents = 0
    thread = WriterThread(writer)
    try:
        with _reading(source, meter) as batches:
            for batch in batches:
                good = encoder.encode([row for row in batch if isinstance(row, tuple)])
                if limit:
                    _check_ids(limit, batch, iter(good))
                examples, accepted = rows.sift(batch, iter(good))
                documents += accepted
                thread.append(examples)
                meter.show()
    finally:
        thread.finish()
    return documents


def _check_ids(
    limit: TokenLimit, batch: list[Row], encoded: Iterator[list[Example] | UserError]
) -> None:
    for row in batch:
        result = row if isinstance(row, UserError) else next(encoded)
        if not isinstance(row, UserError) and not isinstance(result, UserError):
            for example in result:
                limit.check(example["ids"], row[0])


class BadRows:
    """Stops at the first bad row, or counts up to a cap."""

    def __init__(self, on_bad_row: str, cap: int):
        self.on_bad_row, self.cap = on_bad_row, cap
        self.count = 0
        self.left_out = 0
        """Good rows that give no example: empty ones, and those that a weight of 0 leaves out."""
        self.messages: list[str] = []

    def sift(
        self, batch: list[Row], encoded: Iterator[list[Example] | UserError]
    ) -> tuple[list[Example], int]:
        """The batch's examples and how many of its records were good, in the order of the records."""
        examples: list[Example] = []
        accepted = 0
        for row in batch:
            result = row if isinstance(row, UserError) else next(encoded)
            if isinstance(result, UserError):
                for fault in result.faults if isinstance(result, PartlyBad) else [result]:
                    self._refuse(fault)
                result = result.examples if isinstance(result, PartlyBad) else []
            else:
                accepted += 1
                self.left_out += not result
            examples += result
        return examples, accepted

    def nothing_left(self, spec: str, documents: int) -> UserError:
        shown = "".join(f"\n  {message}" for message in self.messages)
        bad = f", {self.count} bad rows:{shown}" if self.count else ""
        return UserError(
            f"no example is left to train on ({documents} empty records or records of weight 0{bad})",
            spec,
        )

    def _refuse(self, fault: UserError) -> None:
        if self.on_bad_row == "error":
            raise fault
        self.count += 1
        if len(self.messages) < SHOWN_BAD_ROWS:
            self.messages.append(fault.render().split("\n")[0])
        check_bad_rows(self.count, self.messages, self.cap)


def check_bad_rows(count: int, messages: list[str], cap: int) -> None:
    """
    Raises:
        UserError: there are more bad rows than data.max_bad_rows.
    """
    if count > cap:
        shown = "".join(f"\n  {message}" for message in messages)
        raise UserError(
            f"{count} bad rows, more than data.max_bad_rows={cap}; the first are:{shown}",
            remedy=f"Fix the data, or try data.max_bad_rows={max(100, 10 * cap)}.",
        )


class Meter:
    """Bytes read so far, shown a few times a second."""

    def __init__(self, total_bytes: int, writer: ColumnWriter, progress: Progress | None):
        self.done_bytes, self.total_bytes = 0, total_bytes
        self._writer, self._progress, self._next = writer, progress, 0.0

    def count(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes

    def show(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._progress and (force or now >= self._next):
            self._next = now + PROGRESS_SECONDS
            self._progress(
                min(self.done_bytes, self.total_bytes), self.total_bytes, self._writer.tokens
            )


@contextmanager
def _reading(source: Source, meter: Meter) -> Iterator[Iterator[list[Row]]]:
    """Batches of rows, read and parsed in a thread; a fault is raised where it stood among the rows."""
    queue: Queue[list[Row] | BaseException | None] = Queue(QUEUED_BATCHES)
    stop = Event()
    thread = Thread(
        target=_read_into, args=(queue, stop, source, meter), name="store-reader", daemon=True
    )
    thread.start()
    try:
        yield _drain(queue)
    finally:
        stop.set()
        thread.join()


def _read_into(queue: Queue, stop: Event, source: Source, meter: Meter) -> None:
    batch: list[Row] = []
    last: BaseException | None = None
    try:
        size = 0
        for row in source.rows(meter.count):
            batch.append(row)
            size += _text_size(row)
            if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
                if not _offer(queue, batch, stop):
                    return
                batch, size = [], 0
    except BaseException as error:
        last = error
    _ = _offer(queue, batch, stop) and _offer(queue, last, stop)


def _offer(queue: Queue, item: Any, stop: Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.1)
            return True
        except Full:
            continue
    return False


def _drain(queue: Queue) -> Iterator[list[Row]]:
    while (item := queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def _text_size(row: Row) -> int:
    """About the characters of a record, one level deep plus its lists."""
    if isinstance(row, UserError):
        return 0
    return sum(_value_size(value) for value in row[1].values())


def _value_size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_value_size(item) for item in value.values())
    return sum(_value_size(item) for item in value) if isinstance(value, list) else 8
