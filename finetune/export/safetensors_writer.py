"""Sharded safetensors written tensor by tensor: the writer holds one tensor, never a shard.

names, shapes and precision -> which tensor goes to which file -> header, then the tensors' bytes in order -> index.
The library's own `save_file` wants a whole shard in memory, and copies it once more. The format is eight bytes of
header length, a JSON header, and the raw little-endian values (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finetune.files import write_json

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHUNK = 1 << 24
Shapes = dict[str, tuple[int, ...]]


class ShardWriter:
    """model.safetensors, or model-00001-of-0000N.safetensors and their index.

    Args:
        shapes: every tensor that will come, in order.
        shard_bytes: largest file; a tensor that is larger gets a file of its own.
    """

    def __init__(self, folder: Path, shapes: Shapes, dtype: torch.dtype, shard_bytes: int):
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self.shards = _assign(shapes, dtype.itemsize, shard_bytes)
        self._waiting = deque(shapes)
        self._file: BinaryIO | None = None
        self._shard = -1

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, rounded to the writer's precision."""
        assert self._waiting and name == self._waiting[0], f"{name} comes out of order"
        assert tuple(tensor.shape) == self.shapes[name], (
            name,
            tuple(tensor.shape),
            self.shapes[name],
        )
        self._waiting.popleft()
        if self._shard + 1 < len(self.shards) and name == self.shards[self._shard + 1][0]:
            self._next_file()
        self._write_values(tensor)

    def close(self) -> None:
        """Finish the last file and write the index."""
        assert not self._waiting, (
            f"{len(self._waiting)} tensors never came, the next is {self._waiting[0]}"
        )
        if self._file is not None:
            self._file.close()
        if len(self.shards) > 1:
            total = sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize
            weight_map = {
                name: self._name(i) for i, names in enumerate(self.shards) for name in names
            }
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)

    def _name(self, shard: int) -> str:
        count = len(self.shards)
        return (
            "model.safetensors"
            if count == 1
            else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        )

    def _next_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._shard += 1
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.shards[self._shard]:
            begin, end = end, end + math.prod(self.shapes[name]) * self.dtype.itemsize
            header[name] = {
                "dtype": CODES[self.dtype],
                "shape": list(self.shapes[name]),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
        self._file = (self.folder / self._name(self._shard)).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _write_values(self, tensor: Tensor) -> None:
        assert self._file is not None
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            piece = flat[start : start + CHUNK].to("cpu", self.dtype).contiguous()
            self._file.write(memoryview(piece.view(torch.uint8).numpy()))


def _assign(shapes: Shapes, itemsize: int, shard_bytes: int) -> list[list[str]]:
    """Names of each file, filled in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        needed = math.prod(shape) * itemsize
        if shards[-1] and size + needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, the hash that the hub shows."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
