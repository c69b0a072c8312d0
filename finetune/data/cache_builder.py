"""The building pipeline: reader thread -> encoder -> writer thread, in bounded memory.

Flow: rows are read and parsed in one thread, encoded in the caller's (where the tokenizer starts its own threads)
and written in a third; a few batches wait between them. Bad rows are counted or raised in the order of the data.
Knows nothing of folders, locks and fingerprints (`cache`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from finetune.data.batches import Prefetch
from finetune.data.columns import ColumnWriter, Encoder, Example, PartlyBad
from finetune.data.formats import Row
from finetune.data.sources import Source
from finetune.data.tokenizer import TokenLimit
from finetune.errors import UserError

BATCH_BYTES = 2 << 20
BATCH_ROWS = 4096
QUEUED_BATCHES = 2
PROGRESS_SECONDS = 0.25
SHOWN_BAD_ROWS = 5

Progress = Callable[[int, int, int], None]
"""progress(done_bytes, total_bytes, tokens)"""


class Position(NamedTuple):
    """A place between two rows of a source."""

    part: int = 0
    """File of the source."""
    row: int = 0
    """Rows of this file that lie before it."""
    rows: int = 0
    """Rows of the whole source that lie before it."""


class Counts:
    """Numbers of good and bad rows; raises the first bad row, or the one beyond a limit.

    Args:
        on_bad_row: error or skip, as data.on_bad_row.
        most_bad_rows: data.max_bad_rows, which `skip` accepts.
    """

    def __init__(self, on_bad_row: str, most_bad_rows: int):
        self.on_bad_row, self.most_bad_rows = on_bad_row, most_bad_rows
        self.documents, self.bad_rows = 0, 0
        self.left_out = 0
        """Good rows without an example: empty ones, and those that a weight of 0 leaves out."""
        self.bad_row_messages: list[str] = []

    def state(self) -> dict[str, Any]:
        """Return the counts, for `restore` by a later build."""
        return {
            "documents": self.documents,
            "bad_rows": self.bad_rows,
            "left_out": self.left_out,
            "bad_row_messages": list(self.bad_row_messages),
        }

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def add_bad(self, fault: UserError) -> None:
        if self.on_bad_row == "error":
            raise fault
        self.bad_rows += 1
        if len(self.bad_row_messages) < SHOWN_BAD_ROWS:
            self.bad_row_messages.append(fault.render().split("\n")[0])
        check_bad_rows(self.bad_rows, self.bad_row_messages, self.most_bad_rows)


def check_bad_rows(count: int, messages: list[str], most: int) -> None:
    """Raise a UserError if there are more bad rows than data.max_bad_rows."""
    if count > most:
        shown = "".join(f"\n  {message}" for message in messages)
        raise UserError(
            f"{count} bad rows, more than data.max_bad_rows={most}; the first are:{shown}",
            remedy=f"Fix the data, or try data.max_bad_rows={max(100, 10 * most)}.",
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
            done = min(self.done_bytes, self.total_bytes)
            self._progress(done, self.total_bytes, self._writer.tokens)


def encode_rows(
    source: Source,
    encoder: Encoder,
    counts: Counts,
    writer: ColumnWriter,
    meter: Meter,
    limit: TokenLimit | None,
    max_rows: int | None,
    start: Position,
    save: Callable[[Position, dict[str, Any]], None],
) -> None:
    """Pass the rows of a source, or the first `max_rows`, through the encoder to the writer.

    Args:
        start: rows before it are left out.
        save: called in the writer's thread when all rows before a position were written, with the
            state of `counts` there.

    Raises:
        UserError: a bad row that ends the build, or a token beyond `limit`, whatever is done with bad rows.
    """
    reader = Prefetch(_batches(source, meter, max_rows, start), QUEUED_BATCHES, "store-reader")
    written: deque[Future] = deque()
    try:
        # Converting lists of ids to arrays would cost the encoder a third of its time.
        with ThreadPoolExecutor(1, "store-writer") as pool:
            for batch, position in reader:
                encoded = iter(encoder.encode([row for row in batch if isinstance(row, tuple)]))
                examples: list[Example] = []
                for row in batch:
                    result = row if isinstance(row, UserError) else next(encoded)
                    if isinstance(result, UserError):
                        partly = isinstance(result, PartlyBad)
                        for fault in result.faults if partly else [result]:
                            counts.add_bad(fault)
                        examples += result.examples if partly else []
                        continue
                    for example in result if limit else ():
                        limit.check(example["ids"], row[0])
                    counts.documents += 1
                    counts.left_out += not result
                    examples += result
                written.append(pool.submit(writer.append, examples))
                written.append(pool.submit(save, position, counts.state()))
                while len(written) > 2 * QUEUED_BATCHES:
                    written.popleft().result()  # raises the writer's error, e.g. of a full disk
                meter.show()
            for future in written:
                future.result()
    finally:
        reader.close()


def _batches(
    source: Source, meter: Meter, max_rows: int | None, start: Position
) -> Iterator[tuple[list[Row], Position]]:
    """Yield the rows behind `start` in batches of about `BATCH_BYTES`, and the place behind each batch.

    An error comes behind the rows before it. Of parts that lie before `start` nothing is read.
    """
    batch: list[Row] = []
    size, position, sizes = 0, start, source.part_bytes
    meter.count(sum(sizes[: start.part]))
    try:
        for part in range(start.part, len(sizes)):
            position = Position(part, start.row if part == start.part else 0, position.rows)
            left = None if max_rows is None else max_rows - position.rows
            rows = islice(source.part(part, meter.count), position.row, None)
            for row in islice(rows, left):
                batch.append(row)
                position = Position(part, position.row + 1, position.rows + 1)
                size += 0 if isinstance(row, UserError) else _text_size(row[1])
                if size >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
                    yield batch, position
                    batch, size = [], 0
    except Exception:
        yield batch, position
        raise
    yield batch, position


def _text_size(value: Any) -> int:
    """Return about the number of characters in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_text_size, value)) if isinstance(value, list) else 8
