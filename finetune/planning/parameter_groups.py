"""The cut of trained tensors into the optimizer's parameter groups, for the engine and the planner.

ZeRO 1 to 3 update one group after another and copy its gradients to fp32 first. One group of
everything would need four more bytes per parameter at that moment, 24 GB for GPT-J-6B; small groups
need them for one group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

GROUP_ELEMENTS = 2**25
"""Elements of a group, unless a single tensor has more."""


class Group(NamedTuple):
    """One parameter group: positions of its tensors, and how they are updated."""

    indices: list[int]
    decays: bool
    """Matrices are decayed; biases, norms and other vectors are not."""
    lr_ratio: float
    """Factor of the learning rate."""


def split(tensors: Sequence[tuple[str, Sequence[int]]], lr_ratio: float = 1.0) -> list[Group]:
    """Split (name, shape) of the trained tensors into parameter groups.

    Args:
        lr_ratio: factor of the learning rate of LoRA's B matrices.
    """
    kinds: dict[tuple[bool, float], list[int]] = {(True, 1.0): [], (True, lr_ratio): []}
    for index, (name, shape) in enumerate(tensors):
        ratio = lr_ratio if ".lora_B." in name else 1.0
        kinds.setdefault((len(shape) >= 2, ratio), []).append(index)

    groups: list[Group] = []
    for (decays, ratio), indices in kinds.items():
        room = 0
        for index in indices:
            numel = prod(tensors[index][1])
            if numel > room:  # a larger tensor is a group of its own
                groups.append(Group([], decays, ratio))
                room = GROUP_ELEMENTS
            groups[-1].indices.append(index)
            room -= numel
    return groups
