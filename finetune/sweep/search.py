"""Which job comes next: a list made in advance (grid, random), or a study that learns (optuna, in study.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.check_task import DIRECTIONS, best_metric, metric_problems, task_problems
from finetune.config import Config, SweepConfig
from finetune.errors import UserError
from finetune.sweep import space as spaces
from finetune.sweep.job import DONE, PRUNED, Job, read_json
from finetune.sweep.space import Space

HIGHER = ("accuracy", "f1", "exact_match", "precision", "recall", "correlation")
STRATEGIES = ("grid", "random", "optuna")


@dataclass(frozen=True)
class Goal:
    """What is compared."""

    metric: str
    """Key of an evaluation; `loss` is the training loss where a job has no evaluation."""
    maximize: bool

    def value(self, job: Job) -> float | None:
        """The job's figure at its end; None without one, or where it is not finite."""
        result = job.result()
        evaluated = result.get("eval") or {}
        found = evaluated.get(self.metric)
        if self.metric == "loss" and "loss" not in evaluated:  # one that is null was not a number
            found = result.get("loss")
        return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None

    def compares(self, job: Job) -> bool:
        """Whether a job is done and has a figure: no other can be the best."""
        return job.status == DONE and self.value(job) is not None

    def reports(self, records: list[dict]) -> list[tuple[int, float]]:
        """(step, value) of the evaluations among `records`."""
        return [(int(r["step"]), float(r[self.metric])) for r in records
                if r.get("kind") == "eval" and isinstance(r.get(self.metric), (int, float))
                and math.isfinite(r[self.metric]) and r.get("step")]

    def rank(self, job: Job) -> tuple[bool, float]:
        """Sorts finished jobs first, best first."""
        value = self.value(job) if job.status == DONE else None
        return job.status != DONE, float("inf") if value is None else -value if self.maximize else value


class Search(Protocol):
    total: int
    """Jobs of the whole sweep."""

    def earlier(self) -> list[Job]:
        """Every job that is known already, as an earlier attempt left it."""
        ...

    def next(self) -> Job | None:
        """The next job to start; None when there is none (now)."""
        ...

    def should_prune(self, job: Job, records: list[dict]) -> bool:
        """Whether a running job is hopeless, from the records that are new."""
        ...

    def ended(self, job: Job) -> None: ...


class Listed:
    """Jobs known in advance. Jobs that ended before are found again by their words, wherever their number is."""

    def __init__(self, words_of: list[tuple[list[str], dict[str, str]]], folder: Path):
        taken = {tuple(sorted(noted["overrides"])): int(path.parent.name)
                 for path in folder.glob("*/job.json") if (noted := read_json(path)).get("overrides") is not None}
        used, self.jobs = set(taken.values()), list[Job]()
        free = (n for n in range(len(words_of) + len(used)) if n not in used)
        for words, chosen in words_of:
            number = taken.get(tuple(sorted(words)))
            number = next(free) if number is None else number
            self.jobs.append(Job(number, folder / str(number), words, chosen))
        self.total = len(self.jobs)
        for job in self.jobs:
            job.load()
        self.waiting = [job for job in self.jobs if job.status not in (DONE, PRUNED)]

    def earlier(self) -> list[Job]:
        return self.jobs

    def next(self) -> Job | None:
        return self.waiting.pop(0) if self.waiting else None

    def should_prune(self, job: Job, records: list[dict]) -> bool:
        return False

    def ended(self, job: Job) -> None: ...


def build_search(cfg: SweepConfig, space: Space, goal: Goal, folder: Path) -> Search:
    """The strategy that `cfg` names.

    Raises:
        UserError: an unknown strategy, nothing to draw from, or Optuna is not installed.
    """
    if cfg.strategy not in STRATEGIES:
        raise UserError(f"'{cfg.strategy}' is none of {', '.join(STRATEGIES)}", "sweep.strategy")
    if cfg.strategy == "grid":
        return Listed(_unique([(space.words(chosen), chosen) for chosen in spaces.grid(space)]), folder)
    if not space.parameters:
        raise UserError("there is nothing to vary", "sweep.space", "Try optim.lr='tag(log,interval(1e-5,1e-3))'.")
    if cfg.trials < 1:
        raise UserError(f"{cfg.trials} jobs", "sweep.trials", "Try sweep.trials=20.")
    if cfg.strategy == "random":
        chosen = [spaces.draw(space, cfg.seed, n) for n in range(cfg.trials)]
        return Listed(_unique([(space.words(one), one) for one in chosen]), folder)
    from finetune.sweep.study import Study

    return Study(cfg, space, goal, folder)


def build_goal(cfg: SweepConfig, job: Config) -> Goal:
    """The goal of a sweep whose jobs are like `job`.

    Raises:
        UserError: an unknown direction, or a train.metric that the task does not have.
    """
    if cfg.direction not in ("auto", "minimize", "maximize"):
        raise UserError(f"'{cfg.direction}' is neither auto, minimize nor maximize", "sweep.direction")
    for problem in (*task_problems(job.task), *metric_problems(job.task, job.train.metric)):
        raise problem
    metric, end = cfg.metric, DIRECTIONS.get(cfg.metric, "")
    if metric == "auto":
        metric, end = best_metric(job.task, job.train.metric) if job.data.eval else ("loss", "min")
    # Keys of evaluations that rank nothing by themselves, such as a class's own figures.
    end = end or ("max" if any(word in metric for word in HIGHER) else "min")
    return Goal(metric, cfg.direction == "maximize" or (cfg.direction == "auto" and end == "max"))


def _unique(jobs: list[tuple[list[str], dict[str, str]]]) -> list[tuple[list[str], dict[str, str]]]:
    """A choice between few values may be drawn twice."""
    return list({tuple(sorted(words)): (words, chosen) for words, chosen in jobs}.values())


