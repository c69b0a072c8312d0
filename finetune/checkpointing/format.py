"""The files of a checkpoint: write them in one pass with their hash, verify them, find them again.

    checkpoints/step-00000010/
      manifest.json                     every file with size and hash
      state.json                        step, tokens, best metric, description of the run
      evaluated.json                    changes to the state by an evaluation done after the save
      optim-00000-of-00002.safetensors  fp32 master and moments (exp_avg, ...) of the ranges rank 0 owned

Knows no engine and no ranks. Nothing is pickled, so reading a checkpoint cannot execute code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.checkpointing import faults
from finetune.errors import UserError
from finetune.files import fsync, read_json, read_object, write_atomic

MANIFEST, STATE, EVALUATED = "manifest.json", "state.json", "evaluated.json"
STEP_DIR = re.compile(r"^step-(\d{8})$")
FORMAT = 1
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of precisions in a safetensors header."""
CHUNK = 1 << 24
"""Elements that are converted and brought to the host at once."""
WRITE_BUFFER = 1 << 20
VERIFY_THREADS = 4
MAPPED_BYTES = 1 << 26
"""Bytes read from mapped files before they are mapped anew."""

Entry = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass
class Pieces:
    """Flat fp32 tensors for one file, with sizes known in advance and one tensor held at a time."""

    sizes: dict[str, int]
    """Name -> elements, in the order of the file."""
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    """Gives (name, tensor) in the same order; called anew for each pass."""

    @classmethod
    def of(cls, pairs: list[tuple[str, Tensor]]) -> Pieces:
        """Build pieces from tensors that are in memory already."""
        return cls({name: tensor.numel() for name, tensor in pairs}, lambda: pairs)

    def copied(self) -> Pieces:
        """Return a copy on the host that is independent of the original tensors."""
        return Pieces.of([(name, tensor.to("cpu", copy=True)) for name, tensor in self.tensors()])

    @property
    def bytes(self) -> int:
        return 4 * sum(self.sizes.values())


# ---------------------------------------------------------------------- writing


class TensorFile:
    """A safetensors file that is written tensor by tensor, and hashed as it is written.

    The library's own `save_file` wants all tensors in memory and copies each, and a hash would read
    the file again. The format is eight bytes with the header's length, the header as JSON, then the
    raw little-endian values (https://huggingface.co/docs/safetensors).

    Args:
        shapes: every tensor that will come, in order.
        digest: an object of hashlib; None: no hash is needed.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(self, path: Path, shapes: Shapes, dtype: torch.dtype, digest: Any = None):
        self.dtype, self.size, self.digest = dtype, 0, digest
        self._waiting = deque(shapes.items())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            offsets = [begin, end]
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
        self._file = path.open("wb", buffering=WRITE_BUFFER)
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, rounded to the precision of the file."""
        assert self._waiting, f"{name} was not announced"
        expected = self._waiting.popleft()
        assert (name, tuple(tensor.shape)) == expected, f"{name} {tensor.shape} is not {expected}"
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK].to("cpu", self.dtype).contiguous()
            self._write(memoryview(part.view(torch.uint8).numpy()))

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_) -> None:
        if failure is None:
            self.close()
        else:  # a file that stays open would keep its space on a full disk
            with suppress(OSError):
                self._file.close()

    def close(self) -> None:
        """Flush and close the complete file."""
        assert not self._waiting, f"{len(self._waiting)} tensors are missing: {self._waiting[0]}"
        self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.size += len(content)
        if self.digest is not None:
            self.digest.update(content)


def write_tensors(path: Path, pieces: Pieces) -> Entry:
    """Write fp32 tensors as one safetensors file, synced to disk, and return its size and hash.

    Raises:
        OSError: the disk is full or not writable.
    """
    shapes = {name: (numel,) for name, numel in pieces.sizes.items()}
    with TensorFile(path, shapes, torch.float32, _digest()) as file:
        faults.point("save.tensor")
        for name, tensor in pieces.tensors():
            file.add(name, tensor)
            faults.point("save.tensor")
    faults.point("save.fsync")
    fsync(path)
    return {"size": file.size, "hash": file.digest.hexdigest()}


def entry_of(path: Path) -> Entry:
    """Return size and hash of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "hash": hashlib.file_digest(file, _digest).hexdigest()}


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def write_manifest(folder: Path, step: int, files: dict[str, Entry]) -> None:
    """Write the last file of a checkpoint, with hashes of the other files and of itself."""
    manifest = {"format": FORMAT, "step": step, "files": files, "hash": _own_hash(step, files)}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def _own_hash(step: int, files: dict[str, Entry]) -> str:
    digest = _digest()
    digest.update(json.dumps([FORMAT, step, files], sort_keys=True).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------- finding


def step_folders(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_DIR.match(path.name) and path.is_dir())


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the finished checkpoint of `step` in run_dir/checkpoints."""
    return folder / f"step-{step:08d}"


