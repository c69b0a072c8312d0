"""GPUs and their memory, host memory and free disk: measured here, or given for other hardware.

The one place that asks a machine what it has and what a process uses: NVML (pynvml) for GPUs,
psutil for the host, and the kernel's cgroup files, which psutil does not know, for the limits of a
container. Needs neither torch nor a CUDA context.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import psutil
import pynvml

from finetune.errors import GIB, UserError, gib, plural

if TYPE_CHECKING:  # the doctor measures where Hydra may be missing
    from finetune.config import MachineConfig

UNKNOWN_DISK = 1 << 60
"""For hardware that is not here, where machine.disk_gib is not given: no limit."""


@dataclass(frozen=True)
class Machine:
    gpus: int
    """GPUs over all nodes; 0: training on the CPU."""
    gpus_per_node: int
    """GPUs that share one host."""
    gpu_bytes: int
    """Memory of one GPU."""
    host_bytes: int
    """Memory of one node's host that training may take."""
    disk_bytes: int
    """Free space where runs are written."""
    nvme_bytes: Optional[int] = None
    """Free space of zero.nvme_path; None: not given."""
    name: str = ""

    @property
    def nodes(self) -> int:
        return ceil(self.gpus / self.gpus_per_node) if self.gpus else 1


def measure_machine(
    config: MachineConfig,
    world_size: Optional[int] = None,
    run_dir: str = ".",
    nvme_path: Optional[str] = None,
) -> Machine:
    """Return the machine that `config` describes, measuring here what it leaves null.

    Args:
        world_size: ranks of a launched run; with GPUs, the number of GPUs used.
        run_dir: folder in which runs are written; its disk is measured.

    Raises:
        UserError: GPUs are requested whose memory is neither given nor measurable.
    """
    for key in ("gpus", "gpus_per_node", "gpu_gib", "host_gib", "disk_gib"):
        value = getattr(config, key)
        if value is not None and value < 0:
            raise UserError(
                f"machine.{key} = {value} must not be negative",
                remedy=f"Leave machine.{key} out to measure it.",
            )

    # GPUs: one per rank. A launched run may span several nodes like this one.
    all_given = config.gpus is not None and config.gpu_gib is not None
    free = [] if all_given else gpu_free_bytes()
    gpus = config.gpus
    if gpus is None:
        gpus = (world_size or len(free)) if free else 0
    gpu_bytes = _bytes(config.gpu_gib, min(free[:gpus], default=0)) if gpus else 0
    if gpus and not gpu_bytes:
        raise UserError(
            "there is no GPU here to measure",
            "machine.gpu_gib",
            "Try machine.gpu_gib=80 or machine=a100_80.",
        )

    # Disks: those of this machine do not limit hardware that is elsewhere.
    elsewhere = all_given and not world_size
    disk = _bytes(config.disk_gib, UNKNOWN_DISK if elsewhere else disk_free_bytes(run_dir))
    nvme = None
    if nvme_path:
        nvme = disk if elsewhere else disk_free_bytes(nvme_path)

    per_node = max(1, min(gpus, config.gpus_per_node or len(free) or 8))
    host = _bytes(config.host_gib, host_free_bytes())
    memory = f"{gib(host, '.0f')} of host memory"
    cards = f"{plural(gpus, 'GPU')} of {gib(gpu_bytes, '.0f')}" if gpus else "CPU"
    name = f"{cards}, {memory}"
    machine = Machine(gpus, per_node, gpu_bytes, host, disk, nvme, name)
    if machine.nodes == 1:
        return machine
    return replace(machine, name=f"{cards} on {machine.nodes} nodes, {memory} each")


def _bytes(given: Optional[float], measured: int) -> int:
    """Return the memory given in GiB, or what was measured."""
    return measured if given is None else int(given * GIB)


# ---------------------------------------------------------------------- GPUs


def gpu_free_bytes() -> list[int]:
    """Return the free memory of every visible NVIDIA GPU; empty without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        free = []
        for index in visible_gpus(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                free.append(int(pynvml.nvmlDeviceGetMemoryInfo(handle).free))
            except pynvml.NVMLError:  # not readable, so machine.gpu_gib must be given
                free.append(0)
        return free
    finally:
        pynvml.nvmlShutdown()


def gpu_driver() -> Optional[str]:
    """Return the version of the NVIDIA driver; None without one."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(count: int) -> list[int]:
    """Return the GPU indices that CUDA_VISIBLE_DEVICES allows.

    UUIDs and MIG slices are counted, in order, as whole devices.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return list(range(count))
    chosen = [name.strip() for name in names.split(",") if name.strip() not in ("", "-1")]
    indices = [int(name) if name.isdigit() else position for position, name in enumerate(chosen)]
    return [index for index in indices if index < count]


# ---------------------------------------------------------------------- host and disk


def host_free_bytes() -> int:
    """Return the memory for new processes: the kernel's estimate, or less inside a container."""
    return min([psutil.virtual_memory().available, *_cgroup_free()])


