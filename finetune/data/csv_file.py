"""Rows of comma, semicolon and tab separated files, as dicts of strings.

Flow: the file's first MiB -> its layout (separator, what quotes mean) -> lines -> records of one or more lines -> rows.

Quotes enclose a cell as in RFC 4180, and an enclosed cell may hold line breaks. A stray quote does the same by mistake:
it opens a cell that ends at the next quote, and all rows between become text of one row, under that row's label.

    "oh no he said,neg        opens a cell
    this row vanishes,pos     text of the cell, and a row of its own
    he liked it",pos          closes it

So the lines of a record that spans several are compared with the rows of the file (`csv_layout.Columns`): lines that
look like rows are read as rows, and the line with the stray quote alone is bad.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune.data import utf8
from finetune.data.compressed_files import Count
from finetune.data.csv_layout import Columns, Layout, Line, Lines
from finetune.data.formats import Row
from finetune.data.utf8 import DEFAULTS, SKIP, FileOptions, invalid_utf8, lines
from finetune.errors import UserError

FIELD_BYTES = 32 << 20
SAMPLE_BYTES = 1 << 20
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')
"""First line that Excel writes to tell its separator."""
TEXT_REMEDY = "If quotes are part of the text: data.quotes=text"


def csv_rows(
    path: Path, count: Count | None = None, options: FileOptions = DEFAULTS
) -> Iterator[Row]:
    """Yield the rows of the file; `where` is the line on which a row starts.

    Raises:
        UserError: no usable header, or a quoted cell that never ends among lines that are no rows.
    """
    # Process-wide, and raised only: another reader may have set it higher.
    csv.field_size_limit(max(FIELD_BYTES, csv.field_size_limit()))
    # The first lines, without those that are cut off or cannot be read: reading them tells why.
    sample: list[Line] = []
    size = 0
    try:
        for line in _decoded(path, lines(path, None, options.encoding)):
            sample.append(line)
            size += len(line.text)
            if size >= SAMPLE_BYTES:
                break
    except UserError:
        if not sample:
            raise
    layout = _layout(path, sample, options)
    source = Lines(_decoded(path, lines(path, count, options.encoding)))
    if layout is None:
        return
    deque(islice(source, layout.first_line), maxlen=0)
    source.held.clear()
    header = _header(source, layout)
    columns = Columns(header.width)
    columns.learn(sample[layout.first_line + 1 :], layout)
    for held, values in _records(source, layout, columns):
        if isinstance(values, UserError):
            yield values
        elif fault := next((line.fault for line in held if line.fault), None):
            yield fault
        else:
            yield _row(header, layout, held, values)


@dataclass
class _Header:
    names: list[str]
    width: int
    """Columns in all: those behind the last name have none."""


def _records(
    source: Lines, layout: Layout, columns: Columns
) -> Iterator[tuple[list[Line], list[str] | UserError]]:
    """Yield the lines and cells of each row, or what is wrong with it; blank lines are none.

    Raises:
        UserError: a quote opens a cell that encloses more lines than the row's own, and perhaps
            rightly: no policy may skip them as one row.
    """
    reader = layout.parse(source)
    while True:
        source.held.clear()
        values, error = None, None
        try:
            values = next(reader, None)
        except csv.Error as fault:
            error = fault
        held = list(source.held)
        if values is None and error is None:
            return
        where, below = layout.where(held[0]), len(held) - 1
        swallows = columns.swallows(held, layout, values)
        if swallows != "no":
            rows = "the row" if below == 1 else f"the {below} rows"
            keys = f"{TEXT_REMEDY}; if the cell is right as it is: data.quotes=enclose"
            remedy = 'Double quotes that belong to the text, and quote the cell: "say ""a"""'
            if swallows == "perhaps":
                problem = f"a quote opens here and seems to swallow {rows} behind it"
                raise UserError(problem, where, f"{remedy}.\n  {keys}")
            problem = f"a quote opens here and swallows {rows} behind it"
            source.give_back(held[1:])
            yield held, UserError(problem, where, f"{remedy}, {SKIP}\n  {keys}")
        elif error is None:
            if values:
                if len(held) == 1 and len(values) == columns.width:
                    columns.add(values)
                yield held, values
        elif (again := _without_blanks(held, layout)) is not None:
            yield held, again
        elif "unexpected end" in str(error) or "field limit" in str(error):
            problem = "a quoted field is opened here and never closed"
            raise UserError(problem, where, f'Close it, or double it: "". {TEXT_REMEDY}')
        elif below:
            raise UserError(
                f"a quoted field is opened here and ends wrongly {below} lines below ({error})",
                where,
                f'Double quotes that belong to the text: "say ""a""". {TEXT_REMEDY}',
            )
        else:
            remedy = (
                f'Double the quotes inside a quoted field: "say ""a""", {SKIP}\n  {TEXT_REMEDY}'
            )
            yield held, UserError(f"broken CSV: {error}", where, remedy)


