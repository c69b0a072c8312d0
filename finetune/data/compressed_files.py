"""Bytes of a plain, gzip or zstd file as decompressed chunks, in bounded memory.

The content decides how a file is decompressed, not its name: downloads are often named wrongly. Both compressors
allow several frames one after another. A file that ends inside a frame is an error here, although Python's own
readers of .zst end silently. Knows neither text nor lines (`utf8`).
"""

from __future__ import annotations

import gzip
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

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
    """Return the first bytes of the file as it lies on disk.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from None


def compression(path: Path) -> str:
    """Return gzip, zstd or "", by content; if that tells nothing, by name."""
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
    """Yield decompressed pieces of a file; `count` is called with the bytes of the file consumed.

    Raises:
        BrokenStream: truncated or damaged compression; every byte before the fault was yielded.
        UserError: the file cannot be read.
    """
    read = {"gzip": _gunzip, "zstd": _unzstd, "": _read}[compression(path)]
    try:
        with open(path, "rb") as file:
            done = 0
            for piece in read(file):
                if count:
                    count(file.tell() - done)
                    done = file.tell()
                yield piece
            if count:
                count(file.tell() - done)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from None


def show_line(path: Path, number: int) -> str:
    """Return the shell command that prints one line of a file."""
    if compression(path):
        return f"{decompress_command(path)} | sed -n {number}p"
    return command(["sed", "-n", f"{number}p", path])


def decompress_command(path: Path) -> str:
    """Return the shell command that decompresses a file whatever its name."""
    return f"{compression(path)} -dc < {shlex.quote(str(path))}"


def renamed(path: Path, mark: str) -> str:
    """Return the quoted path of a new file beside this one: a.csv.gz -> a.utf8.csv."""
    name = re.sub(r"\.(gz|zst)$", "", path.name, flags=re.IGNORECASE)
    stem, dot, suffix = name.rpartition(".")
    return shlex.quote(str(path.with_name(f"{stem}.{mark}.{suffix}" if dot else f"{name}.{mark}")))


def _read(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(READ_BYTES), b"")


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    """Decompress all members; zeros between them, e.g. of tapes, are padding."""
    try:
        # read1 returns what precedes a fault, and never more than it is asked for: 256 KiB of a
        # highly repetitive file inflate to 256 MiB.
        yield from iter(partial(gzip.GzipFile(fileobj=file).read1, 4 * READ_BYTES), b"")
    except EOFError:
        raise BrokenStream("the gzip stream is truncated") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        if repr(GZIP[:1]) in str(error):  # the file ends behind the first byte of a member
            raise BrokenStream("the gzip stream is truncated") from None
        raise BrokenStream(f"the gzip data is damaged ({error})") from None


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame, step = None, 1024
    for data in _read(file):
        while data:
            frame = frame or decompressor.decompressobj()
            piece, data = data[:step], data[step:]
            try:
                text = frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise BrokenStream(f"the zstd data is damaged ({error})") from None
            # decompressobj gives all that a piece expands to at once: of very repetitive data take
            # smaller pieces.
            fitting = max(64, step * 4 * READ_BYTES // max(1, len(text)))
            step = min(ZSTD_STEP_BYTES, 2 * step, fitting)
            yield text
            if frame.eof:
                data, frame = frame.unused_data + data, None
    if frame is not None:
        raise BrokenStream("the zstd stream is truncated")
