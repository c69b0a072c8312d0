"""Ops compiled by torch on this machine, and stale locks left by compiles that were killed.

torch.utils.cpp_extension creates <extensions>/<op>/lock, keeps it open while it compiles, and
removes it. A process that is killed meanwhile leaves the file, and every later run waits for it
silently and forever. A lock that no living process holds open is therefore stale. If that cannot be
seen (another user's process, a folder shared between machines), only age decides. This module
removes nothing itself. `hushed` drops the output of DeepSpeed's builds.
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
    """Return torch's build folder, or the candidates for it while torch is not imported."""
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
    """Return the ops that torch has compiled on this machine."""
    return {path.stem for folder in extension_folders() for path in folder.glob("*/*.so")}


def find_stale_locks(min_age_seconds: float = 2.0, op: str = "*") -> list[Path]:
    """List locks on which the next compile, or the next load of an op, would wait forever.

    Args:
        min_age_seconds: younger locks are skipped; covers the moment between creation and check.
        op: name of one op; all ops by default.
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
    """Return paths of files named `lock` that are open in any process that we may inspect."""
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
    """Tell whether other machines may hold files open here.

    Decided by the file system of the longest mount point above `path`.
    """
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


# Silence library output while the live display is active.
class _Nowhere(io.StringIO):
    """A stdout that discards its text; rich finds the real one as `rich_proxied_file`."""

    def __init__(self):
        super().__init__()
        self.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)


@contextmanager
def hushed() -> Iterator[None]:
    """Drop the output of `print` in this context; DeepSpeed reports its builds on every rank."""
    with redirect_stdout(_Nowhere()):
        yield
