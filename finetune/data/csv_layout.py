"""Layout of a csv or tsv file and of its columns: enough to tell its rows from lines of text in one cell.

Reads nothing and knows no row (`csv_file`).
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune.errors import UserError

MOST_VALUES = 1000
"""Distinct values up to which a column is taken for one of labels."""
SURE_ROWS = 20
"""Rows after which a value that none of them has is taken for no label."""


class Line(NamedTuple):
    number: int
    text: str
    """With its newline."""
    fault: UserError | None
    """It is not valid UTF-8."""


@dataclass
class Layout:
    path: Path
    separator: str
    quotes: str
    """auto, enclose or text, as in `FileOptions`."""
    padded: bool
    """Blanks stand around names and cells, as in `text, label`."""
    first_line: int
    """Lines before the header."""

    def where(self, line: Line) -> str:
        return f"{self.path}:{line.number}"

    def parse(self, source: Iterator[str], padded: bool | None = None) -> Iterator[list[str]]:
        return csv.reader(
            source,
            strict=True,
            delimiter=self.separator,
            quoting=csv.QUOTE_NONE if self.quotes == "text" else csv.QUOTE_MINIMAL,
            skipinitialspace=self.padded if padded is None else padded,
        )

    def split(self, line: Line) -> list[str]:
        """The cells of a line on which quotes mean nothing."""
        cells = line.text.rstrip("\r\n").split(self.separator)
        return [cell.strip() for cell in cells] if self.padded else cells


class Lines:
    """An iterator over lines that remembers those of the current record and takes lines back."""

    def __init__(self, source: Iterator[Line]):
        self.held: list[Line] = []
        self._source, self._returned = source, deque[Line]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._source)
        self.held.append(line)
        return line.text

    def give_back(self, rest: list[Line]) -> None:
        self._returned.extendleft(reversed(rest))


class Columns:
    """The values that the columns of a file hold, to tell rows from lines of text inside one cell.

    A column of few values, such as labels, decides: a line whose cells there are none of them is no row. Without such
    a column every line must have exactly the row's number of cells, none of them empty or beginning with a blank.
    """

    def __init__(self, width: int):
        self.width = width
        # Of the sample: rows of one line; rows of several lines, each of which could be a row; other rows of several.
        self.rows, self.exact, self.breaks = 0, 0, 0
        self._values: list[set[str] | None] = [set() for _ in range(width)]

    def add(self, cells: list[str]) -> None:
        """Remember the cells of one row that is certain to be one."""
        for j, (values, cell) in enumerate(zip(self._values, cells, strict=False)):
            if values is not None:
                values.add(cell[:200])
                if len(values) > MOST_VALUES:
                    self._values[j] = None

    def learn(self, sample: list[Line], layout: Layout) -> None:
        """Count the rows of one line; where there are hardly any, the lines without quotes that have a row's cells."""
        source = Lines(iter(sample))
        reader = layout.parse(source)
        while True:
            source.held.clear()
            try:
                cells = next(reader, None)
            except csv.Error:
                continue
            if cells is None:
                break
            if len(source.held) == 1 and len(cells) == self.width:
                self.add(cells)
                self.rows += 1
            elif len(cells) == self.width:
                exact = all(self._is_exact(layout.split(line)) for line in source.held)
                self.exact, self.breaks = self.exact + exact, self.breaks + (not exact)
        for line in sample if self.rows < 3 else ():
            cells = layout.split(line)
            if '"' not in line.text and len(cells) == self.width:
                self.add(cells)
                self.rows += 1

    def swallows(self, held: list[Line], layout: Layout, values: list[str] | None) -> str:
        """Return "yes" where the lines of one record are rows of their own, joined by a stray quote; "perhaps" or "no".

        The first line of a record always has the true cells before the quoted one, and the last line those behind it:
        both must look like rows as a whole. Of the lines between, half may be anything.

        Args:
            values: the record's cells, where its quotes are closed.
        """
        if self.width < 2 or len(held) < 2 or layout.quotes == "enclose":
            return "no"
        few = {
            j: seen
            for j, seen in enumerate(self._values)
            if seen and self.rows >= 3 and ("" in seen) < len(seen) <= self.rows // 2 + 1
        }
        own = values if values and len(values) == self.width else None
        head = layout.split(held[0])
        # The column of the stray quote itself may hold any text, unless it is one of labels.
        column = len(next(csv.reader([held[0].text], delimiter=layout.separator))) - 1
        if column in few and head[min(column, len(head) - 1)].strip('"') not in few[column]:
            del few[column]
        head_fits = self._fits(head, few, own)
        if not head_fits and not self._is_exact(head):
            return "no"
        others = [layout.split(line) for line in held[1:]]
        # In a file full of cells with line breaks the shape of lines says little.
        exact = self.breaks <= self.exact and all(map(self._is_exact, [head, *others]))
        if exact and layout.separator == "\t":
            return "yes"  # tabs do not stand in text
        between = [cells for cells in others if cells != [""]]
        tail_fits = not values or self._fits(between.pop(), few, own)
        looks = [self._fits(cells, few, own) for cells in between]
        most = 2 * sum(looks) >= len(looks)
        if head_fits and most and tail_fits:
            return "yes"
        unsure = not few or self.rows < SURE_ROWS or (looks and most)
        return "perhaps" if exact and unsure else "no"

    def _is_exact(self, cells: list[str]) -> bool:
        return len(cells) == self.width and all(
            cell and not cell[0].isspace() for cell in cells[1:]
        )

    def _fits(self, cells: list[str], few: dict[int, set[str]], own: list[str] | None) -> bool:
        """Return whether the cells of a line are known, or the record's own, in all columns of few values.

        Text with separators in it moves the cells behind it: they are counted from the right as well.
        """
        if len(cells) < self.width:
            return False
        hits = 0
        for j, seen in few.items():
            for cell in (cells[j], cells[j - self.width]):
                if cell in seen or cell.strip('"') in seen or (own and cell == own[j]):
                    hits += cell != ""
                    break
            else:
                return False
        return hits > 0
