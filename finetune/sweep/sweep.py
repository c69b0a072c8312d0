"""A sweep from its command line to its table: the loop over jobs. One thread, no torch, in no process group."""

from __future__ import annotations

import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.check import value_problems
from finetune.compose import compose_train, compose_words
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
from finetune.reporting.redact import refuse_secrets
from finetune.sweep.job import DONE, FAILED, PRUNED, Job, wait_for_earlier
from finetune.sweep.page import SUMMARY, build_sweep_page
from finetune.sweep.pool import Pool, build_pool
from finetune.sweep.search import Goal, Search, build_goal, build_search
from finetune.sweep.show import View, render, write_summary
from finetune.sweep.space import draw, key_of, read_space, settings_words

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
    """The state of a sweep: its jobs, the search that chooses them, the places where they run.

    Raises:
        UserError: a wrong command line, before any job starts.
    """

    def __init__(self, words: list[str], script: Path):
        own, job_words = settings_words(words)
        folder = compose_words(own).config.sweep.dir if own else None
        saved = read_object(Path(folder).expanduser().absolute() / SUMMARY) if folder else {}
        if not job_words and saved.get("words"):
            own, job_words = settings_words([*saved["words"], *own])
        self.words, self.script = [*own, *job_words], script
        recipe = [word for word in job_words if word.startswith("recipe=") and "," not in word]
        self.cfg = compose_train([*own, *recipe]).sweep
        # sweep.json and job.json keep the words as they are, to go on with them.
        values = {key_of(word): word.partition("=")[2] for word in self.words}
        refuse_secrets(values | {"sweep.space": self.cfg.space}, "the command line")
        if problems := list(value_problems(self.cfg, "sweep.")):
            raise problems_error("the command line", problems)
        place = self.cfg.dir or f"multirun/{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = Path(place).expanduser().absolute()
        space = read_space(
            [word for word in job_words if key_of(word) != "run_dir"], self.cfg.space
        )
        # A job that is never run: its words must compose before a study is asked.
        typed = compose_train(space.words(draw(space, 0, 0)))
        self.goal: Goal = build_goal(self.cfg, typed)
        self.pool: Pool = build_pool(self.cfg)
        other = saved.get("strategy")
        if other and other != self.cfg.strategy and "optuna" in (other, self.cfg.strategy):
            raise UserError(
                f"there is a {other} sweep in {self.folder}",
                "sweep.dir",
                "Choose another folder, or leave sweep.dir out.",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.search: Search = build_search(self.cfg, space, self.goal, self.folder)
        self.jobs = self.search.earlier()
        for job in self.jobs:
            typed = compose_train(job.words)
        # One wandb group for all jobs, unless the user named one.
        wandb = typed.tracker.wandb
        grouped = wandb.enabled and not wandb.group
        self.extra = [setting("tracker.wandb.group", self.folder.name)] if grouped else []
        self.running: list[Job] = []
        self.stopping = 0
        self.view = View(self.goal)

    def run(self) -> int:
        before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        n_done = sum(job.status in (DONE, PRUNED) for job in self.jobs)
        again = f", {n_done} of them done before" if n_done else ""
        at_once = f", {len(self.pool.places)} at once" if len(self.pool.places) > 1 else ""
        print(f"sweep of {self.search.total} jobs{at_once} in {self.folder}{again}", flush=True)
        self.view.open()
        try:
            more = True
            while self.running or more:
                more = not self.stopping and self._start_some()
                for job in list(self.running):
                    new = job.read_metrics()
                    if job.poll():
                        self.running.remove(job)
                        self.pool.give_back(job.place)
                        self.search.ended(job)
                        self.view.ended(job)
                        self._write()
                    elif new and not (job.pruning or self.stopping):
                        job.pruning = self.search.should_prune(job, new)
                        if job.pruning:
                            job.stop()
                self.view.show(self.jobs, self.running, self.search.total)
                if self.running:
                    time.sleep(POLL_SECONDS)
        finally:
            self.view.close()
            for job in self.running:
                job.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        print(render(self._write(ended=True)), flush=True)
        print(f"page: {self.folder / 'sweep.html'}", flush=True)
        if self.stopping:
            words = [word for word in self.words if key_of(word) != "sweep.dir"]
            words.append(setting("sweep.dir", self.folder))
            again = command(["python", "launch/train.py", "-m", *words])
            print(f"stopped; to go on: {again}", flush=True)
            return EXIT_PREEMPTED
        ended = all(job.status in (DONE, PRUNED) for job in self.jobs)
        return EXIT_DONE if ended else EXIT_FAILED

    def _start_some(self) -> bool:
        """Fill the free places; False when nothing is left to start."""
        while (place := self.pool.take()) is not None:
            # Failures of an earlier attempt are started again.
            failed = any(job.status == FAILED and job.started for job in self.jobs)
            gave_up = failed and self.cfg.on_failure == "stop"
            job = None if gave_up else self.search.next()
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

    def _handle(self, number: int, frame: Any) -> None:
        """First signal: the jobs save and end, for the next start to go on. Second: they end at once."""
        self.stopping += 1
        for job in self.running:
            job.stop() if self.stopping == 1 else job.kill()
        if self.stopping == 1:
            self.view.say(
                f"stopping: {len(self.running)} jobs save first; once more to end them at once"
            )

    def _write(self, ended: bool = False) -> dict[str, Any]:
        left = any(job.status not in (DONE, FAILED, PRUNED) for job in self.jobs)
        about = {
            "name": self.folder.name,
            "strategy": self.cfg.strategy,
            "total": self.search.total,
            "words": self.words,
            "launcher": list(self.pool.places[0].options),
            # The sweep has ended before all of its jobs have.
            "stopped": ended and (bool(self.stopping) or left),
        }
        summary = write_summary(self.jobs, self.goal, self.folder, about)
        build_sweep_page(self.folder)
        return summary
