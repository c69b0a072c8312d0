"""Readers of data specs: files, globs, directories, `datasets` folders and hub ids.

Each record is yielded as (where, record).

Flow: spec -> source (its files) -> one reader per format (`formats`, `csv_file`, `large_json`,
`hub_datasets`) -> rows in a fixed order. One pass, bounded memory. Bad rows are yielded as
UserErrors, so that the caller can count them or stop; errors that concern a whole file are raised.
Independent of the task: fields are looked up by `get_field`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Union

from finetune.assets.paths import resolve
from finetune.config import DataConfig
from finetune.data import hub_datasets
from finetune.data.compressed_files import Count, head_of
from finetune.data.csv_file import csv_rows
from finetune.data.files import (
    PARQUET,
    SUFFIXES,
    Files,
    address_error,
    find_files,
    identity,
    nearby,
    notes_on,
    shared,
    suffix,
)
from finetune.data.formats import Reader, Row, first_names, jsonl_rows, parquet_rows, txt_rows
from finetune.data.large_json import json_rows
from finetune.data.mixture import DataSource, eval_sources, train_sources
from finetune.data.utf8 import DEFAULTS, FileOptions
from finetune.errors import UserError, command, setting

FORMATS: dict[str, Reader] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".jsonlines": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".txt": txt_rows,
}
READERS: dict[str, Reader] = {
    known: FORMATS[re.sub(r"\.(gz|zst)$", "", known)] for known in SUFFIXES
}
MISSING = object()
"""Result of `get_field` for an absent field."""
READING = "files-2"
"""Part of a source's identity: when files are read in another way, old caches are built again."""


def read(
    spec: str, split: str, count: Count | None = None, options: FileOptions = DEFAULTS
) -> Iterator[Row]:
    """Yield all rows of a spec in order; `count` is called with the bytes read of the files.

    Raises:
        UserError: the spec matches nothing, or a whole file is missing, truncated, corrupt or of
            unknown format.
    """
    return open_source(spec, split, options=options).rows(count)


