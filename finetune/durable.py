"""Writes that survive a power failure."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Until the file, or the directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
