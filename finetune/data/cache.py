"""Cache of examples, encoded once into memory-mapped columns.

Flow: (files, encoder, policy) -> fingerprint -> <cache>/<fingerprint>; if it does not exist: lock,
write to <fingerprint>.part beside it, fsync, rename. Now and then progress.json there names a place
up to which everything is on the disk, and a build that was killed goes on from it. Any number of
processes may call `build_store` at once: one builds, the others wait and open the result. Bad rows
stop the build or are counted, as `on_bad_row` says.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from finetune.data.cache_builder import (
    Counts,
    Meter,
    Position,
    Progress,
    check_bad_rows,
    encode_rows,
)
from finetune.data.columns import FORMAT, META, ColumnWriter, Encoder, Store, store_fault
from finetune.data.mixture import DataSource
from finetune.data.sources import Source, open_source
from finetune.data.tokenizer import TokenLimit
from finetune.data.utf8 import DEFAULTS, FileOptions
from finetune.errors import UserError
from finetune.files import fsync, read_json, write_json

log = logging.getLogger(__name__)
PROGRESS = "progress.json"
SAVE_SECONDS = 30.0
"""Least time between two places from which an interrupted build goes on."""
CHECKED_IDS = 1 << 24
"""Ids of a finished store that are compared with an embedding at once."""


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


def build_store(
    sources: Sequence[DataSource],
    encoder: Encoder,
    *,
    cache_dir: Path | None = None,
    on_bad_row: str = "error",
    max_bad_rows: int = 100,
    options: FileOptions = DEFAULTS,
    progress: Progress | None = None,
    limit: TokenLimit | None = None,
) -> Store:
    """Open the store of these data under this encoder, building it if the cache does not have it.

    Args:
        sources: their examples stand one source behind the other in the store.
        limit: rejects ids that the model has no embedding row for, naming the row of the first one.

    Raises:
        UserError: a bad row with on_bad_row=error, more than `max_bad_rows` of them with skip, a
            faulty file, no example at all, or a disk that is full or not writable.
    """
    assert on_bad_row in ("error", "skip")
    opened = [(s, open_source(s.path, s.split, s.config, options)) for s in sources]
    columns = {name: [column.kind, column.dtype] for name, column in encoder.columns.items()}
    identities = [[source.identity, named.max_rows] for named, source in opened]
    parts = [FORMAT, identities, encoder.fingerprint(), columns, on_bad_row]
    fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    folder = (Path(cache_dir) if cache_dir else default_cache_dir()) / fingerprint[:16]
    if store_fault(folder) is None:
        return _reuse(folder, max_bad_rows, limit)

    # One builder per store. The lock ends with its process, so a killed builder blocks no other.
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("waiting for another process that is tokenising the same data (%s)", folder)
            lock.acquire()
        if store_fault(folder) is None:  # another process built it while this one waited
            return _reuse(folder, max_bad_rows, limit)
        if folder.exists():
            fault = store_fault(folder)
            log.warning("token cache %s is damaged (%s); building it again", folder, fault)
            shutil.rmtree(folder)
        temporary = folder.with_name(f"{folder.name}.part")
        try:
            begun = _begun(temporary)  # of a builder that was killed
            if not begun:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
            else:
                log.info("going on with the token cache %s that was interrupted", folder)
            counts = Counts(on_bad_row, max_bad_rows)
            meta = {"fingerprint": fingerprint, "spec": ", ".join(s.path for s in sources)}
            _write_store(temporary, opened, encoder, counts, meta, progress, limit, begun)
            (temporary / PROGRESS).unlink(missing_ok=True)
            os.replace(temporary, folder)
        except Exception:  # not a signal, after which the same command goes on
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(folder.parent)
        if begun:  # its first rows may have been checked against other limits
            return _reuse(folder, max_bad_rows, limit)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise UserError(
            f"the token cache cannot be written: {DISK_FAULTS[error.errno]}",
            str(folder.parent),
            "Free some space, or try data.cache_dir=/a/larger/disk",
        ) from None
    finally:
        lock.release()
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


def _begun(folder: Path) -> dict[str, Any] | None:
    """Return how far a build has come; None: not far, or its files are not whole up to there."""
    try:
        state = read_json(folder / PROGRESS)
        sizes = state["writer"]["sizes"].items()
        if all((folder / f"{name}.bin").stat().st_size >= size for name, size in sizes):
            return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def default_cache_dir() -> Path:
    """Return $FINETUNE_CACHE, or finetune-gptj in the user's cache folder."""
    if os.environ.get("FINETUNE_CACHE"):
        return Path(os.environ["FINETUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-gptj"


def _write_store(
    folder: Path,
    sources: list[tuple[DataSource, Source]],
    encoder: Encoder,
    counts: Counts,
    meta: dict[str, Any],
    progress: Progress | None,
    limit: TokenLimit | None,
    begun: dict[str, Any] | None,
) -> None:
    """Encode sources into the files of a store; `meta` is the beginning of its meta.json.

    Args:
        begun: how far an earlier build of the same store came.
    """
    started = time.monotonic() - (begun["seconds"] if begun else 0)
    writer = ColumnWriter(folder, encoder.columns, begun["writer"] if begun else None)
    meter = Meter(sum(source.total_bytes for _, source in sources), writer, progress)
    parts: list[dict[str, int]] = begun["parts"] if begun else []
    before, start = (0, 0, 0), Position()
    if begun:
        counts.restore(begun["counts"])
        before, start = tuple(begun["before"]), Position(*begun["position"])

    saved = time.monotonic()

    def save(position: Position, counted: dict[str, Any]) -> None:
        nonlocal saved
        if time.monotonic() - saved < SAVE_SECONDS:
            return
        state = {"parts": parts, "before": before, "position": position, "counts": counted}
        saved = time.monotonic()
        write_json(
            folder / PROGRESS, state | {"seconds": saved - started, "writer": writer.state()}
        )

    try:
        meter.count(sum(source.total_bytes for _, source in sources[: len(parts)]))
        for named, source in sources[len(parts) :]:
            encode_rows(source, encoder, counts, writer, meter, limit, named.max_rows, start, save)
            after = writer.examples, counts.documents, writer.tokens
            names = ("examples", "documents", "tokens")
            parts.append({k: b - a for k, a, b in zip(names, before, after, strict=True)})
            if not parts[-1]["examples"]:
                shown = "".join(f"\n  {message}" for message in counts.bad_row_messages)
                bad = f", {counts.bad_rows} bad rows:{shown}" if counts.bad_rows else ""
                empty = f"{parts[-1]['documents']} empty rows or rows of weight 0"
                raise UserError(f"no example is left to train on ({empty}{bad})", named.path)
            before, start = after, Position()
        sizes = writer.close()
    except BaseException:
        writer.abandon()
        raise
    meta |= {
        "columns": {name: asdict(column) for name, column in encoder.columns.items()},
        "names": {name: list(table) for name, table in writer.names.items()},
        "sizes": sizes,
        "sources": parts,
        "stats": {
            "documents": counts.documents,
            "left_out": counts.left_out,
            **writer.stats(),
            "bad_rows": counts.bad_rows,
            "bad_row_messages": counts.bad_row_messages,
            "seconds": round(time.monotonic() - started, 3),
        },
    }
    write_json(folder / META, meta)
    meter.show(force=True)
