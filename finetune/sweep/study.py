"""Optuna: each job is a trial of a study that lives in SWEEP/study.log and survives any crash.

The journal notes every question and answer before the next step. After a kill the trials that were running are found
again: those whose run has ended meanwhile are told their value, the others go on in their run directory.
Trial n is job n. A failed trial is spent: another one with the same parameters would fail as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.config import SweepConfig
from finetune.errors import UserError
from finetune.sweep.job import DONE, FAILED, PRUNED, STOPPED, Job
from finetune.sweep.search import Goal
from finetune.sweep.space import Interval, Parameter, Space

FILE = "study.log"


class Study:
    def __init__(self, cfg: SweepConfig, space: Space, goal: Goal, folder: Path):
        """Raises UserError: Optuna is missing, or an unknown pruner."""
        self.optuna = _optuna()
        self.space, self.goal, self.folder, self.total = space, goal, folder, cfg.trials
        self.asked: dict[int, Any] = {}
        self.distributions = {parameter.key: self._distribution(parameter) for parameter in space.parameters}
        self.study = self.optuna.create_study(
            storage=_storage(folder / FILE), study_name="sweep", load_if_exists=True,
            direction="maximize" if goal.maximize else "minimize",
            # The same seed would repeat the first draws after each restart.
            sampler=self.optuna.samplers.TPESampler(seed=cfg.seed + len(list(folder.glob("*/job.json"))),
                                                    n_startup_trials=max(1, min(10, cfg.trials // 3))),
            pruner=self._pruner(cfg))
        self.jobs = [self._job(trial) for trial in self.study.trials if self._is_whole(trial)]
        for job in self.jobs:
            job.load()
            self._settle(job)
        self.again = [job for job in self.jobs if job.status not in (DONE, FAILED, PRUNED)]

    def _is_whole(self, trial: Any) -> bool:
        """A crash inside `ask` leaves a trial without all of its values: it never was a job, and is not one now."""
        if set(trial.params) == set(self.distributions):
            return True
        if trial.state == self.optuna.trial.TrialState.RUNNING:
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        return False

    def earlier(self) -> list[Job]:
        return self.jobs

    def next(self) -> Job | None:
        if self.again:
            return self.again.pop(0)
        if len(self.jobs) >= self.total:
            return None
        trial = self.study.ask(self.distributions)
        self.asked[trial.number] = trial
        job = self._job(trial)
        self.jobs.append(job)
        return job

    def should_prune(self, job: Job, records: list[dict]) -> bool:
        if job.number not in self.asked:
            self.asked[job.number] = self.optuna.trial.Trial(self.study, self.study.trials[job.number]._trial_id)
        trial = self.asked[job.number]
        known = self.study.trials[job.number].intermediate_values
        for step, value in self.goal.reports(records):
            if step not in known:
                trial.report(value, step)
        return trial.should_prune()

    def ended(self, job: Job) -> None:
        self._settle(job)

    def _settle(self, job: Job) -> None:
        """Tell the study how a job ended, unless it knows."""
        states = self.optuna.trial.TrialState
        if self.study.trials[job.number].state != states.RUNNING:
            return
        value = self.goal.value(job)
        if job.status == DONE and value is not None:
            self.study.tell(job.number, value)
        elif job.status == PRUNED:
            self.study.tell(job.number, state=states.PRUNED)
        elif job.status in (DONE, FAILED):
            self.study.tell(job.number, state=states.FAIL)

    def _job(self, trial: Any) -> Job:
        chosen = {key: str(value) for key, value in trial.params.items()}
        return Job(trial.number, self.folder / str(trial.number), self.space.words(chosen), chosen, status=STOPPED)

    def _distribution(self, parameter: Parameter) -> Any:
        kinds = self.optuna.distributions
        if not isinstance(parameter, Interval):
            return kinds.CategoricalDistribution(parameter.values)
        if parameter.whole:
            return kinds.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
        return kinds.FloatDistribution(parameter.low, parameter.high, log=parameter.log)

    def _pruner(self, cfg: SweepConfig) -> Any:
        pruners = self.optuna.pruners
        if cfg.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=cfg.prune_after)
        if cfg.pruner == "halving":
            return pruners.SuccessiveHalvingPruner(bootstrap_count=cfg.prune_after)
        if cfg.pruner == "none":
            return pruners.NopPruner()
        raise UserError(f"'{cfg.pruner}' is none of median, halving, none", "sweep.pruner")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed", "sweep=optuna",
                        "pip install -e '.[sweep]'  (or sweep=random, which needs nothing)") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _storage(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(path)))
