"""Ops that were compiled here, and locks that a killed compile left behind: torch would wait for them in silence, for ever.

torch.utils.cpp_extension creates <extensions>/<op>/lock, keeps it open while it compiles, and removes it. A process
that was killed meanwhile leaves the file and every later run waits. So: a lock that no living process holds open is
stale. Where that cannot be seen (another user's process, a folder shared between machines) only age decides.
Removes nothing itself. `hushed` drops what DeepSpeed prints while it builds.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

UNSEEN_SECONDS = 1800.0
"""Age at which a lock counts as stale when its holder might be out of sight; no op compiles that long."""
NETWORK_FILESYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "fuse",
    "9p",
    "virtiofs",
    "wekafs",
)
PROC = Path("/proc")


def extension_folders() -> list[Path]:
    """Where this Python's torch builds: one folder, or the candidates while torch is not imported."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(os.environ["TORCH_EXTENSIONS_DIR"])]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    torch = sys.modules.get("torch")
    if torch is None:
        return sorted(root.glob(f"{python}_*"))
    version = torch.version.hip or torch.version.cuda or ""
    kind = "rocm" if torch.version.hip else "cu" if torch.version.cuda else "cpu"
    return [root / f"{python}_{kind}{version.replace('.', '')}"]


def built_ops() -> set[str]:
    """Ops that torch compiled here earlier."""
    return {path.stem for folder in extension_folders() for path in folder.glob("*/*.so")}


def find_stale_locks(min_age_seconds: float = 2.0, op: str = "*") -> list[Path]:
    """List locks on which the next compile, or the next load of an op, would wait for ever.

    Args:
        min_age_seconds: younger locks are left alone; covers the moment between creating and looking.
        op: name of one op; by default those of all.
    """
    locks = [lock for folder in extension_folders() for lock in sorted(folder.glob(f"{op}/lock"))]
    if not locks:
        return []
    held = _open_files()
    return [lock for lock in locks if _is_stale(lock, held, min_age_seconds)]


def _is_stale(lock: Path, held: set[str], min_age_seconds: float) -> bool:
    try:
        status = lock.stat()
    except FileNotFoundError:
        return False
    if os.path.realpath(lock) in held:
        return False
    visible = PROC.is_dir() and (os.geteuid() in (0, status.st_uid)) and not _on_network(lock)
    return time.time() - status.st_mtime >= (min_age_seconds if visible else UNSEEN_SECONDS)


def _open_files() -> set[str]:
    """Paths that any process, as far as we may look, has open under the name `lock`."""
    found = set()
    for entry in PROC.glob("[0-9]*/fd/*") if PROC.is_dir() else ():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.endswith("/lock"):
            found.add(target)
    return found


def _on_network(path: Path) -> bool:
    """Whether other machines may hold files here: the file system of the longest mount point above `path`."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    real = os.path.realpath(path)
    above = [
        (len(point), kind)
        for point, kind in mounts
        if real == point or real.startswith(point.rstrip("/") + "/")
    ]
    return bool(above) and max(above)[1].startswith(NETWORK_FILESYSTEMS)


# What libraries print goes nowhere, while a live display goes on.
class _Nowhere(io.StringIO):
    """rich looks for the terminal behind whatever stands in for stdout, under this name."""

    def __init__(self):
        super().__init__()
        self.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)


@contextmanager
def hushed() -> Iterator[None]:
    """Drop what is printed inside by `print`; DeepSpeed tells from every rank what it builds."""
    with redirect_stdout(_Nowhere()):
        yield
