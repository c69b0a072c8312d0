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

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

KINDS = (False, True, "selective", "offload")


def run_block(kind: bool | str, block: Callable[..., Tensor], x: Tensor, *rest) -> Tensor:
    """Run `block(x, *rest)` of a training forward, saving what `kind` says.

    Only x and tensors in `rest` get gradients.
    """
    if kind is True:
        return checkpoint(block, x, *rest, use_reentrant=False)
    if kind == "offload":
        if not x.requires_grad:
            x = (
                x.detach().requires_grad_()
            )  # a reentrant checkpoint trains nothing unless its input requires grad
        with save_on_cpu(pin_memory=x.is_cuda):
            return checkpoint(_with_constants(block, rest), x, *_learned(rest), use_reentrant=True)
    return block(x, *rest)


def _learned(rest: tuple) -> list[Tensor]:
    return [value for value in rest if isinstance(value, Tensor) and value.requires_grad]


def _with_constants(block: Callable[..., Tensor], rest: tuple) -> Callable[..., Tensor]:
    """Bind the arguments of `block` that need no gradient.

    As arguments they would be copied to the host once per block.
    """
    constants = [
        None if isinstance(value, Tensor) and value.requires_grad else value for value in rest
    ]
    learns = [isinstance(value, Tensor) and value.requires_grad for value in rest]

    def run(x: Tensor, *learned: Tensor) -> Tensor:
        given = iter(learned)
        return block(
            x,
            *(
                next(given) if learn else value
                for learn, value in zip(learns, constants, strict=True)
            ),
        )

    return run


class made_again(saved_tensors_hooks):
    """Context in which x is saved for the backward instead of `made = function(x)`.

    The backward computes `made` again from x.

    Args:
        function: elementwise and without randomness.
        x: saved anyway by the function's own backward.
        made: its contiguous result.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, made: Tensor):
        storage, count, source = made.untyped_storage().data_ptr(), made.numel(), x.detach()

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
