"""The files of a checkpoint: write them in one pass with their hash, verify them, find them again.

    checkpoints/step-00000010/
      manifest.json                     every file with size and hash
      state.json                        step, tokens, best metric, description of the run
      evaluated.json                    changes to the state by an evaluation done after the save
      optim-00000-of-00002.safetensors  fp32 master, exp_avg, exp_avg_sq of the ranges rank 0 owned

Knows no engine and no ranks. Nothing is pickled, so reading a checkpoint cannot execute code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.checkpointing import faults
from finetune.errors import UserError
from finetune.files import read_json, write_atomic

MANIFEST, STATE, EVALUATED = "manifest.json", "state.json", "evaluated.json"
STEP_DIR = re.compile(r"^step-(\d{8})$")
FORMAT = 1
HASH_CHUNK = 1 << 24
WRITE_BUFFER = 1 << 20
VERIFY_THREADS = 4

Entry = dict[str, Any]


class Pieces:
    """Flat fp32 tensors for one file, with sizes known in advance and one tensor held at a time.

    Args:
        sizes: name -> elements, in the order of the file.
        tensors: gives (name, tensor) in the same order; called anew for each pass.
    """

    def __init__(self, sizes: dict[str, int], tensors: Callable[[], Iterable[tuple[str, Tensor]]]):
        self.sizes, self.tensors = sizes, tensors

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


def file_hash(path: Path) -> str:
    """Return the blake2b-128 hash of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as f:
        while chunk := f.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def entry_of(path: Path) -> Entry:
    """Return size and hash of a small file."""
    return {"size": path.stat().st_size, "hash": file_hash(path)}


def write_tensors(path: Path, pieces: Pieces) -> Entry:
    """Write fp32 tensors as one safetensors file, synced to disk, and return its size and hash.

    This takes one pass, while safetensors' own writer copies every tensor and a separate hash would
    read the file again. The format is eight bytes with the header's length, the header as JSON,
    then the tensors one after another.

    Raises:
        OSError: the disk is full or not writable.
    """
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("wb", buffering=WRITE_BUFFER) as file:
        for chunk in _safetensors(pieces):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            faults.point("save.tensor")
        file.flush()
        faults.point("save.fsync")
        os.fsync(file.fileno())
    return {"size": size, "hash": digest.hexdigest()}


def _safetensors(pieces: Pieces):
    header, position = {}, 0
    for name, numel in pieces.sizes.items():
        header[name] = {
            "dtype": "F32",
            "shape": [numel],
            "data_offsets": [position, position + 4 * numel],
        }
        position += 4 * numel
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for (name, tensor), (wanted, numel) in zip(pieces.tensors(), pieces.sizes.items(), strict=True):
        assert (name, tensor.numel(), tensor.dtype) == (wanted, numel, torch.float32), name
        if numel:
            yield tensor.detach().to("cpu").contiguous().numpy().data.cast("B")


def write_manifest(folder: Path, step: int, files: dict[str, Entry]) -> None:
    """Write the last file of a checkpoint, with hashes of the other files and of itself."""
    manifest = {"format": FORMAT, "step": step, "files": files, "hash": _own_hash(step, files)}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def _own_hash(step: int, files: dict[str, Entry]) -> str:
    text = json.dumps([FORMAT, step, files], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
        if file_hash(path) != entry["hash"]:
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
    try:
        marks = read_json(folder / EVALUATED)
    except (OSError, ValueError):  # absent: the evaluation is still to be done, or there was none
        return saved
    return {**saved, "state": saved["state"] | marks}


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
    found = newest_valid(own, warn)
    if named is not None and named.parent == own.absolute():
        stems = found is not None and read_state(found).get("origin") == named.name
        return found if stems else _named_checkpoint(named, warn)
    if found is not None:
        return found
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
    found = newest_valid(path / "checkpoints", warn) if path.is_dir() else None
    if found is None:
        raise UserError(
            f"there is no valid checkpoint in {path}",
            "resume",
            "Give a run directory or one of its checkpoints/step-N, or resume=never.",
        )
    return found


def folder_bytes(folder: Path) -> int:
    """Return the total size of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk that holds `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---------------------------------------------------------------------- reading


class Saved:
    """Element ranges of a checkpoint, whichever ranks wrote them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in sorted(folder.glob("optim-*.safetensors")):
            handle = safe_open(str(file), framework="pt")
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, start, kind = key.rsplit("|", 2)
                size = handle.get_slice(key).get_shape()[0]
                self.pieces[name, kind].append((int(start), int(start) + size, handle, key))

    def names(self) -> list[str]:
        return sorted({name for name, _ in self.pieces})

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) as fp32.

        Raises:
            UserError: the checkpoint has no such parameter, or not all of the range.
        """
        out = torch.empty(numel, dtype=torch.float32)
        covered = 0
        for low, high, handle, key in self.pieces.get((name, kind), ()):
            a, b = max(low, start), min(high, start + numel)
            if a < b:
                out[a - start : b - start] = handle.get_slice(key)[a - low : b - low]
                covered += b - a
        if covered != numel:
            raise UserError(
                f"the checkpoint holds {covered} of the {numel} elements of {name}",
                str(self.folder),
                "Was it saved with another adapter or model? Start anew with resume=never.",
            )
        return out


def saved_masters(folder: Path) -> Saved:
    """Open the trained fp32 weights of a checkpoint, to export without an engine."""
    return Saved(folder)
