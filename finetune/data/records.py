"""Records of a data spec: files, globs, directories, `datasets` folders and hub ids -> (where, record).

Flow: spec -> source (its files) -> one reader per format (`rows`, `json_file`, `hub`) -> rows in a fixed order.
One pass, bounded memory. Bad rows are yielded as UserErrors, so that the caller counts or stops; faults of a whole
file are raised. Knows no task: fields are looked up by `get_field`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Union

from finetune.assets_path import resolve
from finetune.data import hub
from finetune.data.decode import Count
from finetune.data.json_file import json_rows
from finetune.data.rows import Reader, Row, csv_rows, jsonl_rows, parquet_rows, txt_rows
from finetune.errors import UserError

READERS: dict[str, Reader] = {
    ".jsonl": jsonl_rows, ".jsonl.gz": jsonl_rows, ".jsonl.zst": jsonl_rows,
    ".json": json_rows, ".json.gz": json_rows,
    ".csv": csv_rows, ".csv.gz": csv_rows, ".tsv": csv_rows, ".tsv.gz": csv_rows,
    ".parquet": parquet_rows,
    ".txt": txt_rows, ".txt.gz": txt_rows,
}
NO_DATA = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|(readme|license|notice)\.\w+", re.IGNORECASE)
"""Files of a directory that tell about its data."""
MISSING = object()
"""What `get_field` returns for an absent field."""
FULL_HASH_BYTES = 64 << 20
SAMPLE_BYTES = 1 << 20


def read(spec: str, split: str, count: Count | None = None) -> Iterator[Row]:
    """All rows of a spec in order; `count` is told the bytes read of the files.

    Raises:
        UserError: nothing there, or a file as a whole is missing, empty, truncated, corrupt or of unknown format.
    """
    return open_source(spec, split).rows(count)


def open_source(spec: str, split: str, config: str | None = None) -> Source:
    """What a spec stands for; `split` matters to `datasets` folders and hub ids only, `config` to hub ids."""
    spec = os.path.expanduser(resolve(spec))
    path = Path(spec)
    if path.is_dir():
        return hub.DatasetSource(spec, split) if hub.is_saved_dataset(path) else FileSource(_in_directory(path))
    if path.exists():
        _reader(path)
        return FileSource([path])
    if glob.has_magic(spec):
        return FileSource(_in_glob(spec))
    if _may_be_hub_id(spec):
        return hub.DatasetSource(spec, split, config)
    raise UserError("there is no such file or directory", spec, _nearby(path))


class FileSource:
    """Data files in reading order."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.total_bytes = sum(path.stat().st_size for path in paths)

    @property
    def identity(self) -> list:
        """Changes whenever a file does: path, size, time of change and a hash of its content or its two ends."""
        return [_file_identity(path) for path in self.paths]

    def rows(self, count: Count | None = None) -> Iterator[Row]:
        for path in self.paths:
            empty = True
            for row in _reader(path)(path, count):
                empty = False
                yield row
            if empty:
                raise UserError("the file holds no record", str(path),
                                f"It has {path.stat().st_size} bytes: remove it, or fill it.")


Source = Union[FileSource, hub.DatasetSource]


def suffix(path: Path) -> str | None:
    """The known format suffix of a file name, e.g. `.jsonl.zst`."""
    name = path.name.lower()
    return next((known for known in sorted(READERS, key=len, reverse=True) if name.endswith(known)), None)


def get_field(record: dict, field: str) -> Any:
    """`record[field]`, or with dots `record["a"]["b"]`; MISSING when it is not there.

    A key that holds the dots itself wins: CSV headers such as `meta.pile_set_name` work.
    """
    if field in record:
        return record[field]
    value: Any = record
    for key in field.split("."):
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def field_error(record: dict, field: str, where: str, option_key: str) -> UserError:
    """The field is missing: names those that are there, and the override that probably mends it."""
    fields = _field_names(record)
    present = ", ".join(f"'{name}'" for name in fields[:12]) or "no field at all"
    texts = [name for name in fields if isinstance(get_field(record, name), str)]
    best = max(texts or fields, key=lambda name: _plausible(name, field, record), default=None)
    remedy = f"Try {option_key}={best}." if best else f"Set {option_key} to the field that holds it."
    return UserError(f"field '{field}' is missing; this record has {present}.", where, remedy)


