"""Files on disk: writes that survive a power failure, and pointers that git-lfs leaves in place of files."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

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
            "Download the file itself: this copy has no git repository. Where it has one, fetch it with:\n"
            "    git lfs install && git lfs pull"
        )
    raise UserError("this is a git-lfs pointer, not the file itself" + missing, str(path), remedy)
