"""Arithmetic of devices: peak of common GPUs, for MFU, and CPUs that only emulate bf16.

Dense tensor-core figures from NVIDIA's data sheets; others are unknown."""

from __future__ import annotations

import torch

HALF_PRECISION_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""bf16 (V100 and T4: fp16), without sparsity, in TFLOP/s; the longest name that occurs in the device's counts."""


SLOW_BF16 = (
    "this CPU has no bf16 arithmetic: products in bf16 take about two hundred times as "
    "long as in fp32"
)


def emulates_bf16(device: torch.device) -> bool:
    """Tell whether bf16 products run in software: on a CPU without AVX-512 (or AMX), measured 0.5 against 112 GFLOP/s."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return the FLOP/s of one device in bf16 or fp16; None if unknown."""
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    entry = max((known for known in HALF_PRECISION_TFLOPS if known in name), key=len, default=None)
    return HALF_PRECISION_TFLOPS[entry] * 1e12 if entry else None
