"""What a forward keeps for its backward: everything, less, or next to nothing (`train.activation_checkpointing`).

    false       everything
    selective   all but the MLP's activated inner states, which cost one GELU to make again: a quarter of a block
    true        each block's input; the block is computed again in the backward
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
    """`block(x, *rest)` of a training forward, keeping what `kind` says. Only x and tensors in `rest` get gradients."""
    if kind is True:
        return checkpoint(block, x, *rest, use_reentrant=False)
    if kind == "offload":
        if not x.requires_grad:
            x = (
                x.detach().requires_grad_()
            )  # below a reentrant checkpoint nothing trains unless its input does
        with save_on_cpu(pin_memory=x.is_cuda):
            return checkpoint(_with_constants(block, rest), x, *_learned(rest), use_reentrant=True)
    return block(x, *rest)


def _learned(rest: tuple) -> list[Tensor]:
    return [value for value in rest if isinstance(value, Tensor) and value.requires_grad]


def _with_constants(block: Callable[..., Tensor], rest: tuple) -> Callable[..., Tensor]:
    """`block` of the tensors that learn alone: others would be copied to the host once per block."""
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
    """Inside, whoever saves `made = function(x)` for its backward saves x, and `made` is computed again there.

    Args:
        function: elementwise and without randomness.
        x: kept anyway by the function's own backward.
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
