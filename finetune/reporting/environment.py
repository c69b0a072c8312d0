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
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "world_size": world_size,
    }
    for name in PACKAGES:
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = None
    if device.type == "cuda":
        return about | {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    cpu = platform.processor() or platform.machine()
    return about | {"cpu": cpu, "threads": torch.get_num_threads()}
