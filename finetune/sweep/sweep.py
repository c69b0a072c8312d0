"""A sweep from its command line to its table: the loop over jobs. One thread, no torch, in no process group."""

from __future__ import annotations

import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.compose import compose_train, compose_words
from finetune.config import Config
from finetune.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    UserError,
    command,
    problems_error,
    setting,
)
from finetune.files import read_object
from finetune.reporting.redact import secret_problems
from finetune.sweep.job import DONE, FAILED, PRUNED, Job, wait_for_earlier
from finetune.sweep.page import build_sweep_page
from finetune.sweep.pool import Pool, build_pool
from finetune.sweep.search import Goal, Search, build_goal, build_search
from finetune.sweep.show import SUMMARY, View, render, write_summary
from finetune.sweep.space import Space, key_of, read_space, settings_words

POLL_SECONDS = 0.5


def sweep(words: list[str], script: Path) -> int:
    """Run every job of `words`; 0 when all are done, 1 when one failed, 75 when the sweep was stopped.

    Args:
        script: what the launcher starts for each job.

    Raises:
        UserError: wrong words, before any job starts.
    """
    return _Sweep(words, script).run()


class _Sweep:
    """Raises UserError for a wrong command line, before any job starts."""

    def __init__(self, words: list[str], script: Path):
        own, job_words = settings_words(words)
        folder = _folder(own)
        saved = read_object(folder / SUMMARY) if folder else {}
        if not job_words and saved.get("words"):
            own, job_words = settings_words([*saved["words"], *own])
        self.words, self.script = [*own, *job_words], script
        config = compose_train(
            [*own, *(word for word in job_words if word.startswith("recipe=") and "," not in word)]
        )
        self.cfg = config.sweep
        # sweep.json and job.json keep the words as they are, to go on with them.
        secrets = {key_of(word): word.partition("=")[2] for word in self.words} | {
            "sweep.space": self.cfg.space
        }
        if problems := list(secret_problems(secrets)):
            raise problems_error("the command line", problems)
        if self.cfg.on_failure not in ("continue", "stop"):
            raise UserError(
                f"'{self.cfg.on_failure}' is neither continue nor stop", "sweep.on_failure"
            )
        self.folder = (
            Path(self.cfg.dir or f"multirun/{datetime.now():%Y%m%d-%H%M%S}").expanduser().absolute()
        )
        space: Space = read_space(
            [word for word in job_words if key_of(word) != "run_dir"], self.cfg.space
        )
        typed = compose_train(self._sample(space).words)
        self.goal: Goal = build_goal(self.cfg, typed)
        self.pool: Pool = build_pool(self.cfg)
        self._refuse_another(saved)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.search: Search = build_search(self.cfg, space, self.goal, self.folder)
        self.jobs = self.search.earlier()
        for job in self.jobs:
            typed = compose_train(job.words)
        self.extra = self._group(typed)
        self.running: list[Job] = []
        self.stopping = 0
        self.view = View(self.goal)

    def run(self) -> int:
        before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        self._announce()
        self.view.open()
        try:
            self._loop()
        finally:
            self.view.close()
            for job in self.running:
                job.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        print(render(self._write()), flush=True)
        print(f"page: {self.folder / 'sweep.html'}", flush=True)
        return self._exit_code()

    def _loop(self) -> None:
        more = True
        while self.running or more:
            more = not self.stopping and self._start_some()
            for job in list(self.running):
                self._watch(job)
            self.view.show(self.jobs, self.running, self.search.total)
            if self.running:
                time.sleep(POLL_SECONDS)

    def _start_some(self) -> bool:
        """Fill the free places; False when nothing is left to start."""
        while (place := self.pool.take()) is not None:
            job = None if self._gave_up() else self.search.next()
            if job is None:
                self.pool.give_back(place)
                return False
            if job not in self.jobs:
                self.jobs.append(job)
            wait_for_earlier(job, self.view.say)
            job.place = place
            job.start(self.script, self.pool.places[place], self.extra)
            self.running.append(job)
            self.view.started(job)
            self._write()
        return True

    def _watch(self, job: Job) -> None:
        new = job.read_metrics()
        if job.poll():
            self.running.remove(job)
            self.pool.give_back(job.place)
            self.search.ended(job)
            self.view.ended(job)
            self._write()
        elif new and not job.pruning and not self.stopping and self.search.should_prune(job, new):
            job.pruning = True
            job.stop()

    def _gave_up(self) -> bool:
        return self.cfg.on_failure == "stop" and any(
            job.status == FAILED and job.started for job in self.jobs
        )

    def _handle(self, number: int, frame: Any) -> None:
        """First signal: the jobs save and end, for the next start to go on. Second: they end at once."""
        self.stopping += 1
        for job in self.running:
            job.stop() if self.stopping == 1 else job.kill()
        if self.stopping == 1:
            self.view.say(
                f"stopping: {len(self.running)} jobs save first; once more to end them at once"
            )

    def _write(self) -> dict[str, Any]:
        about = {
            "name": self.folder.name,
            "strategy": self.cfg.strategy,
            "total": self.search.total,
            "words": self.words,
            "launcher": list(self.pool.places[0].options),
        }
        summary = write_summary(self.jobs, self.goal, self.folder, about)
        build_sweep_page(self.folder)
        return summary

    def _exit_code(self) -> int:
        if self.stopping:
            words = [word for word in self.words if key_of(word) != "sweep.dir"]
            again = command(
                ["python", "launch/train.py", "-m", *words, setting("sweep.dir", self.folder)]
            )
            print(f"stopped; to go on: {again}", flush=True)
            return EXIT_PREEMPTED
        ended = all(job.status in (DONE, PRUNED) for job in self.jobs)
        return EXIT_DONE if ended else EXIT_FAILED

    def _announce(self) -> None:
        done = [job for job in self.jobs if job.status in (DONE, PRUNED)]
        again = f", {len(done)} of them done before" if done else ""
        at_once = f", {len(self.pool.places)} at once" if len(self.pool.places) > 1 else ""
        print(f"sweep of {self.search.total} jobs{at_once} in {self.folder}{again}", flush=True)

    def _sample(self, space: Space) -> Job:
        """A job that is never run, to see that the words compose before a study is asked."""
        from finetune.sweep.space import draw

        chosen = draw(space, 0, 0)
        return Job(-1, self.folder, space.words(chosen), chosen)

    def _group(self, config: Config) -> list[str]:
        """One wandb group for all jobs of a sweep, unless the user named one."""
        wandb = config.tracker.wandb
        return (
            [setting("tracker.wandb.group", self.folder.name)]
            if wandb.enabled and not wandb.group
            else []
        )

    def _refuse_another(self, saved: dict[str, Any]) -> None:
        other = saved.get("strategy")
        if other and other != self.cfg.strategy and "optuna" in (other, self.cfg.strategy):
            raise UserError(
                f"there is a {other} sweep in {self.folder}",
                "sweep.dir",
                "Choose another folder, or leave sweep.dir out.",
            )


def _folder(own: list[str]) -> Path | None:
    cfg = compose_words(own).config.sweep if own else None
    return Path(cfg.dir).expanduser().absolute() if cfg and cfg.dir else None
