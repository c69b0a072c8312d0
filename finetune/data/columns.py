"""The layout of a store on disk: one binary file per column and a meta.json.

Flow: `store` builds a folder, `Store` opens it as memory maps. Encoders declare their columns with `Column`.
Writes nothing (`write`).

A store with two examples of 4 and 2 tokens, a category and a blob:

    offsets            0 4 6                     one more than examples
    ids.bin            t t t t | t t             token column: shares the offsets
    subset.bin         0       | 1               category: names ["Wiki", "Law"] in meta.json
    answer.bin         {"text":..} | {..}        blob: answer.offsets.bin has its own offsets
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Union

import numpy as np

from finetune.errors import UserError

FORMAT = 1
"""Part of a store's fingerprint: with a new layout, old caches are built again."""
META = "meta.json"
KINDS = ("token", "scalar", "category", "blob")

Example = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """What a column holds and as which numpy type."""

    kind: str
    """token: one value per token; scalar: one number; category: one string; blob: bytes."""
    dtype: str
    """numpy's name; of a category, the type of its index; of a blob, uint8."""


class PartlyBad(UserError):
    """A record of many parts (a SQuAD article) some of which are bad: the good ones' examples, and what is wrong."""

    def __init__(self, examples: list[Example], faults: list[UserError]):
        first = faults[0]
        super().__init__(first.problem, first.where, first.remedy)
        self.examples, self.faults = examples, faults


class Encoder(Protocol):
    """Turns records into examples. `encode` is called from one thread at a time."""

    columns: dict[str, Column]
    """Always with the token column `ids`."""

    def fingerprint(self) -> str:
        """Changes with everything that changes the examples."""
        ...

    def encode(self, batch: list[tuple[str, dict]]) -> list[Union[list[Example], UserError]]:
        """Per record its examples (none: skipped in silence) or what is wrong with it, or `PartlyBad`."""
        ...


class Store:
    """A finished store: columns as read-only memory maps."""

    def __init__(self, path: Path):
        self.path = Path(path)
        meta = json.loads((self.path / META).read_text(encoding="utf-8"))
        self.columns = {name: Column(**column) for name, column in meta["columns"].items()}
        self.stats: dict[str, Any] = meta["stats"]
        self.fingerprint: str = meta["fingerprint"]
        self.spec: str = meta["spec"]
        self.offsets = open_array(self.path / "offsets.bin", "int64")
        self._names: dict[str, list[str]] = meta["names"]
        self.column = lru_cache(None)(self._column)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _column(self, name: str) -> np.ndarray:
        return open_array(self.path / f"{name}.bin", self.columns[name].dtype)

    def names(self, category: str) -> list[str]:
        """The strings of a category column, by index, in the order in which the data shows them first."""
        return self._names[category]

    def blob(self, name: str, example: int) -> bytes:
        offsets = open_array(self.path / f"{name}.offsets.bin", "int64")
        return self.column(name)[offsets[example]: offsets[example + 1]].tobytes()

    def place(self, example: int) -> str:
        """Where an example came from, as exactly as the store knows: file:line, or its number."""
        if "where" in self.columns:
            return self.blob("where", example).decode("utf-8", "replace")
        return f"{self.spec}, example {example + 1} of {len(self)}"


def open_store(path: Path) -> Store:
    """A store that was built before.

    Raises:
        UserError: the folder is not a complete store.
    """
    fault = store_fault(Path(path))
    if fault:
        raise UserError(f"not a complete token cache ({fault})", str(path), "Delete the folder; it is built again.")
    return Store(path)


def store_fault(path: Path) -> str | None:
    """Why a folder is no complete store, or None: every file must have the size that meta.json states."""
    try:
        sizes = json.loads((path / META).read_text(encoding="utf-8"))["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{META}: {error}"
    for name, expected in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else -1
        if actual != expected:
            return f"{name} is missing" if actual < 0 else f"{name} has {actual} bytes instead of {expected}"
    return None


def open_array(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")

