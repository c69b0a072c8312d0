"""The layout of a store on disk: one binary file per column and a meta.json.

Flow: `cache` builds a folder with `ColumnWriter`, `Store` opens it as memory maps. Encoders declare
their columns with `Column`.

A store with two examples of 4 and 2 tokens, a category and a blob:

    offsets            0 4 6                     one more than examples
    ids.bin            t t t t | t t             token column: shares the offsets
    subset.bin         0       | 1               category: names ["Wiki", "Law"] in meta.json
    answer.bin         {"text":..} | {..}        blob: answer.offsets.bin has its own offsets
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Union

import numpy as np

from finetune.errors import UserError
from finetune.files import read_json

FORMAT = 2
"""Part of a store's fingerprint: with a new layout, old caches are built again."""
META = "meta.json"
KINDS = ("token", "scalar", "category", "blob")
IGNORE = -100
"""Label of a token that is not scored, shared by data and loss."""

Example = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """Kind and numpy type of a column."""

    kind: str
    """token: one value per token; scalar: one number; category: one string; blob: bytes."""
    dtype: str
    """numpy's name; of a category, the type of its index; of a blob, uint8."""


class PartlyBad(UserError):
    """Error of a row of many parts (a SQuAD article) some of which are bad.

    It carries the examples of the good parts and tells what is wrong with the others.
    """

    def __init__(self, examples: list[Example], faults: list[UserError]):
        first = faults[0]
        super().__init__(first.problem, first.where, first.remedy)
        self.examples, self.faults = examples, faults


class Encoder(Protocol):
    """Encoder of rows into examples. `encode` is called from one thread at a time."""

    columns: dict[str, Column]
    """Always with the token column `ids`; those of data to hold rows out of with `text` too (`fields.TEXT`)."""

    def fingerprint(self) -> str:
        """Return a string that changes with everything that changes the examples."""
        ...

    def encode(self, batch: list[tuple[str, dict]]) -> list[Union[list[Example], UserError]]:
        """Return, for each (place, record), its examples or the error that says what is wrong.

        A row without examples is left out and counted; `PartlyBad` is an error with examples.
        """
        ...


class Store:
    """A complete store: columns as read-only memory maps."""

    def __init__(self, path: Path):
        self.path = Path(path)
        meta = read_json(self.path / META)
        self.columns = {name: Column(**column) for name, column in meta["columns"].items()}
        self.stats: dict[str, Any] = meta["stats"]
        self.fingerprint: str = meta["fingerprint"]
        self.spec: str = meta["spec"]
        self.sources: list[dict[str, int]] = meta["sources"]
        """Of each source in turn: the number of its `examples`, `documents` and `tokens`."""
        self.offsets = open_array(self.path / "offsets.bin", "int64")
        self._names: dict[str, list[str]] = meta["names"]
        self.column = lru_cache(None)(self._column)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _column(self, name: str) -> np.ndarray:
        return open_array(self.path / f"{name}.bin", self.columns[name].dtype)

    def names(self, category: str) -> list[str]:
        """Return the strings of a category column by index, in order of first appearance."""
        return self._names[category]

    def blob(self, name: str, example: int) -> bytes:
        """Return the bytes of one example in a blob column."""
        offsets = open_array(self.path / f"{name}.offsets.bin", "int64")
        return self.column(name)[offsets[example] : offsets[example + 1]].tobytes()

    @property
    def bounds(self) -> list[int]:
        """The first example of each source, and the number of examples."""
        return [0, *accumulate(source["examples"] for source in self.sources)]

    def place(self, example: int) -> str:
        """Return the origin of an example: file:line if the store knows it, else its number."""
        if "where" in self.columns:
            return self.blob("where", example).decode("utf-8", "replace")
        return f"{self.spec}, example {example + 1} of {len(self)}"


def open_store(path: Path) -> Store:
    """Open a store that was built before.

    Raises:
        UserError: the folder is not a complete store.
    """
    fault = store_fault(Path(path))
    if fault:
        raise UserError(
            f"not a complete token cache ({fault})",
            str(path),
            "Delete the folder; it is built again.",
        )
    return Store(path)


