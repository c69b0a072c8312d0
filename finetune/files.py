"""Files on disk: atomic writes that survive a power failure, strict JSON, git-lfs pointers."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

from finetune.errors import UserError, gib

POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/")
POINTER_BYTES = 1024
"""Pointers are smaller, by their specification (git-lfs, docs/spec.md)."""


def fsync(path: Path) -> None:
    """Block until the file, or the directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Replace a file so that a reader, or a power failure, sees the old content or the new one.

    Its folder is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write one indented JSON value atomically, as `dumps` renders it."""
    return write_atomic(path, dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; {} if the file is missing, torn or holds something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_settings(file: Path) -> dict[str, Any]:
    """Return the object of one of a checkpoint's JSON files, such as its config.json.

    Raises:
        UserError: the file is missing, a git-lfs pointer, or no JSON object.
    """
    refuse_pointer(file)
    try:
        values = read_json(file)
        if not isinstance(values, dict):
            raise ValueError(f"{type(values).__name__} in place of an object")
    except FileNotFoundError:
        raise UserError(
            f"there is no {file.name}", str(file.parent), "A checkpoint directory needs one."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", str(file), "Download the file again.") from None
    return values


def dumps(value: Any, indent: int | None = None) -> str:
    """Render strict JSON: NaN and infinities become null, tensors and numpy scalars numbers."""
    return json.dumps(_strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _strict(value.item())
    return str(value)


def refuse_pointer(path: Path) -> None:
    """Check that a file is not the text of three lines that git writes where git-lfs did not fetch the content.

    Raises:
        UserError: it is such a pointer. A file that is missing or cannot be read is left to whoever opens it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return
    if len(head) == POINTER_BYTES or not POINTER.match(head):
        return
    size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
    missing = f"; its {gib(int(size[1]))} are still on the server" if size else ""
    folder = path.absolute().parent
    remedy = f"git lfs install && git -C {shlex.quote(str(folder))} lfs pull"
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        remedy = (
            "Download the file itself: this copy has no git repository. Where it has one, fetch it "
            "with:\n"
            "    git lfs install && git lfs pull"
        )
    raise UserError("this is a git-lfs pointer, not the file itself" + missing, str(path), remedy)
