"""How long a run is: steps, epochs, or whichever ends first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.config import TrainConfig


@dataclass
class Length:
    """How long a run is."""

    steps: int
    """Optimizer steps."""
    end_position: int | None
    """Samples in all where epochs end the run; the last step may be partial."""
    epochs: float
    """Passes over the data that this makes."""


def run_length(train: TrainConfig, n_rows: int) -> Length:
    """Length of a run over `n_rows` rows; one of `train.steps` and `train.epochs` is set."""
    batch = train.global_batch
    if train.epochs is None:
        assert train.steps is not None
        return Length(train.steps, None, train.steps * batch / n_rows)
    end = max(1, round(train.epochs * n_rows))
    steps = math.ceil(end / batch)
    if train.steps is not None and train.steps < steps:
        return Length(train.steps, None, train.steps * batch / n_rows)
    return Length(steps, end, train.epochs)
