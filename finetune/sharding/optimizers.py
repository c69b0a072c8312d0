"""The optimizers of `optim.name`, and their states in the form that checkpoints have.

A checkpoint holds fp32 numbers, whatever the optimizer keeps. AdamW's moments are such numbers.
Those of AdamW in 8 bits (Dettmers et al., arXiv:2110.02861) are one code a value and one scale for
each block of 256, both cut from a flat tensor of master weights: they are dequantised to be saved,
and quantised when they are restored. With the same cut, that gives the same moments bit by bit.
Adafactor (Shazeer and Stern, arXiv:1804.04235) keeps row and column means of the squared gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adafactor, AdamW, Optimizer

from finetune.config import OptimConfig, OptimName

MOMENTS = ("exp_avg", "exp_avg_sq")
EIGHT_BIT = (("state1", "qmap1", "absmax1"), ("state2", "qmap2", "absmax2"))
"""bitsandbytes' names of each moment, its table of codes and its scales."""
BLOCK = 256


def build_optimizer(optim: OptimConfig, groups: list[dict]) -> Optimizer:
    """Return the optimizer with lr 0, which every step sets anew.

    Some of DeepSpeed's wrappers take a step on zero gradients while they are built, and with a
    nonzero learning rate that step would already decay the weights.
    """
    if optim.name is OptimName.adafactor:
        return Adafactor(groups, lr=0.0, foreach=False)
    adam: dict[str, Any] = {"lr": 0.0, "betas": tuple(optim.betas), "eps": optim.eps}
    if optim.name is OptimName.adamw:
        return AdamW(groups, fused=True, **adam)
    # Imported here: bitsandbytes takes seconds, and most runs do without it.
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **adam)


def create_states(optimizer: Any, master: Tensor) -> None:
    """Create the states of a tensor of master weights, zeros at step 0, as its first step would."""
    state = optimizer.state[master]
    if state:
        return
    if hasattr(optimizer, "init_state"):  # bitsandbytes, which looks into its groups
        groups = optimizer.param_groups
        optimizer.param_groups = [groups[0] | {"params": [master]}]
        optimizer.init_state(optimizer.param_groups[0], master, 0, 0)
        optimizer.param_groups = groups
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    if not isinstance(optimizer, Adafactor):
        for key in MOMENTS:
            state[key] = torch.zeros_like(master, requires_grad=False)
    elif master.dim() > 1:
        state["row_var"] = torch.zeros_like(master[..., :1], requires_grad=False)
        state["col_var"] = torch.zeros_like(master[..., :1, :], requires_grad=False)
    else:
        state["variance"] = torch.zeros_like(master, requires_grad=False)


def moment_bytes(optimizer: Optimizer, master: Tensor) -> int:
    """Return the bytes of the moments of a tensor of master weights."""
    shared = ("step", "qmap1", "qmap2")
    state = optimizer.state.get(master, {})
    return sum(t.numel() * t.element_size() for key, t in state.items() if key not in shared)


def moment_sizes(optimizer: Optimizer, master: Tensor, numel: int) -> dict[str, int]:
    """Return the numbers of each moment that belong to `numel` elements of master weights.

    Adafactor's belong to a whole tensor.
    """
    if isinstance(optimizer, Adafactor):
        state = optimizer.state[master]
        return {key: tensor.numel() for key, tensor in state.items() if key != "step"}
    return dict.fromkeys(MOMENTS, numel)


@contextmanager
def moments(optimizer: Optimizer, master: Tensor, write: bool) -> Iterator[dict[str, Tensor]]:
    """Give the moments of a tensor of master weights in fp32.

    Args:
        write: keep what is changed in them; otherwise it may be lost.
    """
    state = optimizer.state[master]
    if "state1" not in state:
        yield {key: tensor for key, tensor in state.items() if key != "step"}
        return
    if state["state1"].dtype == torch.float32:  # too small for 8 bits
        yield dict(zip(MOMENTS, (state["state1"], state["state2"]), strict=True))
        return
    parts = [tuple(state[key] for key in keys) for keys in EIGHT_BIT]
    full = [dequantize(*part) for part in parts]
    yield dict(zip(MOMENTS, full, strict=True))
    if write:
        for values, part in zip(full, parts, strict=True):
            quantize(values, *part)


def dequantize(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """Return the fp32 values of 8-bit moments."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, code=table, blocksize=BLOCK)


def quantize(values: Tensor, codes: Tensor, table: Tensor, scales: Tensor) -> None:
    """Quantise moments in place, so that what `dequantize` gave comes back exactly.

    bitsandbytes scales a block by its largest magnitude. Its signed table ends at 1 but begins at
    -0.993, so a block whose largest magnitude is negative would shrink each time. Here such a block
    gets the scale at which that value is the table's first entry. The division rounds, so that of
    its result and the two neighbours is taken which gives back the whole block, if one does.
    """
    flat = values.view(-1)
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    top, bottom = blocks.amax(1), blocks.amin(1)
    scale = torch.where((bottom < 0) & (top <= -bottom), bottom / table[0], top)
    borders, found = (table[1:] + table[:-1]) / 2, torch.zeros_like(scale, dtype=torch.bool)
    for near in (scale, torch.nextafter(scale, 2 * scale), torch.nextafter(scale, 0 * scale)):
        shares = blocks / near.clamp(min=torch.finfo(near.dtype).tiny)[:, None]
        nearest = torch.bucketize(shares, borders, out_int32=True)
        exact = (table[nearest] * near[:, None] == blocks).all(1)
        if near is scale:
            chosen, chosen_codes = near.clone(), nearest.to(codes.dtype)
        else:
            better = exact & ~found
            chosen[better], chosen_codes[better] = near[better], nearest[better].to(codes.dtype)
        found |= exact
    scales.copy_(chosen)
    codes.view(-1).copy_(chosen_codes.view(-1)[: len(flat)])