def _without_blanks(held: list[Line], layout: Layout) -> list[str] | None:
    """Return the cells of a line with blanks between a closing quote and the separator.

    The csv module refuses such a line; None if it is wrong in another way.
    """
    text = re.sub(rf'" +(?={re.escape(layout.separator)}|\r?\n)', '"', held[0].text)
    if len(held) > 1 or text == held[0].text:
        return None
    try:
        return next(layout.parse(iter([text])))
    except csv.Error:
        return None


def _row(header: _Header, layout: Layout, held: list[Line], values: list[str]) -> Row:
    where, named = layout.where(held[0]), len(header.names)
    misread = any(value[:1].isspace() and value.lstrip()[:1] == '"' for value in values)
    if layout.quotes != "text" and (misread or len(values) != header.width):
        # A blank between separator and quote: the quote encloses all the same.
        with suppress(csv.Error):
            values = next(layout.parse((line.text for line in held), padded=True), values)
    unnamed = next((i for i in range(named, len(values)) if values[i].strip()), None)
    if len(values) < named or (unnamed is not None and unnamed >= header.width):
        lines = f" (of {len(held)} lines)" if len(held) > 1 else ""
        names = {",": "comma", ";": "semicolon", "\t": "tab"}
        separator = names.get(layout.separator, repr(layout.separator))
        return UserError(
            f"the row{lines} has {len(values)} fields, the header {named}",
            where,
            f'Quote fields that hold a {separator} or a newline: "a, b", {SKIP}',
        )
    if unnamed is not None:
        names = [*header.names, *(f"column{i + 1}" for i in range(named, header.width))]
        return UserError(
            f"column {unnamed + 1} has no name, and here the text {values[unnamed][:40]!r}",
            where,
            f"Name the column, {SKIP}\n  For example, the first line may be: "
            f"{layout.separator.join(names)}",
        )
    if layout.padded:
        values = [value.strip() for value in values]
    return where, dict(zip(header.names, values, strict=False))


def _header(source: Lines, layout: Layout) -> _Header:
    """Names without blanks around them; unnamed columns before the last name are called column1, ..."""
    try:
        cells = next((cells for cells in layout.parse(source) if cells), [])
    except csv.Error as error:
        raise UserError(f"the header is no CSV ({error})", layout.where(source.held[0])) from None
    where = layout.where(source.held[0])
    for line in source.held:
        if line.fault:
            raise line.fault
    names = [cell.strip() for cell in cells]
    width = len(names)
    while names and not names[-1]:
        names.pop()
    if not names and cells:
        raise UserError(
            "the first line names no column",
            where,
            "It must hold the names of the columns, e.g. text,label",
        )
    names = [name or f"column{i}" for i, name in enumerate(names, 1)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(
            f"the header names {', '.join(map(repr, doubled))} twice", where, "Rename a column."
        )
    return _Header(names, width)


def _layout(path: Path, sample: list[Line], options: FileOptions) -> Layout | None:
    """Tell how the file is written; None for one without any line."""
    first_line = next((i for i, line in enumerate(sample) if line.text.strip()), None)
    if first_line is None:
        return None
    declared = SEPARATOR_LINE.fullmatch(sample[first_line].text)
    first_line += bool(declared)
    if first_line == len(sample):
        return None
    sample = sample[first_line:]

    # The mark that most lines hold as often as the header; in a .tsv a tab comes first, else a comma.
    marks = ("\t", ",", ";") if ".tsv" in path.name.lower() else (",", ";", "\t")
    header, *texts = (line.text.rstrip("\r\n") for line in sample)
    present = [mark for mark in marks if mark in header]
    separator = present[0] if present else marks[0]
    if declared:
        separator = declared[1]
    elif separator != "\t" and len(present) > 1:
        alike = {mark: sum(t.count(mark) == header.count(mark) for t in texts) for mark in present}
        separator = max(alike, key=alike.__getitem__)

    layout = Layout(path, separator, options.quotes, False, first_line)
    names = layout.split(sample[0])
    layout.padded = any(name != name.strip() for name in names)
    # A .tsv either quotes as the others do, or, as the format's own definition says, not at all.
    if separator == "\t" and options.quotes == "auto":
        columns, source = Columns(len(names)), Lines(iter(sample))
        columns.learn(sample[1:], layout)
        try:
            rows = [values for _, values in _records(source, layout, columns)]
            is_text = any(isinstance(values, UserError) for values in rows)
        except UserError:
            is_text = source.held[-1] is not sample[-1]  # the sample may end inside a cell
        if is_text:
            layout.quotes = "text"
    return layout


def _decoded(path: Path, source: Iterator[utf8.Line]) -> Iterator[Line]:
    for line in source:
        try:
            yield Line(line.number, line.data.decode("utf-8") + "\n", None)
        except UnicodeDecodeError as error:
            # The reader must go on to find the row's end; the row is refused by its caller.
            fault = invalid_utf8(path, f"{path}:{line.number}", error)
            yield Line(line.number, line.data.decode("utf-8", errors="replace") + "\n", fault)
