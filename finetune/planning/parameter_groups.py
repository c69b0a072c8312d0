"""The cut of trained tensors into the optimizer's parameter groups, for the engine and the planner.

ZeRO 1 to 3 update one group after another and copy its gradients to fp32 first. One group of
everything would need four more bytes per parameter at that moment, 24 GB for GPT-J-6B; small groups
need them for one group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

GROUP_ELEMENTS = 2**25
"""Elements of a group, unless a single tensor has more."""


def cut(numels: Sequence[int], limit: int = GROUP_ELEMENTS) -> list[range]:
    """Return consecutive runs of positions whose sizes add up to at most `limit`.

    A larger tensor is a run of its own.
    """
    runs: list[range] = []
    start = total = 0
    for index, numel in enumerate(numels):
        if index > start and total + numel > limit:
            runs.append(range(start, index))
            start, total = index, 0
        total += numel
    if start < len(numels):
        runs.append(range(start, len(numels)))
    return runs
