"""Memory of this process, now and at its peak, in bytes: host from the kernel, GPU from torch's allocator.

Host figures come from /proc, so they count what the planner predicts: pages that are really resident.
GPU figures are 0 without CUDA, and torch is imported only where it already is. Sums nothing over ranks.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
_most_seen = 0


def host_bytes() -> int:
    """Resident memory of this process."""
    global _most_seen
    now = _status_bytes("VmRSS") or _rusage_bytes()
    _most_seen = max(_most_seen, now)
    return now


def peak_host_bytes() -> int:
    """The most that was ever resident in this process; the kernel's own peak may lag behind what it has said before."""
    return max(_most_seen, _status_bytes("VmHWM") or _rusage_bytes())


def gpu_bytes() -> int:
    """Memory that torch has taken of this process's GPU, its cache included: between steps the tensors alone
    would show only what rests, not what a step needs."""
    cuda = _cuda()
    return int(cuda.memory_reserved()) if cuda else 0


def peak_gpu_bytes() -> int:
    """The most that torch reserved on this process's GPU: what a smaller card would have lacked."""
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
    """torch.cuda when a program already uses it; asking must not create a CUDA context or import torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda
