"""Checks of the machine: processors, memory and its limits, disk, ulimits, the port, the Hugging Face cache."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

from finetune.doctor.check import Check, green, red, yellow
from finetune.errors import gib

GIB = 2**30
PORT = 29500
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processors() -> Check:
    quota = _cpu_quota()
    if quota is not None and quota < cores():
        return yellow("processors", f"{cores()} cores, but this container may use only {quota:.1f}",
                      f"Set train.threads={max(1, int(quota))} so that threads do not wait for each other.")
    return green("processors", f"{cores()} cores")


def memory() -> Check:
    import psutil

    found = psutil.virtual_memory()
    limit = memory_limit()
    text = f"{gib(found.available)} free of {gib(found.total)}"
    free = found.available
    if limit is not None and limit < found.total:
        text, free = f"{text}, this container is limited to {gib(limit)}", min(free, limit)
    if free < GIB:
        return red("memory", text, "Close other programs, or raise the container's memory limit.")
    if free < 4 * GIB:
        return yellow("memory", f"{text}: enough for the tiny model only", "launch/plan.py says what a recipe needs.")
    return green("memory", text)


def disk() -> list[Check]:
    return [_free("disk", Path.cwd(), 2 * GIB, 20 * GIB, "Checkpoints go to run_dir: point it at a larger disk."),
            _free("disk of caches", _cache_root(), GIB, 10 * GIB, "Point HF_HOME and XDG_CACHE_HOME at a larger disk."),
            _free("shared memory", Path("/dev/shm"), 64 * 2**20, GIB, "Start the container with --shm-size=8g.")]


def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        limit = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
        return yellow("open files", f"at most {soft}: many ranks and data shards need more", f"ulimit -n {limit}")
    return green("open files", f"at most {_limit(soft)}")


def locked_memory() -> Check:
    """Offload and NCCL over InfiniBand pin host memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft not in (-1, resource.RLIM_INFINITY) and soft < 64 * GIB and Path("/dev/infiniband").exists():
        return yellow("locked memory", f"at most {gib(soft)}: InfiniBand needs more", "ulimit -l unlimited")
    return green("locked memory", "unlimited" if soft in (-1, resource.RLIM_INFINITY) else f"at most {gib(soft)}")


def master_port() -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", PORT))
        except OSError:
            return yellow("master port", f"{PORT} is in use, perhaps by another run",
                          f"deepspeed --master_port {PORT + 1} launch/train.py ...")
    return green("master port", f"{PORT} is free")


def hub_cache() -> Check:
    folder = _hub_folder()
    offline = [name for name in OFFLINE_FLAGS if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")]
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    text = f"{models} models in {folder}"
    existing = _existing(folder)
    if not os.access(existing, os.W_OK):
        return yellow("hub cache", f"{existing} is not writable", "Set HF_HOME to a folder of yours.")
    if offline:
        return yellow("hub cache", f"{text}; offline by {', '.join(offline)}: hub ids work only if cached",
                      f"unset {' '.join(offline)}, or give local paths")
    return green("hub cache", text)


def memory_limit() -> int | None:
    """The tightest limit on memory of this process's cgroups, v2 or v1, in bytes; None without one."""
    found = []
    for path in _cgroup_files("memory", "memory.max", "memory.limit_in_bytes"):
        text = _read(path)
        if text.isdigit() and int(text) < 2**60:
            found.append(int(text))
    return min(found, default=None)


def _cpu_quota() -> float | None:
    """Cores' worth of time that this process's cgroups allow; None without a limit."""
    found = []
    for path in _cgroup_files("cpu", "cpu.max", "cpu.cfs_quota_us"):
        words = _read(path).split()
        period = words[1] if len(words) > 1 else _read(path.with_name("cpu.cfs_period_us"))
        if words and words[0].isdigit() and period.isdigit() and int(period):
            found.append(int(words[0]) / int(period))
    return min(found, default=None)


def _cgroup_files(controller: str, v2: str, v1: str) -> list[Path]:
    """The limit files of every level above this process that exists here."""
    root, found = Path("/sys/fs/cgroup"), []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, names, place = line.split(":", 2)
        if number == "0":
            base, name = root, v2
        elif controller in names.split(","):
            base, name = root / controller, v1
        else:
            continue
        inside = base / place.lstrip("/")
        found += [level / name for level in (inside, *inside.parents) if level == base or base in level.parents]
        # In a container the place is the host's, and the own limits are at the root.
        found.append(base / name)
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _free(name: str, folder: Path, least: int, wanted: int, remedy: str) -> Check:
    existing = _existing(folder)
    free = shutil.disk_usage(existing).free
    text = f"{gib(free)} free at {existing}"
    if free < least:
        return red(name, text, remedy)
    return yellow(name, text, remedy) if free < wanted else green(name, text)


def _existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _hub_folder() -> Path:
    home = os.environ.get("HF_HOME") or _cache_root() / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
