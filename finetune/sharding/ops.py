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
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import psutil

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
    held = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # another user's process, or one that has ended
            held.add(os.readlink(descriptor))
    mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]

    stale = []
    for lock in locks:
        real = Path(os.path.realpath(lock))
        above = [(len(point), kind) for point, kind in mounts if real.is_relative_to(point)]
        on_network = bool(above) and max(above)[1].startswith(NETWORK_FILESYSTEMS)
        with suppress(FileNotFoundError):  # its compile has just ended
            status = lock.stat()
            visible = os.geteuid() in (0, status.st_uid) and not on_network
            age = time.time() - status.st_mtime
            if str(real) not in held and age >= (min_age_seconds if visible else UNSEEN_SECONDS):
                stale.append(lock)
    return stale


@contextmanager
def hushed() -> Iterator[None]:
    """Drop the output of `print` in this context; DeepSpeed reports its builds on every rank."""
    nowhere = io.StringIO()
    # Where rich finds the real one, so that a live display goes on.
    nowhere.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # type: ignore[attr-defined]
    with redirect_stdout(nowhere):
        yield
