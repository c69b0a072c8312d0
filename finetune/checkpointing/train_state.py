"""Training progress: the few numbers that, with weights and optimizer states, resume a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Progress of a run; the data position is step x global_batch."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Real tokens seen."""
    seconds: float = 0.0
    """Training time so far."""
    skipped: int = 0
    """Steps that changed nothing because a gradient was not finite."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last one that was applied."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses that the next one is compared with."""
    metric: str = ""
    """Name of the metric that `best` is a value of."""
    best: float | None = None
    """Best evaluation metric so far."""
    best_step: int = 0
    """Step of the best metric."""
    without_gain: int = 0
    """Evaluations since the best one."""
    owes_evaluation: bool = False
    """The evaluation of this step was not finished when this was saved."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """State of the trackers, by class name."""

    def rank_by(self, metric: str) -> bool:
        """Rank evaluations by `metric`; return True if this drops another metric's best value."""
        dropped = bool(self.metric) and self.metric != metric and self.best is not None
        if dropped:
            self.best, self.best_step, self.without_gain = None, 0, 0
        self.metric = metric
        return dropped
