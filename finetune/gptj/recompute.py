"""Activation checkpointing: what a forward saves for its backward.

The kinds of `train.activation_checkpointing`:

    false       everything
    selective   all but the MLP's activated inner states, a quarter of a block (costs one GELU)
    true        each block's input; the block is recomputed in the backward
    offload     the same, with the inputs in host memory

Source: Chen et al., arXiv:1604.06174; Korthikanti et al., arXiv:2205.05198 for the selective kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from finetune.gptj.attention import Context

KINDS = (False, True, "selective", "offload")


def run_block(
    kind: bool | str, block: Callable[..., Tensor], x: Tensor, context: Context, layer: int
) -> Tensor:
    """Run `block(x, context, layer)` of a training forward, saving what `kind` says."""
    if kind is True:
        return checkpoint(block, x, context, layer, use_reentrant=False)
    if kind != "offload":
        return block(x, context, layer)

    # A reentrant checkpoint saves its tensor arguments, here on the host, and gives only them
    # gradients. A prefix is trained, so it is one of them. The rest of the context is bound: as an
    # argument it would be copied to the host once per block.
    prefix = [context.prefixes[layer]] if context.prefixes else []

    def run(x: Tensor, *prefix: Tensor) -> Tensor:
        own = {layer: prefix[0]} if prefix else None
        return block(x, replace(context, prefixes=own), layer)

    if not x.requires_grad:
        x = x.detach().requires_grad_()  # without it, a reentrant checkpoint trains nothing
    with save_on_cpu(pin_memory=x.is_cuda):
        return checkpoint(run, x, *prefix, use_reentrant=True)


class recomputed(saved_tensors_hooks):
    """Context in which x is saved for the backward instead of `result = function(x)`.

    The backward computes the result again from x.

    Args:
        function: elementwise and without randomness.
        x: saved anyway by the function's own backward.
        result: contiguous.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, result: Tensor):
        storage, count, source = result.untyped_storage().data_ptr(), result.numel(), x.detach()

        def pack(saved: Tensor) -> Tensor | tuple[Tensor, torch.Size]:
            same = (
                saved.numel() == count
                and saved.untyped_storage().data_ptr() == storage
                and saved.is_contiguous()
            )
            return (source, saved.shape) if same else saved

        def unpack(packed: Tensor | tuple[Tensor, torch.Size]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            with torch.no_grad():
                return function(packed[0]).view(packed[1])

        super().__init__(pack, unpack)
