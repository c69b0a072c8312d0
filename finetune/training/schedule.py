"""The learning rate as a pure function of the step, so that resuming needs no scheduler state; and the length of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.config import OptimConfig, TrainConfig


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Warmup in steps: values below 1 are a share of `total_steps`."""
    return math.ceil(optim.warmup * total_steps) if optim.warmup < 1 else int(optim.warmup)


def warmup_note(optim: OptimConfig, total_steps: int) -> str | None:
    """A line for the person who starts a run that ends before its warmup does."""
    warmup = warmup_steps(optim, total_steps)
    if warmup <= total_steps:
        return None
    return (
        f"optim.warmup = {warmup} steps is longer than the run, which has {total_steps}: the learning rate rises to "
        f"{total_steps / warmup:.0%} of optim.lr and no further. A share of all steps: optim.warmup=0.1"
    )


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    With warmup w: lr * step / w while step <= w, then from lr at step w + 1 along a line or half a cosine, which would
    be at lr * min_lr one step after `total_steps`: every step trains, the last one and a single one too. `constant`
    stays at lr.
    """
    warmup = warmup_steps(optim, total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (step - warmup - 1) / max(1, total_steps - warmup))
    share = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr + (1 - optim.min_lr) * share)


# How long a run is: steps, epochs, or whichever ends first.
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