def verify(folder: Path) -> str | None:
    """Return why a checkpoint is invalid, naming the file; None if every byte is as written."""
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
        step, files = manifest["step"], manifest["files"]
        sound = manifest.get("hash") == _own_hash(step, files)
    except FileNotFoundError:
        return f"{file}: missing"
    except OSError as error:
        return f"{file}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{file}: not readable"
    if manifest.get("format") != FORMAT:
        return f"{file}: format {manifest.get('format')}, this version reads {FORMAT}"
    if not sound or STATE not in files or step_folder(folder.parent, step) != folder:
        return f"{file}: its content is not what was written"
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        reasons = list(pool.map(lambda item: _verify_file(folder, *item), files.items()))
    return next((reason for reason in reasons if reason), None)


def _verify_file(folder: Path, name: str, entry: Entry) -> str | None:
    path = folder / name
    if Path(name).name != name or name == ".." or path.is_symlink():
        return f"{folder / MANIFEST}: names '{name}', outside its directory"
    try:
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry["size"]:
            return f"{path}: {path.stat().st_size} bytes, {entry['size']} were written"
        if entry_of(path)["hash"] != entry["hash"]:
            return f"{path}: its bytes are not those that were written"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def newest_valid(folder: Path, warn) -> Path | None:
    """Return the newest checkpoint that verifies; `warn(text)` names each one that does not."""
    for path in reversed(step_folders(folder)):
        reason = verify(path)
        if reason is None:
            return path
        warn(f"skipping a damaged checkpoint: {reason}")
    return None


def read_state(folder: Path) -> dict:
    """Return state.json of a checkpoint, updated by an evaluation that was done after the save."""
    saved = read_json(folder / STATE)
    # Absent, if the evaluation is still to be done or there was none.
    return {**saved, "state": saved["state"] | read_object(folder / EVALUATED)}


def find_resume(resume: str, run_dir: Path, warn) -> Path | None:
    """Return the checkpoint to continue from, or None for a fresh start.

    `resume` may name one of this run's own checkpoints: then the result is that one, or the newest
    that stems from it. Another run's directory counts until this run has a checkpoint of its own,
    so the same command continues an interrupted run.

    Raises:
        UserError: resuming was asked for (a directory), or this run has only damaged checkpoints.
    """
    if resume == "never":
        return None
    own = run_dir / "checkpoints"
    named = None if resume == "auto" else Path(resume).expanduser().absolute()
    newest = newest_valid(own, warn)
    if named is not None and named.parent == own.absolute():
        stems = newest is not None and read_state(newest).get("origin") == named.name
        return newest if stems else _named_checkpoint(named, warn)
    if newest is not None:
        return newest
    if step_folders(own):
        raise UserError(
            "none of the checkpoints here is valid",
            str(own),
            "See the reasons above. Restore one from a backup, or start anew with resume=never.",
        )
    return None if named is None else _named_checkpoint(named, warn)


def _named_checkpoint(path: Path, warn) -> Path:
    if STEP_DIR.match(path.name) and path.is_dir():
        reason = verify(path)
        if reason:
            raise UserError(
                f"the checkpoint is damaged: {reason}",
                "resume",
                "Name another step, or its run directory.",
            )
        return path
    newest = newest_valid(path / "checkpoints", warn) if path.is_dir() else None
    if newest is None:
        raise UserError(
            f"there is no valid checkpoint in {path}",
            "resume",
            f"The run kept none; its export is {path / 'export'}."
            if (path / "export").is_dir()
            else "Give a run directory or one of its checkpoints/step-N, or resume=never.",
        )
    return newest


def folder_bytes(folder: Path) -> int:
    """Return the total size of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


# ---------------------------------------------------------------------- reading


class StateReader:
    """Master weights and moments of a checkpoint by element range, whichever ranks wrote them.

    Pages that were read from a mapped file stay resident for as long as it is mapped, so the files
    are mapped anew from time to time.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._map()

    def _map(self) -> None:
        self._read_bytes = 0
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in sorted(self.folder.glob("optim-*.safetensors")):
            handle = safe_open(str(file), framework="pt")
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, start, kind = key.rsplit("|", 2)
                size = handle.get_slice(key).get_shape()[0]
                self._pieces[name, kind].append((int(start), int(start) + size, handle, key))

    def names(self) -> list[str]:
        return sorted({name for name, _ in self._pieces})

    def sizes(self, kind: str) -> dict[str, int]:
        """Return the elements of every tensor of one kind."""
        return {
            name: max(end for _, end, *_ in pieces)
            for (name, has), pieces in sorted(self._pieces.items())
            if has == kind
        }

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of one tensor, flat and in fp32.

        Args:
            kind: master, or one of the optimizer's moments, such as exp_avg.

        Raises:
            UserError: the checkpoint has no such parameter, or not all of the range.
        """
        if self._read_bytes > MAPPED_BYTES:
            self._map()
        self._read_bytes += 4 * numel
        values, covered = torch.empty(numel, dtype=torch.float32), 0
        for low, high, handle, key in self._pieces.get((name, kind), ()):
            begin, end = max(low, start), min(high, start + numel)
            if begin < end:
                part = handle.get_slice(key)[begin - low : end - low]
                values[begin - start : end - start] = part
                covered += end - begin
        if covered != numel:
            raise UserError(
                f"the checkpoint holds {covered} of the {numel} elements of {name}",
                str(self.folder),
                "Was it saved with another adapter or model? Start anew with resume=never.",
            )
        return values
