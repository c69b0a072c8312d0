"""Sharded safetensors written tensor by tensor: the writer holds one tensor, never a shard.

names, shapes and precision -> which tensor goes to which file -> the files, one after another -> index.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from finetune.checkpointing.format import Shapes, TensorFile
from finetune.files import write_json


class ShardWriter:
    """model.safetensors, or model-00001-of-0000N.safetensors and their index.

    Args:
        shapes: every tensor that will come, in order.
        shard_bytes: largest file; a tensor that is larger gets a file of its own.
    """

    def __init__(self, folder: Path, shapes: Shapes, dtype: torch.dtype, shard_bytes: int):
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self.shards: list[list[str]] = [[]]
        size = 0
        for name, shape in shapes.items():
            needed = math.prod(shape) * dtype.itemsize
            if self.shards[-1] and size + needed > shard_bytes:
                self.shards.append([])
                size = 0
            self.shards[-1].append(name)
            size += needed
        count = len(self.shards)
        self._names = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            for i in range(count)
        ]
        self._waiting = deque(zip(self._names, self.shards, strict=True))
        self._file: TensorFile | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, rounded to the writer's precision."""
        if self._waiting and name == self._waiting[0][1][0]:
            if self._file is not None:
                self._file.close()
            file, names = self._waiting.popleft()
            shapes = {key: self.shapes[key] for key in names}
            self._file = TensorFile(self.folder / file, shapes, self.dtype)
        assert self._file is not None, f"{name} comes out of order"
        self._file.add(name, tensor)

    def close(self) -> None:
        """Finish the last file and write the index."""
        assert not self._waiting, f"{len(self._waiting)} files were never begun"
        if self._file is not None:
            self._file.close()
        if len(self.shards) > 1:
            total = sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize
            files = zip(self._names, self.shards, strict=True)
            weight_map = {name: file for file, names in files for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, the hash that the hub shows."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
