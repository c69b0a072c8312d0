"""Cache of examples, encoded once into memory-mapped columns.

Flow: (files, encoder, policy) -> fingerprint -> <cache>/<fingerprint>; if it does not exist: lock,
write to a temporary folder beside it, fsync, rename. Any number of processes may call `build_store`
at once: one builds, the others wait and open the result. Bad rows stop the build or are counted, as
`on_bad_row` says.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from finetune.data.cache_builder import BadRows, Meter, Progress, check_bad_rows, run
from finetune.data.columns import (
    FORMAT,
    Column,
    ColumnWriter,
    Encoder,
    Example,
    Store,
    open_store,
    store_fault,
    write_meta,
)
from finetune.data.sources import Source, open_source
from finetune.data.tokenizer import TokenLimit
from finetune.data.utf8 import DEFAULTS, FileOptions
from finetune.errors import UserError
from finetune.files import fsync

__all__ = [
    "Column",
    "Encoder",
    "Example",
    "Store",
    "build_store",
    "default_cache_dir",
    "open_store",
]

log = logging.getLogger(__name__)
CHECKED_IDS = 1 << 24
"""Ids of a finished store that are compared with an embedding at once."""


def build_store(
    spec: str,
    split: str,
    encoder: Encoder,
    *,
    cache_dir: Path | None = None,
    on_bad_row: str = "error",
    max_bad_rows: int = 100,
    config: str | None = None,
    options: FileOptions = DEFAULTS,
    progress: Progress | None = None,
    limit: TokenLimit | None = None,
) -> Store:
    """Open the store of these data under this encoder, building it if the cache does not have it.

    Args:
        limit: rejects ids that the model has no embedding row for, naming the row of the first one.

    Raises:
        UserError: a bad row with on_bad_row=error, more than `max_bad_rows` of them with skip, a
            faulty file, no example at all, or a disk that is full or not writable.
    """
    assert on_bad_row in ("error", "skip")
    source = open_source(spec, split, config, options)
    fingerprint = _fingerprint(source, encoder, on_bad_row)
    folder = (Path(cache_dir) if cache_dir else default_cache_dir()) / fingerprint[:16]
    if store_fault(folder) is None:
        return _reuse(folder, max_bad_rows, limit)
    with _disk_faults(folder), _lock(folder):
        if store_fault(folder) is None:  # another process built it while this one waited
            return _reuse(folder, max_bad_rows, limit)
        _remove_leftovers(folder)
        rows = BadRows(on_bad_row, max_bad_rows)
        with _temporary(folder) as temporary:
            _build(temporary, spec, source, encoder, rows, fingerprint, progress, limit)
    return Store(folder)


def _reuse(folder: Path, max_bad_rows: int, limit: TokenLimit | None) -> Store:
    """Open a finished store and check it against the current limits.

    It may have been built with a higher `max_bad_rows` or for a larger embedding.
    """
    store = Store(folder)
    if limit:
        ids = store.column("ids")
        for start in range(0, len(ids), CHECKED_IDS):
            chunk = ids[start : start + CHECKED_IDS]
            at = int(chunk.argmax())
            if chunk[at] >= limit.rows:
                example = int(np.searchsorted(store.offsets, start + at, side="right")) - 1
                limit.check([chunk[at]], store.place(example))
    check_bad_rows(store.stats["bad_rows"], store.stats["bad_row_messages"], max_bad_rows)
    return store


def default_cache_dir() -> Path:
    """Return $FINETUNE_CACHE, or finetune-gptj in the user's cache folder."""
    if os.environ.get("FINETUNE_CACHE"):
        return Path(os.environ["FINETUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-gptj"


def _fingerprint(source: Source, encoder: Encoder, on_bad_row: str) -> str:
    columns = {name: [column.kind, column.dtype] for name, column in encoder.columns.items()}
    parts = [FORMAT, source.identity, encoder.fingerprint(), columns, on_bad_row]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _build(
    folder: Path,
    spec: str,
    source: Source,
    encoder: Encoder,
    rows: BadRows,
    fingerprint: str,
    progress: Progress | None,
    limit: TokenLimit | None,
) -> None:
    started = time.monotonic()
    writer = ColumnWriter(folder, encoder.columns)
    meter = Meter(source.total_bytes, writer, progress)
    try:
        documents = run(source, encoder, rows, writer, meter, limit)
        if writer.examples == 0:
            raise rows.nothing_left(spec, documents)
        sizes = writer.close()
    except BaseException:
        writer.abandon()
        raise
    stats = {
        "documents": documents,
        "left_out": rows.left_out,
        **writer.stats(),
        "bad_rows": rows.count,
        "bad_row_messages": rows.messages,
        "seconds": round(time.monotonic() - started, 3),
    }
    columns = {name: {"kind": c.kind, "dtype": c.dtype} for name, c in encoder.columns.items()}
    names = {name: list(table) for name, table in writer.names.items()}
    write_meta(
        folder,
        {
            "fingerprint": fingerprint,
            "spec": spec,
            "columns": columns,
            "names": names,
            "sizes": sizes,
            "stats": stats,
        },
    )
    meter.show(force=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Allow one builder per store.

    A flock ends with its process, so a killed builder blocks no other.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is tokenising the same data (%s)", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed builder left, or a damaged store; call with the lock held."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        log.warning(
            "token cache %s is damaged (%s); building it again", folder, store_fault(folder)
        )
        shutil.rmtree(folder)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(folder.parent)


DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew beyond the limit of this account",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "the folder is not writable",
    errno.EPERM: "the folder is not writable",
    errno.ENOTDIR: "part of this path is a file",
    errno.EEXIST: "part of this path is a file",
}


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise UserError(
            f"the token cache cannot be written: {DISK_FAULTS[error.errno]}",
            str(folder.parent),
            "Free some space, or try data.cache_dir=/a/larger/disk",
        ) from None
