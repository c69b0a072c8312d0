"""Elements of one large .json file, an array or {"data": [...]}, in bounded memory.

Flow: chunks -> a sliding text window -> json.raw_decode of one element after another. A .json file that holds one
object per line is handed to the .jsonl reader. A fault is raised: nothing behind it can be found again.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.compressed_files import BrokenStream, Count
from finetune.data.formats import Row, check_object, json_type, jsonl_rows
from finetune.data.utf8 import DEFAULTS, FileOptions, broken_file, invalid_utf8, text_chunks
from finetune.errors import UserError

SPACE = " \t\r\n"
HEAD_BYTES = 16 << 20
"""A longer first line is taken for a whole document."""
SHAPES = 'A .json file is one array [...], one object {"data": [...]}, or one object per line.'


def json_rows(
    path: Path, count: Count | None = None, options: FileOptions = DEFAULTS
) -> Iterator[Row]:
    if _is_jsonl(path, options):
        return jsonl_rows(path, count, options)
    return _document_rows(path, count, options)


def _is_jsonl(path: Path, options: FileOptions) -> bool:
    """Return whether the first line alone is an object that is not the whole {"data": [...]}."""
    head = b""  # from the first line that is not blank
    try:
        for chunk in text_chunks(path, encoding=options.encoding):
            head = (head + chunk).lstrip()
            if b"\n" in head:
                break
            if len(head) > HEAD_BYTES:
                return False
    except BrokenStream:
        return False  # reported with its line by the reader proper
    try:
        first = json.loads(head.split(b"\n")[0]) if head.startswith(b"{") else []
    except ValueError:
        return False
    return isinstance(first, dict) and not isinstance(first.get("data"), list)


def _document_rows(path: Path, count: Count | None, options: FileOptions) -> Iterator[Row]:
    window = _Window(path, count, options)
    opening = window.peek()
    if opening == "":
        return
    if opening not in ("{", "["):
        raise window.fault("this is neither an array nor an object", SHAPES)
    if opening == "{":
        # Move to the array under the key "data"; other keys (SQuAD's "version") are read over.
        window.take("{")
        while True:
            if window.peek() == "}":
                raise window.fault("this is one object without an array 'data'", SHAPES)
            key = window.value()
            window.take(":")
            if key == "data" and window.peek() == "[":
                break
            value = window.value()
            if key == "data":
                raise window.fault(f"'data' is {json_type(value)}, not an array", SHAPES)
            if window.peek() == ",":
                window.take(",")

    window.take("[")
    index = 0
    while window.peek() != "]":
        line = window.line_here()
        yield check_object(window.value(), f"{path}:{line}[{index}]")
        index += 1
        if window.peek() != "]":
            window.take(",")
            if window.peek() == "]":
                raise window.fault("a comma stands before the closing bracket", "Remove the comma.")
    window.take("]")

    if opening == "{":
        while window.peek() == ",":
            window.take(",")
            window.value()
            window.take(":")
            window.value()
        window.take("}")
    if window.peek():
        raise window.fault("there is more text behind the end of the JSON document", SHAPES)


class _Window:
    """A text window over the file that grows to hold one element and forgets what was read."""

    def __init__(self, path: Path, count: Count | None, options: FileOptions):
        self.path, self.text, self.at, self.line, self.ended = path, "", 0, 1, False
        self._seen, self._seen_lines = 0, 0  # newlines up to here in the window are counted
        self._chunks = filter(None, text_chunks(path, count, options.encoding))
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._parser = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow(1):
                return ""

    def take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.fault(
                f"broken JSON: expected '{character}', found {repr(found) if found else 'the end'}"
            )
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            start = self.at
            try:
                value, end = self._parser.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                # Doubling keeps the retries on one long element linear in total.
                if isinstance(error, RecursionError) or not self._grow(len(self.text) - self.at):
                    raise self._broken(error, start) from None
                continue
            # A number that touches the window's end may go on in the next chunk.
            if end < len(self.text) or not self._grow(1):
                self.at = end
                return value

    def line_here(self) -> int:
        """Line of the next character, from 1; each newline is counted once however often this is asked."""
        self._seen_lines += self.text.count("\n", self._seen, self.at)
        self._seen = self.at
        return self.line + self._seen_lines

    def fault(self, problem: str, remedy: str = "") -> UserError:
        line = self.line + self.text.count("\n", 0, self.at)
        return UserError(problem, f"{self.path}:{line}", remedy or SHAPES)

    def _broken(self, error: Exception, start: int) -> UserError:
        if isinstance(error, json.JSONDecodeError):
            # `_grow` has moved `start` to 0 meanwhile.
            self.at = error.pos - start
            cut = (
                " (the file is cut off)"
                if "Unterminated" in error.msg or self.at >= len(self.text.rstrip())
                else ""
            )
            return self.fault(f"broken JSON: {error.msg}{cut}")
        return self.fault(
            f"broken JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"
        )

    def _grow(self, characters: int) -> bool:
        """Forget what was read and append at least `characters`; False at the end of the file."""
        self.line += self.text.count("\n", 0, self.at)
        parts, size = [self.text[self.at :]], 0
        self.at = self._seen = self._seen_lines = 0
        while size < max(1, characters) and not self.ended:
            parts.append(self._next_text())
            size += len(parts[-1])
        self.text = "".join(parts)
        return size > 0

    def _next_text(self) -> str:
        try:
            chunk = next(self._chunks, b"")
            self.ended = not chunk
            return self._decoder.decode(chunk, final=self.ended)
        except BrokenStream as fault:
            raise broken_file(self.path, fault, self.line - 1) from None
        except UnicodeDecodeError as error:
            line = self.line + error.object.count(b"\n", 0, error.start)
            raise invalid_utf8(self.path, f"{self.path}:{line}", error) from None
