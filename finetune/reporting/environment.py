"""Versions and machine of a run, for the report and for reproducing the run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "hydra-core",
    "safetensors",
    "numpy",
)


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """Return versions and machine as plain values."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "world_size": world_size,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    else:
        found |= {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    return found