def host_left_bytes() -> int:
    """Return available host memory including free swap.

    Swap is not memory to plan with, but the kernel kills no process before it is full.
    """
    return min([psutil.virtual_memory().available + psutil.swap_memory().free, *_cgroup_free()])


def host_total_bytes() -> int:
    """Return the memory of this node, or the container's limit if that is lower."""
    total = psutil.virtual_memory().total
    return min(total, memory_limit() or total)


def disk_free_bytes(path: Path | str) -> int:
    """Return the free space of the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(existing_folder(path)).free


def existing_folder(path: Path | str) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    place = Path(path).expanduser().absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists())


# ---------------------------------------------------------------------- limits of a container

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
MEMORY_FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Limit, usage, and the key of memory.stat for page cache that can be dropped."""
NO_LIMIT = 1 << 60
"""cgroups v1 write a number near 2^63 where there is no limit."""


def memory_limit() -> Optional[int]:
    """Return the tightest memory limit of this process's cgroups in bytes; None without one."""
    limits = [_number(folder / MEMORY_FILES[version][0]) for version, folder in _cgroups("memory")]
    return min((limit for limit in limits if limit is not None), default=None)


def cpu_limit() -> Optional[float]:
    """Return the CPU quota of this process's cgroups in cores; None without one."""
    limits = []
    for version, folder in _cgroups("cpu"):
        with suppress(OSError, ValueError):  # no such controller, or "max"
            if version == "v2":
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if int(quota) >= 0 and int(period):
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _cgroup_free() -> Iterator[int]:
    """Yield limit minus usage of every cgroup level above this process that has a limit.

    Page cache counts as usage but can be dropped, so it is added back.
    """
    for version, folder in _cgroups("memory"):
        limit_file, usage_file, cache_key = MEMORY_FILES[version]
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is None or usage is None:
            continue
        with suppress(OSError, ValueError):
            lines = (folder / "memory.stat").read_text().splitlines()
            cache = int(dict(line.split() for line in lines).get(cache_key, 0))
            yield max(0, limit - usage + cache)


def _cgroups(controller: str) -> Iterator[tuple[str, Path]]:
    """Yield (version, folder) of this process's cgroup and of every level above it.

    In a container the path is the host's, and the container's own limits are at the root.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        version, root = ("v2", CGROUPS) if number == "0" else ("v1", CGROUPS / controller)
        folder = root / path.lstrip("/")
        yield from (
            (version, level)
            for level in (folder, *folder.parents)
            if level != root and root in level.parents
        )
        yield version, root


def _number(file: Path) -> Optional[int]:
    """Return the number that a cgroup file holds; None if it is missing or sets no limit."""
    try:
        value = int(file.read_text())
    except (OSError, ValueError):
        return None
    return value if value < NO_LIMIT else None


# ---------------------------------------------------------------------- this process

# Host figures are resident pages, which is what the planner predicts. GPU figures are those of
# torch's allocator, and 0 without CUDA. All are of this rank only.
_most_seen = 0


def host_bytes() -> int:
    """Return the resident memory of this process."""
    global _most_seen
    now = psutil.Process().memory_info().rss
    _most_seen = max(_most_seen, now)
    return now


def peak_host_bytes() -> int:
    """Return the peak resident memory of this process.

    psutil does not report it. The kernel's own peak may lag behind values that it reported before.
    """
    try:
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:  # no Linux
        peak = None
    return max(_most_seen, int(peak[1]) * 1024 if peak else host_bytes())


def gpu_bytes() -> int:
    """Return the GPU memory that torch has reserved for this process, including its cache.

    Between steps, the tensors alone would not show what a step needs.
    """
    cuda = _cuda()
    return int(cuda.memory_reserved()) if cuda else 0


def peak_gpu_bytes() -> int:
    """Return the peak GPU memory that torch reserved for this process: what the GPU must have."""
    cuda = _cuda()
    return int(cuda.max_memory_reserved()) if cuda else 0


def _cuda():
    """Return torch.cuda if it is already in use, else None.

    This must not create a CUDA context or import torch.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda
