"""The text of data files as UTF-8 pieces and lines, and what to do about files in another encoding.

Flow: chunks (`compressed_files`) -> UTF-8 without a byte order mark -> lines. Whether a line is valid UTF-8 is for its reader to
find; the error that it raises then is made here, where the encoding of the whole file can be guessed. Parses nothing.
"""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from finetune.data.compressed_files import (
    GZIP,
    HEAD_BYTES,
    ZSTD,
    BrokenStream,
    Count,
    chunks,
    compression,
    decompress_command,
    renamed,
    show_line,
)
from finetune.errors import UserError, gib

LINE_LIMIT_BYTES = 256 << 20
UTF8_BOM = b"\xef\xbb\xbf"
UTF8_NAMES = ("utf-8", "utf8", "UTF-8", "UTF8", "ascii")
GUESS_BYTES = 4 << 20
"""Content from which an encoding is guessed."""
SKIP = "or set data.on_bad_row=skip to leave such rows out."
FIX = f"Fix the row, {SKIP}"


@dataclass(frozen=True)
class FileOptions:
    """Options for reading the text of data files that do not describe themselves."""

    encoding: str = "utf-8"
    """Python's name of it."""
    quotes: str = "auto"
    """Double quotes in comma, semicolon and tab separated files: auto, enclose or text."""


DEFAULTS = FileOptions()


class Line(NamedTuple):
    number: int
    """From 1."""
    data: bytes
    """Without its newline."""
    complete: bool
    """False for a last line that ends the file without a newline."""


def text_chunks(path: Path, count: Count | None = None, encoding: str = "utf-8") -> Iterator[bytes]:
    """Yield the text of a file as UTF-8 without a byte order mark; UTF-8 itself is not checked here.

    Raises:
        BrokenStream: as `chunks`; every byte before the fault was yielded.
        UserError: UTF-16 where UTF-8 was to be read, text that is not in `encoding`, or a file compressed twice.
    """
    pieces = chunks(path, count)
    first, fault = [], None
    try:
        while sum(map(len, first)) < HEAD_BYTES and (piece := next(pieces, None)) is not None:
            first.append(piece)
    except BrokenStream as error:
        fault = error
    head = b"".join(first)
    if head.startswith((GZIP, ZSTD)):
        raise UserError(
            "this file is compressed twice",
            str(path),
            f"Decompress it once: {decompress_command(path)} > {renamed(path, 'once')}",
        )
    if encoding in UTF8_NAMES:
        _refuse_utf16(path, head)
        yield from [head.removeprefix(UTF8_BOM)] if head.startswith(UTF8_BOM) else first
        yield from pieces
    else:
        _refuse_utf8(path, head, encoding)
        yield from _recoded(path, chain(first, pieces), encoding)
    if fault:
        raise fault


