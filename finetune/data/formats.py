"""One reader per file format: path -> (where, record), or a UserError for a bad row.

Flow: lines or chunks of `compressed_files` -> rows. A bad row is yielded and reading continues
after it; a fault that makes the rest of the file unreliable is raised. Knows no spec, no globs and
no fields.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Union

from finetune.data.compressed_files import BrokenStream, Count, show_line
from finetune.data.utf8 import (
    DEFAULTS,
    FIX,
    SKIP,
    FileOptions,
    Line,
    broken_file,
    invalid_utf8,
    lines,
    text_chunks,
)
from finetune.errors import UserError

Row = Union[tuple[str, dict], UserError]
"""(where, record) or what is wrong with the row; where is `path:line` or `path[i]`."""

DOCUMENT_BYTES = 32 << 20
"""Longest document of a .txt file; longer files are cut at newlines."""
PARQUET_ROWS = 256


def jsonl_rows(
    path: Path, count: Count | None = None, options: FileOptions = DEFAULTS
) -> Iterator[Row]:
    for line in lines(path, count, options.encoding):
        if line.data and not line.data.isspace():
            yield parse_line(path, line)


def parse_line(path: Path, line: Line) -> Row:
    where = f"{path}:{line.number}"
    try:
        record = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return invalid_utf8(path, where, error)
    except (ValueError, RecursionError) as error:
        cut = (
            "" if line.complete else "; the line has no newline, so the file may have been cut off"
        )
        return UserError(
            f"broken JSON: {_json_fault(error)}{cut}",
            where,
            f"Fix it ({show_line(path, line.number)}), {SKIP}",
        )
    return check_object(record, where, surrogates=b"\\u" in line.data)


def check_object(record: Any, where: str, surrogates: bool = True) -> Row:
    """Return the row if it is an object whose strings are valid Unicode.

    JSON may escape half a surrogate pair.
    """
    if not isinstance(record, dict):
        return UserError(
            f"the row is {json_type(record)}, not an object",
            where,
            f'Write each row as {{"text": "..."}}, {SKIP}',
        )
    try:
        if surrogates:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        return UserError(
            f"a string holds half a surrogate pair ({half}), which is no character", where, FIX
        )
    return where, record


def txt_rows(
    path: Path, count: Count | None = None, options: FileOptions = DEFAULTS
) -> Iterator[Row]:
    """Yield the file as one document, or in documents of at most about 32 MiB.

    The latter end at a newline. A remainder of white space alone is no document.
    """
    parts: list[bytes] = []
    size, good, start = 0, 0, 1
    try:
        for chunk in text_chunks(path, count, options.encoding):
            good += chunk.count(b"\n")
            parts.append(chunk)
            size += len(chunk)
            if size >= DOCUMENT_BYTES and (
                cut := chunk.rfind(b"\n") + 1 or _character_start(chunk)
            ):
                parts[-1] = chunk[:cut]
                document = b"".join(parts)
                yield _document(path, document, start)
                start += document.count(b"\n")
                parts, size = [chunk[cut:]], len(chunk) - cut
    except BrokenStream as fault:
        raise broken_file(path, fault, good) from None
    if not all(map(bytes.isspace, filter(None, parts))):
        yield _document(path, b"".join(parts), start)


def parquet_rows(
    path: Path, count: Count | None = None, options: FileOptions = DEFAULTS
) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    index, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(PARQUET_ROWS):
                yield from arrow_rows(batch, str(path), index)
                if count:
                    count(size * (index + batch.num_rows) // total - size * index // total)
                index += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"not a readable parquet file ({reason}); {index} rows were read",
            str(path),
            "Download or copy it again and compare its size with the source.",
        ) from None


def arrow_rows(batch: Any, name: str, start: int) -> Iterator[Row]:
    """Yield the rows of an Arrow record batch or table; `where` is `name[i]`.

    Binary columns that hold UTF-8 become strings, since Spark, Hive and others write text that way.
    """
    binary = any("binary" in str(column.type) for column in batch.schema)
    try:
        records = batch.to_pylist()
    except (
        ValueError,
        OverflowError,
        KeyError,
    ):  # invalid UTF-8; dates and time zones that Python does not know
        records = [_arrow_row(batch, i, f"{name}[{start + i}]") for i in range(batch.num_rows)]
    for i, record in enumerate(records):
        if isinstance(record, UserError):
            yield record
        else:
            yield f"{name}[{start + i}]", _with_text(record) if binary else record


def _with_text(value: Any) -> Any:
    """Return the value with all bytes in it that are UTF-8 decoded to strings."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _with_text(item) for key, item in value.items()}
    return [_with_text(item) for item in value] if isinstance(value, list) else value


def first_names(names: Iterable[Any]) -> str:
    """Return the first of a row's field names for a message, quoted; "" if there are none."""
    return ", ".join(f"'{name}'" for name in islice(names, 12))


def json_type(value: Any) -> str:
    """Return the name of a value's type in JSON."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
        bytes: "bytes that are no UTF-8 text",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _document(path: Path, data: bytes, start: int) -> Row:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return invalid_utf8(path, f"{path}:{start + data.count(10, 0, error.start)}", error)
    return (str(path) if start == 1 else f"{path}:{start}"), {"text": text}


def _character_start(chunk: bytes) -> int:
    """Return the start of the last character of a chunk without any newline."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(chunk)
    return len(chunk) - len(decoder.getstate()[0])


def _arrow_row(batch: Any, i: int, where: str) -> dict | UserError:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return UserError(
            f"a string column holds invalid UTF-8: byte 0x{error.object[error.start]:02x}",
            where,
            f"Write the file again with valid text in it, {SKIP}",
        )
    except (ValueError, OverflowError, KeyError) as error:
        return UserError(
            f"a value cannot be read ({error})", where, f"Fix or drop the column, {SKIP}"
        )


Reader = Callable[[Path, Union[Count, None], FileOptions], Iterator[Row]]