def _field_names(record: dict, prefix: str = "") -> list[str]:
    """Names with dots down to two levels: what a user can type."""
    names = []
    for key, value in record.items():
        if isinstance(value, dict) and not prefix:
            names += _field_names(value, f"{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


# What data sets call the same thing; a shared group makes a field plausible.
_KIN = [{"text", "content", "body", "document", "article", "sentence", "raw_content", "headline", "review"},
        {"completion", "response", "output", "answer", "target", "chosen", "task_output"},
        {"prompt", "instruction", "input", "question", "query", "task_prompt"},
        {"label", "labels", "class", "category", "target", "sentiment", "is_sarcastic"}]


def _plausible(name: str, wanted: str, record: dict) -> tuple[bool, float, int]:
    last, goal = name.rsplit(".")[-1].lower(), wanted.rsplit(".")[-1].lower()
    kin = any(last in group and goal in group for group in _KIN)
    value = get_field(record, name)
    likeness = SequenceMatcher(None, last, goal).ratio()
    return kin, likeness if likeness > 0.6 else 0.0, len(value) if isinstance(value, str) else 0


def _reader(path: Path) -> Reader:
    known = suffix(path)
    if known is None:
        raise UserError(f"unknown format '{''.join(path.suffixes[-2:]) or 'no suffix'}'", str(path),
                        f"Known are {' '.join(READERS)}.")
    return READERS[known]


def _in_directory(path: Path) -> list[Path]:
    visible = list(_entries(path))
    files = sorted(p for p in visible if p.is_file() and suffix(p) and not NO_DATA.fullmatch(p.name))
    if not files:
        raise UserError(f"no data file in this directory or below ({len(visible)} other entries)", str(path),
                        f"Known formats are {' '.join(READERS)}.")
    return files


def _entries(folder: Path) -> Iterator[Path]:
    """Visible files in a directory and below it, linked directories included, each of them once.

    Raises:
        UserError: a `datasets` folder lies in it.
    """
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if hub.is_saved_dataset(Path(root)):
            raise UserError("a `datasets` folder lies in this directory", root, f"Name it itself: data.train={root}")
        yield from (Path(root) / name for name in files if not name.startswith("."))


def _in_glob(spec: str) -> list[Path]:
    files = sorted(Path(p) for p in glob.glob(spec, recursive=True) if Path(p).is_file())
    if not files:
        raise UserError("no file matches this pattern", spec, "Quote it against the shell: 'data.train=corpus/*.jsonl'")
    for path in files:
        _reader(path)
    return files


def _may_be_hub_id(spec: str) -> bool:
    """`name` or `org/name`; where a folder `org` is here, a file in it was meant."""
    path = Path(spec)
    return suffix(path) is None and hub.looks_like_hub_id(spec) and ("/" not in spec or not path.parent.is_dir())


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The directory {folder} does not exist either."
    names = sorted(p.name for p in folder.iterdir() if suffix(p))
    close = max(names, key=lambda name: SequenceMatcher(None, name, path.name).ratio(), default=None)
    return f"Nearest in {folder}: {close}" if close else f"{folder} holds no data file."


def _file_identity(path: Path) -> list:
    try:
        status = path.stat()
        return [str(path.absolute()), status.st_size, status.st_mtime_ns, _sample_hash(path, status.st_size)]
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from None


def _sample_hash(path: Path, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if size <= FULL_HASH_BYTES:
            while piece := file.read(SAMPLE_BYTES):
                digest.update(piece)
        else:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(-SAMPLE_BYTES, os.SEEK_END)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
