"""Choose the next job: from a list made in advance (grid, random) or from a study (optuna)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune.check import task_problems
from finetune.config import (
    DIRECTIONS,
    Config,
    SweepConfig,
    asks_lm_eval,
    best_metric,
    direction_of,
)
from finetune.errors import UserError
from finetune.files import read_object
from finetune.sweep import space as spaces
from finetune.sweep.job import DONE, FAILED, PRUNED, STOPPED, Job
from finetune.sweep.space import Interval, Space

HIGHER = ("accuracy", "f1", "exact_match", "precision", "recall", "correlation")


@dataclass(frozen=True)
class Goal:
    """The metric by which jobs are compared, and its direction."""

    metric: str
    """Key of an evaluation; `loss` is the training loss where a job has no evaluation."""
    maximize: bool

    def value(self, job: Job) -> float | None:
        """Return the job's final value of the metric; None if it has none or it is not finite."""
        result = job.result()
        evaluated = result.get("eval") or {}
        found = evaluated.get(self.metric)
        if self.metric == "loss" and "loss" not in evaluated:  # a null is no finite number
            found = result.get("loss")
        return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None

    def compares(self, job: Job) -> bool:
        """Tell whether a job is done and has a value; no other job can be the best."""
        return job.status == DONE and self.value(job) is not None

    def reports(self, records: list[dict]) -> list[tuple[int, float]]:
        """Return (step, value) of the evaluations among `records`."""
        return [
            (int(r["step"]), float(r[self.metric]))
            for r in records
            if r.get("kind") == "eval"
            and isinstance(r.get(self.metric), (int, float))
            and math.isfinite(r[self.metric])
            and r.get("step")
        ]

    def rank(self, job: Job) -> tuple[bool, float]:
        """Return a sort key that puts finished jobs first, best first."""
        value = self.value(job) if job.status == DONE else None
        if value is None:
            return job.status != DONE, math.inf
        return False, -value if self.maximize else value


class Search(Protocol):
    total: int
    """Jobs of the whole sweep."""

    def earlier(self) -> list[Job]:
        """Return every job that exists already, as an earlier attempt left it."""
        ...

    def next(self) -> Job | None:
        """Return the next job to start; None if there is none (now)."""
        ...

    def should_prune(self, job: Job, records: list[dict]) -> bool:
        """Tell whether to stop a running job as hopeless, given its new records."""
        ...

    def ended(self, job: Job) -> None: ...


class Listed:
    """Jobs known in advance.

    Jobs of an earlier attempt are matched by their words and keep their number.
    """

    def __init__(self, words_of: list[tuple[list[str], dict[str, str]]], folder: Path):
        taken = {
            tuple(sorted(noted["overrides"])): int(path.parent.name)
            for path in folder.glob("*/job.json")
            if (noted := read_object(path)).get("overrides") is not None
        }
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
    """Build the strategy that `cfg` names.

    Raises:
        UserError: nothing to draw from, or Optuna is not installed.
    """
    if cfg.strategy != "grid" and not space.parameters:
        raise UserError(
            "there is nothing to vary",
            "sweep.space",
            "Try optim.lr='tag(log,interval(1e-5,1e-3))'.",
        )
    if cfg.strategy == "optuna":
        return Study(cfg, space, goal, folder)
    random = (spaces.draw(space, cfg.seed, n) for n in range(cfg.trials))
    chosen = spaces.grid(space) if cfg.strategy == "grid" else list(random)
    # A choice between few values may be drawn twice.
    jobs = [(space.words(one), one) for one in chosen]
    return Listed(
        list({tuple(sorted(words)): (words, one) for words, one in jobs}.values()), folder
    )


def build_goal(cfg: SweepConfig, job: Config) -> Goal:
    """Build the goal of a sweep whose jobs are like `job`.

    Raises:
        UserError: the task does not have this train.metric.
    """
    own_metric = None if asks_lm_eval(job.eval, job.train.metric) else job.train.metric
    for problem in task_problems(job.task, own_metric):
        raise problem
    metric, end = cfg.metric, DIRECTIONS.get(cfg.metric, "")
    if asks_lm_eval(job.eval, metric):
        end = direction_of(metric)
    if metric == "auto":
        metric, end = (
            best_metric(job.task, job.train.metric) if job.data.evaluates else ("loss", "min")
        )
    # Keys of evaluations that are no metrics to rank by, such as the values of a single class.
    end = end or ("max" if any(word in metric for word in HIGHER) else "min")
    return Goal(metric, cfg.direction == "maximize" or (cfg.direction == "auto" and end == "max"))


