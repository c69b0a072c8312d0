"""The learning rate as a pure function of the step, so that resuming needs no scheduler state; and the length of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.config import OptimConfig, TrainConfig

INVERSE_SQRT_STEPS = 10_000
"""Time scale of inverse_sqrt without a warmup, as in transformers."""


def steps_of(length: float, total_steps: int) -> int:
    """Return optim.warmup or optim.decay in steps: values below 1 are a share of `total_steps`."""
    return math.ceil(length * total_steps) if length < 1 else int(length)


def warmup_note(optim: OptimConfig, total_steps: int) -> str | None:
    """A line for the person who starts a run that ends before its warmup does."""
    warmup = steps_of(optim.warmup, total_steps)
    if warmup <= total_steps:
        return None
    return (
        f"optim.warmup = {warmup} steps is longer than the run, which has {total_steps}: the "
        "learning rate rises to "
        f"{total_steps / warmup:.0%} of optim.lr and no further. A share of all steps: "
        "optim.warmup=0.1"
    )


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    With warmup w: lr * step / w while step <= w, then from lr at step w + 1 along the schedule, which would be at its end
    one step after `total_steps`: every step trains, the last one and a single one too. With p from 0 to 1 on that way:

        linear, cosine     1 - p, (1 + cos(pi p)) / 2
        cosine_restarts    the same cosine, optim.cycles times
        inverse_sqrt       1 / sqrt(1 + steps since the warmup / w), whatever the run's length
        wsd                1, then 1 - sqrt(q) with q from 0 to 1 over the last optim.decay steps (arXiv:2405.18392)
        constant           1

    All but `constant` are scaled into the range from lr * min_lr to lr.
    """
    warmup = steps_of(optim.warmup, total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    done = step - warmup - 1
    progress = min(1.0, done / max(1, total_steps - warmup))
    match optim.schedule:
        case "constant":
            return optim.lr
        case "linear":
            share = 1 - progress
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine_restarts":
            share = 0.5 * (1 + math.cos(math.pi * (optim.cycles * progress % 1)))
        case "inverse_sqrt":
            share = (1 + done / (warmup or INVERSE_SQRT_STEPS)) ** -0.5
        case "wsd":
            decay = steps_of(optim.decay, total_steps)
            share = 1 - max(0.0, (step - 1 - total_steps + decay) / max(1, decay)) ** 0.5
        case _:
            raise AssertionError(optim.schedule)
    return optim.lr * (optim.min_lr + (1 - optim.min_lr) * share)


# How long a run is: steps, epochs, or whichever ends first.
@dataclass
class Length:
    """Length of a run."""

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
