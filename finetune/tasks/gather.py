"""What the ranks of an evaluation found, brought together so that their number does not show.

Each rank appends arrays with one entry per example; `together` joins those of all ranks and sorts them by example.
Metrics are computed on the result, in one order, so one rank and many give the same bits. Holds a few numbers per
example, never logits per token.
"""

from __future__ import annotations

import numpy as np

from finetune.dist import World


class Gathered:
    """Columns of one evaluation; every part has the column `example`, -1 for none."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, **columns: np.ndarray) -> None:
        self._parts.append(columns)

    def together(self, world: World) -> dict[str, np.ndarray]:
        """All ranks' columns, (examples, ...), by example. Collective."""
        parts = [part for rank in world.gather(_join(self._parts)) for part in rank]
        columns = _join(parts)[0]
        order = np.argsort(columns["example"], kind="stable")
        order = order[columns["example"][order] >= 0]
        return {name: values[order] for name, values in columns.items()}


def _join(parts: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The parts as one, or none where there are none: a rank may have had no batch at all."""
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}] if parts else []
