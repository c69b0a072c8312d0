"""Everything that watches a run from outside, and what stays behind when the run fails.

    with Guard(cfg, words, world, run_dir, display, callbacks) as guard:
        with guard.phase("loading the model"):
            ...

Inside the block this process holds the run directory's lock, signals are requests to stop, and a
rank is ended with an explanation before the kernel kills it for its memory. An error that leaves
the block is explained (out of memory, the failure of another rank) and written to result.json, the
report page and the display before it is raised.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

from finetune import process
from finetune.checkpointing import faults
from finetune.config import Config
from finetune.dist import World
from finetune.errors import Preempted, RunFailed
from finetune.planning import machine
from finetune.reporting import metrics_log
from finetune.reporting.callbacks import Callback
from finetune.reporting.terminal import Display, Phase
from finetune.sharding import nvme
from finetune.training import stop_signals
from finetune.training.hang_watch import HangWatch
from finetune.training.out_of_memory import HostWatch, OutOfMemory
from finetune.training.rank_failures import RankFailures
from finetune.training.run_dir import RunLock, failed_result, refuse_finished
from finetune.training.stop_signals import StopRequest


class Guard:
    """Watch one run; see the module. Every rank makes one.

    Args:
        words: the k=v words of the command line, for commands to paste.
        display: of rank 0; None on the others.
        callbacks: of rank 0; empty on the others.
        rebuild_page: writes the report page from the run's files; for ranks that are cut off, where
            callbacks can no longer be called.
    """

    def __init__(
        self,
        cfg: Config,
        words: list[str],
        world: World,
        run_dir: Path,
        display: Display | None,
        callbacks: Callback,
        rebuild_page: Callable[[], object],
    ):
        self.cfg, self.world, self.run_dir = cfg, world, run_dir
        self.display, self.callbacks, self.rebuild_page = display, callbacks, rebuild_page
        self.memory = OutOfMemory(cfg, words, run_dir, world)
        self.start_host_bytes = 0
        """Resident bytes of the largest rank just before the first step; 0 until then."""
        self._lock = RunLock(run_dir)
        self._hang_watch: HangWatch | None = None

    def __enter__(self) -> Guard:
        # Signals wait until a stopped run can be reported.
        stop_signals.hold()

        def take_over() -> None:
            self._lock.take(self.callbacks.message)
            if self.cfg.resume != "never":
                refuse_finished(self.run_dir)
            (self.run_dir / metrics_log.RESULT).unlink(missing_ok=True)

        self.world.on_main(take_over)
        self.stop = StopRequest(
            self.run_dir, watch_files=self.world.main, max_time=self.cfg.train.max_time
        )
        self._failures = RankFailures(self.run_dir, self.world)
        self._host_watch = HostWatch(lambda free: self._cut_off(self.memory.host_runs_out(free)))
        self._host_watch.__enter__()
        try:
            stop_signals.deliver()
            faults.point("run.begin")
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the watches; report `error` if there is one.

        Raises:
            RunFailed: in place of `error` if it is the consequence of something that can be told.
        """
        self._host_watch.__exit__()
        try:
            self.stop.close(failed=error is not None and not isinstance(error, Preempted))
            if error is None:
                return
            reason = self._failures.explain(self.memory.explain(error))
            if self._failures.speaks():
                result = self._write_failure(reason)
                self.callbacks.finish(result)
                self._failures.say(reason)
            if reason is not error:
                raise reason from None
        finally:
            nvme.clear(nvme.run_folder(self.cfg.zero.nvme_path, self.run_dir), self.world)
            self._lock.release()

    @contextmanager
    def phase(self, name: str, shown: bool = True) -> Iterator[Phase | None]:
        """Name what the run does now, on the display and in an out-of-memory error.

        Yields the display's phase, which shows progress; None on ranks without a display.
        """
        before, self.memory.activity = self.memory.activity, name
        with self.display.phase(name) if self.display and shown else nullcontext() as phase:
            yield phase
        self.memory.activity = before  # not after an error, which is explained by what was going on

    @contextmanager
    def watched(self, name: str, shown: bool = True) -> Iterator[None]:
        """A phase in which `beat` must be called every train.hang_timeout seconds."""
        timeout, rank = self.cfg.train.hang_timeout, self.world.rank
        with (
            self.phase(name, shown),
            HangWatch(
                timeout, self.run_dir, rank, lambda text: self._cut_off(RunFailed(text))
            ) as self._hang_watch,
        ):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """The phase of training: signals only set a flag, which the trainer reads between steps."""
        if self.world.device.type == "cpu":
            process.release()  # memory freed by the rehearsal does not belong to the run
        self.start_host_bytes = int(self.world.maximum(machine.host_bytes()))
        with self.stop.flagged(), self.watched("training", shown=False):
            yield

    def beat(self) -> None:
        """Report progress to the hang watch."""
        if self._hang_watch:
            self._hang_watch.beat()

    def _cut_off(self, error: RunFailed) -> None:
        """Write the result and the last message of a rank that a watch thread is about to end."""
        self._failures.write(error.render())
        if self._failures.speaks():
            self._write_failure(error)
            print(f"error: {error.render()}", file=sys.stderr, flush=True)
            with suppress(Exception):  # the page is best effort and must not hide the error
                self.rebuild_page()

    def _write_failure(self, error: BaseException) -> dict:
        plan = self.memory.plan
        stage = plan.chosen.option.stage if plan else None
        result = failed_result(self.run_dir, error, self.world, self.start_host_bytes, stage)
        metrics_log.write_result(self.run_dir, result)
        return result
