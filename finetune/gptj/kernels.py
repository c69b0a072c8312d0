"""The forward pass's elementwise work: rotation, residual sum, and the loss's softmax.

Each is written twice: in plain PyTorch, and as a Triton kernel for CUDA that reads and writes its
tensor once (`triton_kernels.py`). Both compute in fp32.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.planning.activations import SOFTMAX_ROWS

TINY = 1e-30
"""A probability whose logarithm is not taken: fp32 loses digits near its end, and then has 0."""


def triton_kernels(x: Tensor) -> ModuleType | None:
    """Return the Triton kernels if they run on the device of x, else None."""
    return _load() if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else None


@cache
def _load() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from finetune.gptj import triton_kernels

    return triton_kernels


def rotate_(x: Tensor, table: Tensor, heads: int, back: bool = False) -> Tensor:
    """Rotate neighbouring dimensions of every head in place, and return x.

    Args:
        x: (N, heads * head_dim).
        table: complex64 (N, 1, rotary_dim / 2), see `attention.rope_tables`.
        back: rotate by the negative angles, which is the gradient.
    """
    if (triton := triton_kernels(x)) and x.stride(1) == 1:
        triton.rotate_(x, table, heads, back)
        return x
    width = 2 * table.shape[-1]
    part = x.view(x.shape[0], heads, -1)[..., :width]
    pairs = torch.view_as_complex(part.float().unflatten(-1, (-1, 2)).contiguous())
    pairs = pairs * (table.conj() if back else table)
    part.copy_(torch.view_as_real(pairs).flatten(-2))
    return x


def add3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a + b + c for tensors of one shape; a Triton kernel rounds the sum once."""
    if triton_kernels(a) is None:
        return a + b + c
    return _Add3.apply(a, b, c)


class _Add3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return triton_kernels(a).add3(a.contiguous(), b.contiguous(), c.contiguous())  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, gradient, gradient


def softmax_gradient_(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    d_bias: Tensor | None,
    factors: Tensor | None = None,
) -> Tensor:
    """Overwrite logits by (softmax(logits + bias) - onehot(targets)) * factors.

    Args:
        logits: (C, V), still without the bias: it is added here, where it costs least.
        bias: (V,) or None.
        targets: (C,), int64.
        d_bias: fp32 (V,), the bias's gradient so far; the sum of the rows is added to it.
        factors: fp32 (C, 1); None: all 1.

    Returns:
        fp32 scalar, the sum of -log softmax at the targets, without factors.
    """
    if triton := triton_kernels(logits):
        losses = triton.softmax_gradient_(logits, bias, targets)
        if factors is not None:
            logits.mul_(factors)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=torch.float32)
        return losses.sum()

    # Some rows at a time in fp32: on a CPU they stay in its cache.
    step, targets = SOFTMAX_ROWS[logits.device.type], targets[:, None]
    scratch = logits.new_empty(min(step, len(logits)), logits.shape[1], dtype=torch.float32)
    total, ones = scratch.new_zeros(()), scratch.new_ones(len(scratch))
    fp32_bias = bias.float() if bias is not None else None
    for i, (part, target) in enumerate(zip(logits.split(step), targets.split(step), strict=True)):
        fp32 = scratch[: len(part)]
        fp32.copy_(part)
        if fp32_bias is not None:
            fp32 += fp32_bias
        if fp32.is_cuda:
            torch.log_softmax(fp32, -1, out=fp32)
            total -= fp32.gather(1, target).sum()
            fp32.exp_()
        else:  # half the exponentials: the logarithm is taken of the targets' probabilities alone
            torch.softmax(fp32, -1, out=fp32)
            chosen = fp32.gather(1, target)
            if chosen.min() < TINY:
                exact = part.float() if fp32_bias is None else part + fp32_bias
                total += F.cross_entropy(exact, target[:, 0], reduction="sum")
            else:
                total -= chosen.log().sum()
        fp32.scatter_add_(1, target, fp32.new_full(target.shape, -1.0))
        if factors is not None:
            fp32.mul_(factors[i * step : i * step + len(part)])
        if d_bias is not None:
            d_bias.addmv_(fp32.T, ones[: len(part)])
        part.copy_(fp32)
    return total
