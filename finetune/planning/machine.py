"""GPUs and their memory, host memory and free disk: measured here, or given for other hardware.

Also the memory that this process uses. `measure_machine` fills what `machine.*` leaves null. It
queries NVML through ctypes and the kernel through /proc and cgroup files, so that it needs neither
torch nor a CUDA context.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from finetune.config import MachineConfig
from finetune.errors import UserError

GIB = 2**30
UNKNOWN_DISK = 1 << 60
"""For hardware that is not here, where machine.disk_gib is not given: no limit."""
CGROUP_V2 = Path("/sys/fs/cgroup")
CGROUP_V1 = Path("/sys/fs/cgroup/memory")


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
        return max(1, -(-self.gpus // self.gpus_per_node)) if self.gpus else 1


def measure_machine(
    config: MachineConfig,
    world_size: Optional[int] = None,
    run_dir: str = ".",
    nvme_path: Optional[str] = None,
    cuda: bool = True,
) -> Machine:
    """Return the machine that `config` describes, measuring here what it leaves null.

    Args:
        world_size: ranks of a launched run; with GPUs, the number of GPUs used.
        run_dir: folder in which runs are written; its disk is measured.
        cuda: False if a run trains on the CPU although there are GPUs.

    Raises:
        UserError: GPUs are requested whose memory is neither given nor measurable.
    """
    for name in ("gpus", "gpus_per_node", "gpu_gib", "host_gib", "disk_gib"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(
                f"machine.{name} = {value} is less than none",
                remedy=f"Leave machine.{name} out to measure it.",
            )
    given = config.gpus is not None and config.gpu_gib is not None
    free = gpu_free_bytes() if cuda and not given else []
    measured = (
        (world_size or len(free)) if free else 0
    )  # one GPU per rank; a launched run may span nodes like this one
    gpus = config.gpus if config.gpus is not None else measured
    gpu_bytes = _bytes(config.gpu_gib, min(free[:gpus], default=0)) if gpus else 0
    if gpus and not gpu_bytes:
        raise UserError(
            "there is no GPU here to measure",
            "machine.gpu_gib",
            "Try machine.gpu_gib=80 or machine=a100_80.",
        )
    elsewhere = given and not world_size
    disk = _bytes(config.disk_gib, UNKNOWN_DISK if elsewhere else disk_free_bytes(run_dir))
    nvme = (
        UNKNOWN_DISK
        if nvme_path and elsewhere
        else disk_free_bytes(nvme_path)
        if nvme_path
        else None
    )
    per_node = max(1, min(gpus, config.gpus_per_node or len(free) or 8))
    machine = Machine(
        gpus,
        per_node,
        gpu_bytes,
        _bytes(config.host_gib, host_free_bytes()),
        disk,
        min(disk, nvme) if nvme is not None and elsewhere else nvme,
    )
    return Machine(**{**vars(machine), "name": _describe(machine)})


def _bytes(gib: Optional[float], measured: int) -> int:
    return measured if gib is None else int(gib * GIB)


def _describe(machine: Machine) -> str:
    host = f"{machine.host_bytes / GIB:.0f} GiB of host memory"
    if not machine.gpus:
        return f"CPU, {host}"
    nodes = f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    plural = "s" if machine.gpus > 1 else ""
    return f"{machine.gpus} GPU{plural} of {machine.gpu_bytes / GIB:.0f} GiB{nodes}, {host}" + (
        " each" if nodes else ""
    )


# ---------------------------------------------------------------------- GPUs


class _NvmlMemory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def gpu_free_bytes() -> list[int]:
    """Return the free memory of every visible NVIDIA GPU; empty without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        return [_device_free(nvml, index) for index in _visible(_device_count(nvml))]
    finally:
        nvml.nvmlShutdown()


def _device_count(nvml: ctypes.CDLL) -> int:
    count = ctypes.c_uint()
    return count.value if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0


def _device_free(nvml: ctypes.CDLL, index: int) -> int:
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return memory.free


def _visible(count: int) -> list[int]:
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
    return _free(_meminfo("MemAvailable"))


def host_left_bytes() -> int:
    """Return available host memory including free swap.

    Swap is not memory to plan with, but the kernel kills no process before it is full.
    """
    return _free(_meminfo("MemAvailable") + _meminfo("SwapFree", 0))


def _free(available: int) -> int:
    free = [
        available,
        _cgroup_free(CGROUP_V2, "memory.max", "memory.current", "inactive_file"),
        _cgroup_free(
            CGROUP_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        ),
    ]
    return min(value for value in free if value is not None)


def host_total_bytes() -> int:
    """Return the memory of this node, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (CGROUP_V2 / "memory.max", CGROUP_V1 / "memory.limit_in_bytes"):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):
            continue
    return total


def _meminfo(key: str, missing: Optional[int] = None) -> int:
    """Return a line of /proc/meminfo in bytes, or `missing` (by default all memory) without one."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if missing is None else missing


def _cgroup_free(root: Path, limit_file: str, usage_file: str, cache_key: str) -> Optional[int]:
    """Return limit minus usage of this container; None without a limit.

    Page cache counts as usage but can be dropped, so it is added back.
    """
    try:
        limit = int((root / limit_file).read_text())
        usage = int((root / usage_file).read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such controller, or "max"
        return None
    return max(0, limit - usage + int(stat.get(cache_key, 0)))


def disk_free_bytes(path: str) -> int:
    """Return the free space of the disk that holds `path`, which need not exist yet."""
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


# Memory of this process, now and at its peak, in bytes: host from the kernel, GPU from torch's
# allocator.
#
# Host figures come from /proc, so they count what the planner predicts: resident pages. GPU figures
# are 0 without CUDA; torch is used only if it is already imported. Figures are of this rank only.
STATUS = Path("/proc/self/status")
_most_seen = 0


def host_bytes() -> int:
    """Return the resident memory of this process."""
    global _most_seen
    now = _status_bytes("VmRSS") or _rusage_bytes()
    _most_seen = max(_most_seen, now)
    return now


def peak_host_bytes() -> int:
    """Return the peak resident memory of this process.

    The kernel's own peak may lag behind values that it reported before.
    """
    return max(_most_seen, _status_bytes("VmHWM") or _rusage_bytes())


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


def _status_bytes(key: str) -> int:
    try:
        text = STATUS.read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cuda():
    """Return torch.cuda if it is already in use, else None.

    This must not create a CUDA context or import torch.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda
