"""One reader per file format: path -> (where, record), or a UserError for a bad row.

Flow: lines or chunks of `decode` -> rows. A bad row is yielded and reading goes on behind it; a fault after which
the rest of the file cannot be trusted is raised. Knows no spec, no globs and no fields.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Union

from finetune.data.decode import BrokenStream, Count, Line, broken_file, chunks, lines, strip_bom
from finetune.errors import UserError

Row = Union[tuple[str, dict], UserError]
"""(where, record) or what is wrong with the row; where is `path:line` or `path[i]`."""

SKIP = "data.on_bad_row=skip leaves such rows out."
DOCUMENT_BYTES = 32 << 20
"""Longest document of a .txt file; longer files are cut at newlines."""
CSV_FIELD_BYTES = 32 << 20
PARQUET_ROWS = 256


def jsonl_rows(path: Path, count: Count | None = None) -> Iterator[Row]:
    for line in lines(path, count):
        if line.data and not line.data.isspace():
            yield parse_line(path, line)


def parse_line(path: Path, line: Line) -> Row:
    where = f"{path}:{line.number}"
    try:
        record = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return invalid_utf8(where, error)
    except (ValueError, RecursionError) as error:
        cut = "" if line.complete else "; the line has no newline, so the file may have been cut off"
        return UserError(f"broken JSON: {_json_fault(error)}{cut}", where, f"Mend it ({_show(path, line)}); {SKIP}")
    return check_object(record, where, surrogates=b"\\u" in line.data)


def check_object(record: Any, where: str, surrogates: bool = True) -> Row:
    """The row, if it is an object whose strings are valid Unicode (JSON may escape half a surrogate pair)."""
    if not isinstance(record, dict):
        return UserError(f"the row is {json_type(record)}, not an object", where,
                         f'Each row must look like {{"text": "..."}}; {SKIP}')
    try:
        if surrogates:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        return UserError(f"a string holds half a surrogate pair ({half}), which is no character", where, SKIP)
    return where, record


def csv_rows(path: Path, count: Count | None = None) -> Iterator[Row]:
    """Rows as dicts of strings; `where` is the line on which a row starts."""
    invalid: list[UserError] = []
    # Process-wide, and raised only: another reader may have set it higher.
    csv.field_size_limit(max(CSV_FIELD_BYTES, csv.field_size_limit()))
    texts = _csv_lines(path, count, invalid)
    first = next(texts, "")
    reader = csv.reader(chain([first], texts) if first else texts, strict=True, delimiter=_separator(first, path))
    header = _csv_header(path, reader, invalid)
    if header is None:
        return
    while True:
        before = reader.line_num
        where = f"{path}:{before + 1}"
        invalid.clear()
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield _csv_fault(where, error, reader.line_num - before)
            continue
        if values is None:
            return
        if values:
            _refuse_swallowed(values, len(header), reader.dialect.delimiter, where)
            yield invalid[0] if invalid else _csv_row(header, values, where)


def txt_rows(path: Path, count: Count | None = None) -> Iterator[Row]:
    """The file as one document, or documents of at most about 32 MiB that end at a newline."""
    parts: list[bytes] = []
    size, good, start, first = 0, 0, 1, True
    try:
        for chunk in chunks(path, count):
            if first and chunk:
                chunk, first = strip_bom(chunk, path), False
            good += chunk.count(b"\n")
            parts.append(chunk)
            size += len(chunk)
            if size >= DOCUMENT_BYTES and (cut := chunk.rfind(b"\n") + 1 or _character_start(chunk)):
                parts[-1] = chunk[:cut]
                document = b"".join(parts)
                yield _document(path, document, start)
                start += document.count(b"\n")
                parts, size = [chunk[cut:]], len(chunk) - cut
    except BrokenStream as fault:
        raise broken_file(path, fault, good) from None
    if size:
        yield _document(path, b"".join(parts), start)


def parquet_rows(path: Path, count: Count | None = None) -> Iterator[Row]:
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
        raise UserError(f"not a readable parquet file ({reason}); {index} rows were read", str(path),
                        "Download or copy it again and compare its size with the source.") from None


def arrow_rows(batch: Any, name: str, start: int) -> Iterator[Row]:
    """Rows of an Arrow record batch or table; `where` is `name[i]`."""
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError, KeyError):  # invalid UTF-8; dates and time zones that Python does not know
        records = [_arrow_row(batch, i, f"{name}[{start + i}]") for i in range(batch.num_rows)]
    for i, record in enumerate(records):
        yield record if isinstance(record, UserError) else (f"{name}[{start + i}]", record)


def invalid_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"invalid UTF-8: byte 0x{byte:02x} at position {error.start}", where,
                     f"If the file is Latin-1: iconv -f LATIN1 -t UTF-8; {SKIP}")


def json_type(value: Any) -> str:
    """A value's type in JSON's words."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array",
             dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _show(path: Path, line: Line) -> str:
    cat = {".gz": "zcat", ".zst": "zstdcat"}.get(path.suffix)
    return f"{cat} {path} | sed -n {line.number}p" if cat else f"sed -n {line.number}p {path}"


def _csv_lines(path: Path, count: Count | None, invalid: list[UserError]) -> Iterator[str]:
    for line in lines(path, count):
        try:
            text = line.data.decode("utf-8")
        except UnicodeDecodeError as error:
            # The reader must go on to find the row's end; the row is refused by its caller.
            invalid.append(invalid_utf8(f"{path}:{line.number}", error))
            text = line.data.decode("utf-8", errors="replace")
        yield text + "\n"


def _separator(header: str, path: Path) -> str:
    """A comma, or where the header has none the semicolon or tab that spreadsheets write instead; a tab in a .tsv first."""
    marks = ("\t", ",", ";") if ".tsv" in path.name.lower() else (",", ";", "\t")
    return next((mark for mark in marks if mark in header), ",")


def _refuse_swallowed(values: list[str], columns: int, delimiter: str, where: str) -> None:
    """A tab does not stand in text: a field whose lines are full of them is rows between two stray quotes.

    Raises:
        UserError: at any policy, for all of those rows would be lost as one.
    """
    if delimiter != "\t" or columns < 2:
        return
    for value in values:
        inner = value.split("\n")[1:-1]
        if inner and all(line.count("\t") >= columns - 1 for line in inner):
            raise UserError(f"a quote opens here and swallows the {len(inner)} rows behind it", where,
                            'Double quotes that belong to the text, and quote the field: "say ""a""".')


def _csv_header(path: Path, reader: Any, invalid: list[UserError]) -> list[str] | None:
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise UserError(f"the header is no CSV ({error})", f"{path}:1") from None
    if invalid:
        raise invalid[0]
    names = header or []
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"the header names {', '.join(map(repr, doubled))} twice", f"{path}:1", "Rename a column.")
    return header


def _csv_row(header: list[str], values: list[str], where: str) -> Row:
    if len(values) != len(header):
        return UserError(f"the row has {len(values)} fields, the header {len(header)}", where,
                         f'Quote fields that hold a comma or a newline: "a, b"; {SKIP}')
    return where, dict(zip(header, values, strict=True))


def _csv_fault(where: str, error: csv.Error, lines: int) -> UserError:
    """The fault of a row; raised where more than the row itself was swallowed, which no policy may skip as one row."""
    fault = UserError(f"broken CSV: {error}", where, f'Double the quotes inside a quoted field: "say ""a"""; {SKIP}')
    if "unexpected end" in str(error) or "field limit" in str(error):
        raise UserError("a quoted field is opened here and never closed", where, 'Close it, or double it: "".')
    if lines > 1:
        raise UserError(f"a quoted field is opened here and ends wrongly {lines - 1} lines below ({error})", where,
                        'Double quotes that belong to the text: "say ""a""".')
    return fault


def _document(path: Path, data: bytes, start: int) -> Row:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return invalid_utf8(f"{path}:{start + data.count(10, 0, error.start)}", error)
    return (str(path) if start == 1 else f"{path}:{start}"), {"text": text}


def _character_start(chunk: bytes) -> int:
    """Where the last character of a chunk without any newline starts."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(chunk)
    return len(chunk) - len(decoder.getstate()[0])


def _arrow_row(batch: Any, i: int, where: str) -> dict | UserError:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return invalid_utf8(where, error)
    except (ValueError, OverflowError, KeyError) as error:
        return UserError(f"a value cannot be read ({error})", where, f"Mend or drop the column; {SKIP}")


Reader = Callable[[Path, Union[Count, None]], Iterator[Row]]
