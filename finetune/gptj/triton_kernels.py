"""Triton kernels for CUDA. `kernels.py` decides when they run, and has each in plain PyTorch too.

They compute in fp32 and round once, where PyTorch reads and writes the whole tensor several times.
Importing this module imports triton, which CUDA builds of torch bring. TRITON_INTERPRET=1 runs the
kernels on a CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Elements that one program holds at once."""


def rotate_(x: Tensor, table: Tensor, heads: int, back: bool) -> None:
    """Rotate neighbouring dimensions of every head in place; see `kernels.rotate_`."""
    tokens, width = x.shape
    pairs = table.shape[-1]
    _rotate[(tokens, heads)](
        x,
        torch.view_as_real(table),
        x.stride(0),
        width // heads,
        pairs,
        -1.0 if back else 1.0,
        PAIRS=triton.next_power_of_2(pairs),
    )


def add3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a + b + c for contiguous tensors of one shape."""
    total = torch.empty_like(a)
    size = a.numel()
    _add3[(triton.cdiv(size, BLOCK),)](a, b, c, total, size, BLOCK=BLOCK)
    return total


def softmax_gradient_(logits: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Overwrite logits (C, V) by softmax(logits + bias) - onehot(targets (C,)).

    Returns:
        fp32 (C,), the rows' losses: -log softmax at the targets.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    _softmax_gradient[(len(logits),)](
        logits,
        logits if bias is None else bias,
        targets,
        losses,
        logits.shape[1],
        HAS_BIAS=bias is not None,
        BLOCK=BLOCK,
    )
    return losses


@triton.jit
def _rotate(x, table, stride, head_dim, pairs, sign, PAIRS: tl.constexpr):
    token, head = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, PAIRS)
    mask = index < pairs
    entry = table + (token * pairs + index) * 2
    cosine = tl.load(entry, mask=mask)
    sine = sign * tl.load(entry + 1, mask=mask)
    even = x + token.to(tl.int64) * stride + head * head_dim + 2 * index
    a = tl.load(even, mask=mask).to(tl.float32)
    b = tl.load(even + 1, mask=mask).to(tl.float32)
    tl.store(even, a * cosine - b * sine, mask=mask)
    tl.store(even + 1, a * sine + b * cosine, mask=mask)


@triton.jit
def _add3(a, b, c, total, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    value = tl.load(a + index, mask=mask).to(tl.float32)
    value += tl.load(b + index, mask=mask).to(tl.float32)
    value += tl.load(c + index, mask=mask).to(tl.float32)
    tl.store(total + index, value, mask=mask)


@triton.jit
def _softmax_gradient(
    logits, bias, targets, losses, columns, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * columns
    target = tl.load(targets + row)

    # First pass: the largest logit so far, and the sum of exponentials relative to it.
    largest, total, chosen = -float("inf"), 0.0, 0.0
    for first in range(0, columns, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < columns
        value = tl.load(start + index, mask=mask, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + index, mask=mask, other=0.0).to(tl.float32)
        above = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(value - above), 0)
        chosen += tl.sum(tl.where(index == target, value, 0.0), 0)
        largest = above
    tl.store(losses + row, largest + tl.log(total) - chosen)

    # Second pass: the probabilities, less one at the target.
    for first in range(0, columns, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < columns
        value = tl.load(start + index, mask=mask, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + index, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.exp(value - largest) / total - tl.where(index == target, 1.0, 0.0)
        tl.store(start + index, gradient, mask=mask)
