"""Bytes of a plain, gzip or zstd file as decompressed chunks, in bounded memory.

The content decides how a file is decompressed, not its name: downloads are often named wrongly. Both compressors
allow several frames one after another. A file that ends inside a frame is an error here, although Python's own
readers of .zst end silently. Knows neither text nor lines (`utf8`).
"""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.errors import UserError, command

READ_BYTES = 1 << 18
# 2 GiB: what `zstd --long=31` writes. The memory is only taken for files that were written so.
ZSTD_WINDOW_BYTES = 1 << 31
ZSTD_STEP_BYTES = 1 << 16
HEAD_BYTES = 512
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")

Count = Callable[[int], None]


class BrokenStream(Exception):
    """The compressed stream ends early or is damaged; `str(error)` is the reason."""


def head_of(path: Path) -> bytes:
    """The first bytes of the file as it lies on disk.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from None


def compression(path: Path) -> str:
    """gzip, zstd or "", by content; where that tells nothing, by name."""
    head = head_of(path)
    if head.startswith(GZIP):
        return "gzip"
    if head.startswith(ZSTD) or ZSTD_SKIPPABLE.match(head):
        return "zstd"
    named = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower(), "")
    # Plain text under a compressed name is read as text; anything else is a damaged archive.
    magic = {"gzip": GZIP, "zstd": ZSTD}.get(named, b"")
    is_text = not magic.startswith(head) and not re.search(rb"[^\t\n\f\r -~\x80-\xff]", head)
    return "" if is_text else named


def chunks(path: Path, count: Count | None = None) -> Iterator[bytes]:
    """Decompressed pieces of a file; `count` is told how many bytes of the file itself were consumed.

    Raises:
        BrokenStream: truncated or damaged compression; every byte before the fault was yielded.
        UserError: the file cannot be read.
    """
    pieces = _read(path, count or (lambda _: None))
    unpack = {"gzip": _inflate, "zstd": _zstd}.get(compression(path))
    return unpack(pieces) if unpack else pieces


def show_line(path: Path, number: int) -> str:
    """The shell command that prints one line of a file."""
    if compression(path):
        return f"{decompress_command(path)} | sed -n {number}p"
    return command(["sed", "-n", f"{number}p", path])


def decompress_command(path: Path) -> str:
    """The shell command that decompresses a file whatever its name."""
    return f"{compression(path)} -dc < {shlex.quote(str(path))}"


def renamed(path: Path, mark: str) -> str:
    """a.csv.gz -> a.utf8.csv, beside it."""
    name = re.sub(r"\.(gz|zst)$", "", path.name, flags=re.IGNORECASE)
    stem, dot, suffix = name.rpartition(".")
    return shlex.quote(str(path.with_name(f"{stem}.{mark}.{suffix}" if dot else f"{name}.{mark}")))


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
            step = min(
                ZSTD_STEP_BYTES, 2 * step, max(64, step * 4 * READ_BYTES // max(1, len(text)))
            )
            yield text
            if frame.eof:
                data, frame = frame.unused_data + data, None
    if frame is not None:
        raise BrokenStream("the zstd stream is truncated")