def store_fault(path: Path) -> str | None:
    """Return why a folder is not a complete store, or None if it is.

    Every file must have the size that meta.json states.
    """
    try:
        sizes = read_json(path / META)["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{META}: {error}"
    for name, expected in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else -1
        if actual != expected:
            return (
                f"{name} is missing"
                if actual < 0
                else f"{name} has {actual} bytes instead of {expected}"
            )
    return None


def open_array(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")


class ColumnWriter:
    """Writer that appends examples to the files of one folder, and counts statistics on the way.

    meta.json is the caller's, who writes it last.

    Args:
        state: what `state` returned, to go on from: whatever the files hold behind it is dropped.
    """

    def __init__(self, folder: Path, columns: dict[str, Column], state: dict | None = None):
        assert columns["ids"].kind == "token" and all(c.kind in KINDS for c in columns.values())
        self.folder, self.columns = folder, columns
        self.names: dict[str, dict[str, int]] = {
            n: {} for n, c in columns.items() if c.kind == "category"
        }
        self.tokens, self.examples = 0, 0
        self.histogram = np.zeros(64, np.int64)
        self.tokens_by_name: dict[str, Counter] = {name: Counter() for name in self.names}
        self._blob_ends = dict.fromkeys((n for n, c in columns.items() if c.kind == "blob"), 0)
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        for name in ["offsets", *columns, *(f"{blob}.offsets" for blob in self._blob_ends)]:
            file = (folder / f"{name}.bin").open("r+b" if state else "wb", buffering=1 << 20)
            self._files[name] = self._open.enter_context(file)
        if state:
            for name, size in state["sizes"].items():
                self._files[name].truncate(size)
                self._files[name].seek(size)
            self.tokens, self.examples = state["tokens"], state["examples"]
            self.names = state["names"]
            self.histogram = np.array(state["histogram"], np.int64)
            self.tokens_by_name = {n: Counter(c) for n, c in state["tokens_by_name"].items()}
            self._blob_ends = state["blob_ends"]
        else:
            for name in ["offsets", *(f"{blob}.offsets" for blob in self._blob_ends)]:
                self._put(name, np.zeros(1, np.int64))

    def append(self, examples: list[Example]) -> None:
        """Write the values of some examples to the file of each column."""
        if not examples:
            return
        lengths = np.array([len(example["ids"]) for example in examples], np.int64)
        total = int(lengths.sum())
        assert lengths.min() > 0, "an encoder gave an example without tokens"
        self._put("offsets", self.tokens + np.cumsum(lengths))
        for name, column in self.columns.items():
            values = [example[name] for example in examples]
            match column.kind:
                case "token" if isinstance(values[0], np.ndarray):
                    array = np.concatenate(values).astype(column.dtype, copy=False)
                    assert len(array) == total, f"column {name} has not one value per token"
                case "token":
                    # Takes half the time of np.array(list); an id that does not fit raises OverflowError.
                    array = np.fromiter(chain.from_iterable(values), column.dtype, total)
                case "scalar":
                    array = np.array(values, column.dtype)
                case "category":
                    table, counter = self.names[name], self.tokens_by_name[name]
                    for value, length in zip(values, lengths.tolist(), strict=True):
                        table.setdefault(value, len(table))
                        counter[value] += length
                    array = np.array([table[value] for value in values], column.dtype)
                case _:
                    sizes = [len(value) for value in values]
                    ends = self._blob_ends[name] + np.cumsum(sizes, dtype=np.int64)
                    self._blob_ends[name] = int(ends[-1])
                    self._put(f"{name}.offsets", ends)
                    self._files[name].write(b"".join(values))
                    continue
            self._put(name, array)
        self.tokens += total
        self.examples += len(examples)
        self.histogram += np.bincount(np.frexp(lengths - 0.5)[1].clip(0, 63), minlength=64)

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the examples written so far.

        `lengths` counts examples of at most 1, 2, 4, 8, ... tokens (and more than the bin before).
        """
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "lengths": {str(2**k): int(n) for k, n in enumerate(self.histogram) if n},
            "tokens_by_name": {
                name: dict(counter.most_common()) for name, counter in self.tokens_by_name.items()
            },
        }

    def state(self) -> dict[str, Any]:
        """Sync all files to the disk and return what a later writer needs to go on from here."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {
            "sizes": {name: file.tell() for name, file in self._files.items()},
            "tokens": self.tokens,
            "examples": self.examples,
            "names": self.names,
            "histogram": self.histogram.tolist(),
            "tokens_by_name": self.tokens_by_name,
            "blob_ends": self._blob_ends,
        }

    def close(self) -> dict[str, int]:
        """Sync all files to the disk and return their sizes."""
        with self._open:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        return {f"{name}.bin": (self.folder / f"{name}.bin").stat().st_size for name in self._files}

    def abandon(self) -> None:
        """Close after a failure, ignoring what cannot be flushed to a full disk."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def _put(self, name: str, array: np.ndarray) -> None:
        self._files[name].write(array.data)
