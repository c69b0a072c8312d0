"""One job: its run directory, its process group, and how it ended.

    SWEEP/<n>/           the run directory of job n
        job.json         what the job is and how it ended, as the parent knows it
        output.log       what its processes printed

The group is a session of its own, so that Ctrl-C reaches the parent alone, which then asks the ranks to save. If the
parent is killed the kernel tells the launcher, the ranks notice that it died, and save too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from finetune.errors import EXIT_DONE, EXIT_PREEMPTED, setting
from finetune.files import read_object, write_json
from finetune.process import LAUNCHER_VARIABLES
from finetune.reporting import metrics_log
from finetune.sweep.pool import Place

WAITING, RUNNING, DONE, FAILED, PRUNED, STOPPED = (
    "waiting",
    "running",
    "done",
    "failed",
    "pruned",
    "stopped",
)
OUTPUT, RECORD = "output.log", "job.json"
PR_SET_PDEATHSIG = 1
SAVING_SECONDS = 120.0
"""Longest wait for processes of an earlier attempt that still save."""


@dataclass
class Job:
    number: int
    run_dir: Path
    words: list[str]
    """k=v words, without run_dir."""
    chosen: dict[str, str]
    """The varied keys and their values."""
    status: str = WAITING
    error: str | None = None
    seconds: float = 0.0
    place: int = 0
    process: subprocess.Popen | None = None
    pruning: bool = False
    started: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl as far as it is read."""
    _seen: tuple[int, int] = (0, 0)

    def start(self, script: Path, place: Place, extra: list[str]) -> None:
        """Start the process group; what an earlier attempt left in the run directory is continued."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "STOP").unlink(missing_ok=True)
        self.status, self.error, self.started = RUNNING, None, time.time()
        self.save()
        dropped = {*LAUNCHER_VARIABLES, *(["CUDA_VISIBLE_DEVICES"] if place.explicit else [])}
        parent = os.getpid()

        def prepare() -> None:
            # In the child: end with the parent, and stay on this job's cores.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)
            if place.cores:
                os.sched_setaffinity(0, place.cores)

        run_dir = setting("run_dir", self.run_dir)
        with open(self.run_dir / OUTPUT, "ab") as output:
            self.process = subprocess.Popen(
                [*place.command(), str(script), *self.words, *extra, run_dir],
                env={key: value for key, value in os.environ.items() if key not in dropped},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=prepare,
            )

    def poll(self) -> bool:
        """Look at a running job; True when it has ended, with `status` and `error` set."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        result = self.result()
        if code == EXIT_DONE and result.get("status") == DONE:
            self.status = DONE
        elif self.pruning:
            self.status = PRUNED
        elif code in (EXIT_PREEMPTED, -signal.SIGTERM):
            self.status = STOPPED
        else:
            self.status = FAILED
            # The run's own words, unless they are an earlier attempt's; else the last line it printed.
            path = self.run_dir / metrics_log.RESULT
            fresh = path.exists() and path.stat().st_mtime >= self.started - 1
            error = result.get("error") if fresh else None
            self.error = str(error or _last_error(self.run_dir / OUTPUT) or f"exit code {code}")
        self.seconds += time.time() - self.started
        self.process = None
        self.read_metrics()
        self.save()
        return True

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl that are new since the last call."""
        path, before = self.run_dir / metrics_log.METRICS, len(self.records)
        try:
            stat = path.stat()
        except OSError:
            return []
        if (stat.st_mtime_ns, stat.st_size) != self._seen:
            self._seen = (stat.st_mtime_ns, stat.st_size)
            records = metrics_log.read(path)
            # A resumed attempt drops the steps that it will repeat.
            before = min(before, len(records))
            self.records = records
        return self.records[before:]

    def stop(self) -> None:
        """Ask the ranks to save and end, or the launcher to go where there are no ranks yet."""
        if self.process is None or self.process.poll() is not None:
            return
        try:
            processes = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            processes = []
        ranks = [
            process
            for process in processes
            if any(word.startswith("--local_rank") for word in _cmdline(process))
        ]
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        if not ranks:
            self.kill(signal.SIGTERM)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the whole group at once."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def result(self) -> dict[str, Any]:
        return read_object(self.run_dir / metrics_log.RESULT)

    def last(self) -> dict[str, Any]:
        """Return the newest training record that was read; {} if there is none."""
        return next((r for r in reversed(self.records) if r.get("kind") == "train"), {})

    def save(self) -> None:
        write_json(
            self.run_dir / RECORD,
            {
                "job": self.number,
                "overrides": self.words,
                "chosen": self.chosen,
                "status": self.status,
                "error": self.error,
                "seconds": self.seconds,
            },
        )

    def load(self) -> bool:
        """Take over the record of an earlier attempt; False if there is none."""
        record = read_object(self.run_dir / RECORD)
        if not record:
            return False
        self.status, self.error = record.get("status", WAITING), record.get("error")
        self.seconds = record.get("seconds") or 0.0
        if self.status == RUNNING:
            # The parent was killed: the job may have ended by itself since.
            self.status = DONE if self.result().get("status") == DONE else STOPPED
        self.read_metrics()
        return True


def wait_for_earlier(job: Job, say: Callable[[str], None]) -> None:
    """Wait while processes of an earlier attempt still save into this run directory."""
    deadline, said = time.monotonic() + SAVING_SECONDS, False
    run_dir = setting("run_dir", job.run_dir)
    while time.monotonic() < deadline and any(
        run_dir in _cmdline(process) for process in psutil.process_iter()
    ):
        if not said:
            say(f"[{job.number}] an earlier attempt still saves; waiting")
            said = True
        time.sleep(1)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _last_error(log: Path) -> str:
    """The program's last error message in what a job printed; without one its last line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return next(
            (line.strip() for line in reversed(lines) if line.strip() and "[INFO]" not in line), ""
        )
    message = [lines[starts[-1]].removeprefix("error: ")]
    for line in lines[starts[-1] + 1 :]:
        if not line.startswith("  "):
            break
        message.append(line)
    return "\n".join(message)
