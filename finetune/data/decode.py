"""Bytes of a plain, .gz or .zst file as chunks and as lines, in bounded memory.

Flow: file -> chunks (decompressed) -> lines. Both compressors allow several frames one after another. A file that
ends inside a frame is an error here, although Python's own readers of .zst end silently. Parses nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import UserError, gib

READ_BYTES = 1 << 18
LINE_LIMIT_BYTES = 256 << 20
# 2 GiB: what `zstd --long=31` writes. The memory is only taken for files that were written so.
ZSTD_WINDOW_BYTES = 1 << 31
ZSTD_STEP_BYTES = 1 << 16
UTF8_BOM = b"\xef\xbb\xbf"

Count = Callable[[int], None]


class Line(NamedTuple):
    number: int
    """From 1."""
    data: bytes
    """Without its newline."""
    complete: bool
    """False for a last line that ends the file without a newline."""


class BrokenStream(Exception):
    """The compressed stream ends early or is damaged; `str(error)` is the reason."""


def chunks(path: Path, count: Count | None = None) -> Iterator[bytes]:
    """Decompressed pieces of a file; `count` is told how many bytes of the file itself were consumed.

    Raises:
        BrokenStream: truncated or damaged compression; every byte before the fault was yielded.
        UserError: the file cannot be read.
    """
    pieces = _read(path, count or (lambda _: None))
    if path.suffix.lower() == ".gz":
        return _inflate(pieces)
    if path.suffix.lower() == ".zst":
        return _zstd(pieces)
    return pieces


def lines(path: Path, count: Count | None = None) -> Iterator[Line]:
    """Lines split at b"\\n" only, a UTF-8 byte order mark removed.

    Raises:
        UserError: file:line of a broken stream, a UTF-16 file, or a line beyond 256 MiB.
    """
    number, tail, tail_bytes, first = 0, [], 0, True
    try:
        for chunk in chunks(path, count):
            if first and chunk:
                chunk, first = strip_bom(chunk, path), False
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
                raise _line_too_long(path, number + 1)
    except BrokenStream as fault:
        raise broken_file(path, fault, number) from None
    last = b"".join(tail)
    if last:
        yield Line(number + 1, last, False)


def strip_bom(chunk: bytes, path: Path) -> bytes:
    """The first chunk of a file without its byte order mark; UTF-16 and UTF-32 are refused."""
    if chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError("this file is UTF-16, not UTF-8", f"{path}:1",
                        f"Try iconv -f UTF-16 -t UTF-8 {path} > converted{path.suffix}")
    return chunk.removeprefix(UTF8_BOM)


def broken_file(path: Path, fault: BrokenStream, good_lines: int) -> UserError:
    last = f"the last good line is {good_lines}" if good_lines else "no line of it can be read"
    return UserError(f"{fault}; {last}", f"{path}:{good_lines + 1}",
                     "Download or copy it again and compare its size or checksum with the source; "
                     f"to keep what is readable, decompress the first {good_lines} lines to another file.")


def _line_too_long(path: Path, number: int) -> UserError:
    return UserError(f"a line is longer than {gib(LINE_LIMIT_BYTES)}", f"{path}:{number}",
                     "One record per line is expected; if the file is one JSON array, name it .json.")


def _read(path: Path, count: Count) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                count(len(piece))
                yield piece
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from None


def _inflate(pieces: Iterator[bytes]) -> Iterator[bytes]:
    frame: Any = None
    for data in pieces:
        while data:
            if frame is None:
                data = data.lstrip(b"\0")  # padding between members, e.g. of tapes
                if not data:
                    break
                frame = zlib.decompressobj(wbits=31)
            try:
                # max_length: 256 KiB of a highly repetitive file inflate to 256 MiB otherwise.
                yield frame.decompress(data, 4 * READ_BYTES)
            except zlib.error as error:
                raise BrokenStream(f"the gzip data is damaged ({error})") from None
            data = frame.unused_data if frame.eof else frame.unconsumed_tail
            frame = None if frame.eof else frame
    if frame is not None:
        yield from _drain(frame)
        if not frame.eof:
            raise BrokenStream("the gzip stream is truncated")


def _drain(frame: Any) -> Iterator[bytes]:
    try:
        yield frame.flush()
    except zlib.error as error:
        raise BrokenStream(f"the gzip data is damaged ({error})") from None


def _zstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame, step = None, 1024
    for data in pieces:
        while data:
            frame = frame or decompressor.decompressobj()
            piece, data = data[:step], data[step:]
            try:
                text = frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise BrokenStream(f"the zstd data is damaged ({error})") from None
            # decompressobj gives all that a piece expands to at once: of very repetitive data take smaller pieces.
            step = min(ZSTD_STEP_BYTES, 2 * step, max(64, step * 4 * READ_BYTES // max(1, len(text))))
            yield text
            if frame.eof:
                data, frame = frame.unused_data + data, None
    if frame is not None:
        raise BrokenStream("the zstd stream is truncated")