def _recoded(path: Path, pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Yield pieces in another encoding as UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    number, started = 1, False
    for piece in chain(filter(None, pieces), [b""]):
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            number += error.object[: error.start].decode(encoding, errors="ignore").count("\n")
            raise UserError(
                f"this is not {encoding}: byte 0x{error.object[error.start]:02x} has no meaning in "
                "it",
                f"{path}:{number}",
                "data.encoding must name the encoding of these files.",
            ) from None
        number += text.count("\n")
        yield (text if started else text.removeprefix("\ufeff")).encode(
            "utf-8", errors="surrogatepass"
        )
        started = started or bool(text)


def lines(path: Path, count: Count | None = None, encoding: str = "utf-8") -> Iterator[Line]:
    """Yield lines in UTF-8, split at b"\\n" only, a byte order mark removed.

    Raises:
        UserError: file:line of a broken stream, a UTF-16 file, or a line beyond 256 MiB.
    """
    number, tail, tail_bytes = 0, [], 0
    try:
        for chunk in text_chunks(path, count, encoding):
            *whole, rest = chunk.split(b"\n")
            if whole:
                whole[0] = b"".join([*tail, whole[0]])
                tail, tail_bytes = [], 0
            for data in whole:
                number += 1
                yield Line(number, data, True)
            tail.append(rest)
            tail_bytes += len(rest)
            if tail_bytes > LINE_LIMIT_BYTES:
                raise UserError(
                    f"a line is longer than {gib(LINE_LIMIT_BYTES)}",
                    f"{path}:{number + 1}",
                    "One record per line is expected; if the file is one JSON array, name it "
                    ".json.",
                )
    except BrokenStream as fault:
        raise broken_file(path, fault, number) from None
    last = b"".join(tail)
    if last:
        yield Line(number + 1, last, False)


def broken_file(path: Path, fault: BrokenStream, good_lines: int) -> UserError:
    last = f"the last good line is {good_lines}" if good_lines else "no line of it can be read"
    return UserError(
        f"{fault}; {last}",
        f"{path}:{good_lines + 1}",
        "Download or copy it again and compare its size or checksum with the source; "
        f"to keep what is readable, decompress the first {good_lines} lines to another file.",
    )


def invalid_utf8(path: Path, where: str, error: UnicodeDecodeError) -> UserError:
    """Return the error for text that is not UTF-8, with the file's encoding if it can be told.

    A remedy that reads the whole file in another encoding would garble a file that is UTF-8 but for one line.
    """
    byte = error.object[error.start]
    problem = f"invalid UTF-8: byte 0x{byte:02x} at position {error.start}"
    guess = _guessed(path, path.stat().st_size, path.stat().st_mtime_ns)
    line_start = error.object.rfind(b"\n", 0, error.start) + 1
    line = error.object[
        line_start : error.object.find(b"\n", error.start)
        if b"\n" in error.object[error.start :]
        else None
    ]
    if guess == "utf-8":
        return UserError(
            f"{problem}; other lines of this file are valid UTF-8",
            where,
            f"Fix this line ({show_line(path, int(where.rpartition(':')[2]))}), {SKIP}"
            if where.rpartition(":")[2].isdigit()
            else f"Fix this line, {SKIP}",
        )
    if guess:
        try:
            at = error.start - line_start
            text = line.decode(guess).strip()
            shown = (
                text
                if len(text) <= 60
                else line[max(0, at - 20) : at + 20].decode(guess, errors="ignore").strip()
            )
            return UserError(
                f"{problem}; read as {guess} it says {shown!r}", where, encoding_remedy(path, guess)
            )
        except UnicodeDecodeError:
            pass
    return UserError(
        f"{problem}; its encoding cannot be told",
        where,
        f"Ask the source of the file, or: file -i {shlex.quote(str(path))}\n"
        f"  Then try data.encoding=NAME, {SKIP}",
    )


def encoding_remedy(path: Path, encoding: str) -> str:
    """Return the key that reads such a file, and the command that converts it."""
    command = f"{decompress_command(path)} | iconv" if compression(path) else "iconv"
    source = "" if compression(path) else f" {shlex.quote(str(path))}"
    return (
        f"To train or evaluate on it: data.encoding={encoding.lower()}. Or convert the file:\n"
        f"    {command} -f {_iconv_name(encoding)} -t UTF-8{source} > {renamed(path, 'utf8')}"
    )


def _iconv_name(encoding: str) -> str:
    return encoding.upper().replace("UTF-16-", "UTF-16")


SCRIPTS = [
    ("cp1251", "[\u0410-\u044f\u0401\u0451]", 0.9),
    ("koi8-r", "[\u0410-\u044f\u0401\u0451]", 0.9),
    ("euc-kr", "[\uac00-\ud7a3]", 0.9),
    ("euc-jp", "[\u3040-\u30ff]", 0.3),
    ("shift_jis", "[\u3040-\u30ff]", 0.3),
]
"""Encoding, its own characters, and the share of them among the characters beyond ASCII that makes it certain."""


@lru_cache(maxsize=16)
def _guessed(path: Path, size: int, changed: int) -> str | None:
    """Guess the encoding of a file that is not UTF-8 as a whole.

    Returns:
        "utf-8" if most of it is; None if the encoding cannot be told.

    Args:
        size, changed: only distinguish versions of the file.
    """
    sample = b""
    try:
        for piece in chunks(path):
            sample += piece
            if len(sample) >= GUESS_BYTES:
                break
    except BrokenStream:
        pass
    lines = [line for line in sample.split(b"\n") if not line.isascii()]
    if len(sample) >= GUESS_BYTES:
        lines = lines[:-1]  # cut in the middle, perhaps of a character
    invalid = [line for line in lines if not _decodes(line, "utf-8")]
    if len(invalid) < len(lines):
        return "utf-8"
    data = b"\n".join(invalid)
    runs = re.findall(rb"[\x80-\xff]+", data)
    letters = len(re.findall(rb"[A-Za-z]", data))
    # Western languages: single letters beyond ASCII among many that are ASCII.
    if (
        runs
        and _decodes(data, "cp1252")
        and sum(map(len, runs)) < 1.5 * len(runs)
        and letters > 2 * len(runs)
    ):
        return "cp1252"
    for name, characters, share in SCRIPTS:
        if _decodes(data, name):
            beyond = re.findall(r"[^\x00-\x7f]", data.decode(name))
            cased = (
                name not in ("cp1251", "koi8-r")
                or sum(c.islower() for c in beyond) > len(beyond) / 2
            )
            if cased and len(re.findall(characters, "".join(beyond))) >= share * len(beyond):
                return name
    return None


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _refuse_utf16(path: Path, head: bytes) -> None:
    """Refuse UTF-16 and UTF-32, known by a byte order mark or the zeros of ASCII characters."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        name = "utf-32"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = "utf-16"
    elif head.count(0) > len(head) // 4:
        name = "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
    else:
        return
    raise UserError(
        f"this file is {name.upper()}, not UTF-8", f"{path}:1", encoding_remedy(path, name)
    )


def _refuse_utf8(path: Path, first: bytes, encoding: str) -> None:
    """Refuse UTF-8: reading it in another encoding gives wrong characters without any error."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(first)
    except UnicodeDecodeError:
        return
    if not text.isascii():
        raise UserError(
            f"this file is UTF-8, which data.encoding={encoding} would garble",
            str(path),
            "Leave data.encoding out, and convert those files that are not UTF-8: "
            f"iconv -f {_iconv_name(encoding)} -t UTF-8 OLD > NEW",
        )
