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
from typing import Any

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
    limit: TokenLimit | None = None,
    max_rows: int | None = None,
) -> None:
    """Pass the rows of a source, or the first `max_rows`, through the encoder to the writer.

    Raises:
        UserError: a bad row that ends the build, or a token beyond `limit`, whatever is done with bad rows.
    """
    reader = Prefetch(_batches(source, meter, max_rows), QUEUED_BATCHES, "store-reader")
    written: deque[Future] = deque()
    try:
        # Converting lists of ids to arrays would cost the encoder a third of its time.
        with ThreadPoolExecutor(1, "store-writer") as pool:
            for batch in reader:
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
                if len(written) > QUEUED_BATCHES:
                    written.popleft().result()  # raises the writer's error, e.g. of a full disk
                meter.show()
            for future in written:
                future.result()
    finally:
        reader.close()


def _batches(source: Source, meter: Meter, max_rows: int | None) -> Iterator[list[Row]]:
    """Yield the rows in batches of about `BATCH_BYTES`; an error comes behind the rows before it."""
    batch: list[Row] = []
    size = 0
    try:
        for row in islice(source.rows(meter.count), max_rows):
            batch.append(row)
            size += 0 if isinstance(row, UserError) else _text_size(row[1])
            if size >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
                yield batch
                batch, size = [], 0
    except Exception:
        yield batch
        raise
    yield batch


def _text_size(value: Any) -> int:
    """Return about the number of characters in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_text_size, value)) if isinstance(value, list) else 8