# Optuna: each job is a trial of a study that lives in SWEEP/study.log and survives any crash.
#
# The journal records every question and answer before the next step. After a kill, the trials that
# were running are found again: those whose run has ended meanwhile are told their value, the others
# continue in their run directory. Trial n is job n. A failed trial is not repeated, as another one
# with the same parameters would fail as well.
FILE = "study.log"


class Study:
    def __init__(self, cfg: SweepConfig, space: Space, goal: Goal, folder: Path):
        """Open the study of a sweep, or create it.

        Raises:
            UserError: Optuna is missing.
        """
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError(
                "Optuna is not installed",
                "sweep=optuna",
                "pip install -e '.[sweep]'  (or sweep=random, which needs nothing)",
            ) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.goal, self.folder, self.total = space, goal, folder, cfg.trials
        self.prune_after, self.states = cfg.prune_after, optuna.trial.TrialState

        kinds = optuna.distributions
        self.distributions: dict[str, Any] = {}
        for parameter in space.parameters:
            if isinstance(parameter, Interval):
                kind = kinds.IntDistribution if parameter.whole else kinds.FloatDistribution
                low, high = parameter.low, parameter.high
                ends = (int(low), int(high)) if parameter.whole else (low, high)
                self.distributions[parameter.key] = kind(*ends, log=parameter.log)
            else:
                self.distributions[parameter.key] = kinds.CategoricalDistribution(parameter.values)
        pruners = {
            "median": optuna.pruners.MedianPruner(n_startup_trials=0),
            "halving": optuna.pruners.SuccessiveHalvingPruner(),
            "none": optuna.pruners.NopPruner(),
        }
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / FILE))),
            study_name="sweep",
            load_if_exists=True,
            direction="maximize" if goal.maximize else "minimize",
            # The same seed would repeat the first draws after each restart.
            sampler=optuna.samplers.TPESampler(
                seed=cfg.seed + len(list(folder.glob("*/job.json"))),
                n_startup_trials=max(1, min(10, cfg.trials // 3)),
            ),
            pruner=pruners[cfg.pruner],
        )

        # Jobs of an earlier attempt. A crash inside `ask` leaves a trial without some of its values,
        # which never became a job.
        self.jobs: list[Job] = []
        for trial in self.study.trials:
            if set(trial.params) == set(self.distributions):
                self.jobs.append(self._job(trial))
            elif trial.state == self.states.RUNNING:
                self.study.tell(trial.number, state=self.states.FAIL)
        for job in self.jobs:
            job.load()
            self.ended(job)
        self.again = [job for job in self.jobs if job.status not in (DONE, FAILED, PRUNED)]

    def earlier(self) -> list[Job]:
        return self.jobs

    def next(self) -> Job | None:
        if self.again:
            return self.again.pop(0)
        if len(self.jobs) >= self.total:
            return None
        job = self._job(self.study.ask(self.distributions))
        self.jobs.append(job)
        return job

    def should_prune(self, job: Job, records: list[dict]) -> bool:
        from optuna.trial import Trial

        trials = self.study.trials
        trial, known = trials[job.number], trials[job.number].intermediate_values
        running = Trial(self.study, trial._trial_id)
        for step, value in self.goal.reports(records):
            if step not in known:
                running.report(value, step)
        done = sum(trial.state == self.states.COMPLETE for trial in trials)
        return done >= self.prune_after and running.should_prune()

    def ended(self, job: Job) -> None:
        """Tell the study how a job ended, unless it knows already or the job goes on later."""
        if self.study.trials[job.number].state != self.states.RUNNING:
            return
        value = self.goal.value(job)
        if job.status == DONE and value is not None:
            self.study.tell(job.number, value)
        elif job.status == PRUNED:
            self.study.tell(job.number, state=self.states.PRUNED)
        elif job.status in (DONE, FAILED):
            self.study.tell(job.number, state=self.states.FAIL)

    def _job(self, trial: Any) -> Job:
        chosen = {key: str(value) for key, value in trial.params.items()}
        folder = self.folder / str(trial.number)
        return Job(trial.number, folder, self.space.words(chosen), chosen, status=STOPPED)