def open_source(
    spec: str, split: str, config: str | None = None, options: FileOptions = DEFAULTS
) -> Source:
    """Return the source that a spec refers to.

    `split` applies only to `datasets` folders and hub ids, `config` only to hub ids.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", spec):
        raise address_error(spec)
    local = os.path.expanduser(resolve(spec))
    path = Path(local)
    if hub_datasets.is_saved_dataset(path):
        return hub_datasets.DatasetSource(local, split)
    files = find_files(spec)
    if files is not None:
        return FileSource(files, options)
    if _may_be_hub_id(local):
        return hub_datasets.DatasetSource(local, split, config)
    raise UserError("there is no such file or directory", local, nearby(path))


class FileSource:
    """Data files in the order in which they are read."""

    def __init__(self, files: Files, options: FileOptions = DEFAULTS):
        self.files, self.options = files, options
        self.total_bytes = sum(path.stat().st_size for path in files.paths)

    @property
    def identity(self) -> list:
        """Return a value that changes whenever a file, or the way it is read, changes."""
        return [
            READING,
            self.options.encoding,
            self.options.quotes,
            *map(identity, self.files.paths),
        ]

    @property
    def part_bytes(self) -> list[int]:
        """Return the size of each file, whose rows `part` yields."""
        return [path.stat().st_size for path in self.files.paths]

    def part(self, index: int, count: Count | None = None) -> Iterator[Row]:
        path, empty = self.files.paths[index], True
        for row in _reader(path)(path, count, self.options):
            empty = False
            yield row
        if empty:
            yield UserError(
                "the file holds no record",
                str(path),
                f"It has {path.stat().st_size} bytes: fill it, or remove it; "
                "data.on_bad_row=skip leaves it out.",
            )

    def rows(self, count: Count | None = None) -> Iterator[Row]:
        for index in range(len(self.files.paths)):
            yield from self.part(index, count)


Source = Union[FileSource, hub_datasets.DatasetSource]


def file_options(data: DataConfig) -> FileOptions:
    return FileOptions(data.encoding, data.quotes.value)


def data_notes(data: DataConfig) -> dict[str, list[str]]:
    """Return notes for the user on the data files of a run, by "train" and "eval".

    Only files on this machine are opened.
    """
    training, evaluation = train_sources(data), eval_sources(data)
    trained: list[Files] = []
    # An evaluation may come long after the training, whose data may be gone by then.
    with suppress(UserError):
        trained = _local_files(training)
    held_out = _local_files(evaluation)
    notes = {
        "train": [note for files in trained for note in notes_on(files, training=True)],
        "eval": [note for files in held_out for note in notes_on(files, training=False)],
    }
    elsewhere = {(source.path, source.split) for source in training}
    if trained and held_out:
        notes["eval"] += shared(
            [path for files in trained for path in files.paths],
            [path for files in held_out for path in files.paths],
        )
    elif any((source.path, source.split) in elsewhere for source in evaluation):
        notes["eval"].append(
            "trained on as well: all of it; figures on these rows tell how well the model "
            "remembers them, not how well it does on new ones"
        )
    return notes


def _local_files(sources: list[DataSource]) -> list[Files]:
    """Return the files of every source that consists of plain files on this machine."""
    plain = [
        source.path
        for source in sources
        if not hub_datasets.is_saved_dataset(Path(os.path.expanduser(resolve(source.path))))
    ]
    return [files for path in plain if (files := find_files(path))]


def get_field(record: dict, field: str) -> Any:
    """Return `record[field]`, or `record["a"]["b"]` for a field "a.b"; MISSING if it is absent.

    A key that contains the dots itself takes precedence, so that CSV headers such as
    `meta.pile_set_name` work.
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
    """Return the error for a missing field, with the fields present and a likely override."""
    fields = _field_names(record)
    present = first_names(fields) or "no field at all"
    texts = [name for name in fields if isinstance(get_field(record, name), str)]
    best = max(texts or fields, key=lambda name: _plausible(name, field, record), default=None)
    remedy = f"Set {option_key} to the field that holds it."
    if best:
        *others, key = option_key.split()
        remedy = f"Try {command([*others, setting(key, best)])}."
    return UserError(f"field '{field}' is missing; this record has {present}.", where, remedy)


def _field_names(record: dict, prefix: str = "") -> list[str]:
    """Return the field names that a user can type: dotted, down to two levels."""
    names = []
    for key, value in record.items():
        if isinstance(value, dict) and not prefix:
            names += _field_names(value, f"{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


# Names that data sets use for the same thing; a field of the same group is a plausible suggestion.
_KIN = [
    {
        "text",
        "content",
        "body",
        "document",
        "article",
        "sentence",
        "raw_content",
        "headline",
        "review",
    },
    {"completion", "response", "output", "answer", "target", "chosen", "task_output"},
    {"prompt", "instruction", "input", "question", "query", "task_prompt"},
    {"label", "labels", "class", "category", "target", "sentiment", "is_sarcastic"},
]


def _plausible(name: str, wanted: str, record: dict) -> tuple[bool, float, int]:
    last, goal = name.rsplit(".")[-1].lower(), wanted.rsplit(".")[-1].lower()
    kin = any(last in group and goal in group for group in _KIN)
    value = get_field(record, name)
    likeness = SequenceMatcher(None, last, goal).ratio()
    return kin, likeness if likeness > 0.6 else 0.0, len(value) if isinstance(value, str) else 0


def _reader(path: Path) -> Reader:
    """Choose a reader by the name's suffix; parquet files are recognised under any name."""
    return parquet_rows if head_of(path).startswith(PARQUET) else READERS[suffix(path) or ""]


def _may_be_hub_id(spec: str) -> bool:
    """Tell whether `spec` has the form `name` or `org/name` and `org` is no local folder."""
    path = Path(spec)
    return (
        suffix(path) is None
        and hub_datasets.looks_like_hub_id(spec)
        and ("/" not in spec or not path.parent.is_dir())
    )
