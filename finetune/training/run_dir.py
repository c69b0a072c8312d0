"""The files of a run directory that are not metrics or checkpoints: config.yaml, task.json, result.json, and its lock."""

from __future__ import annotations

import fcntl
import glob
import os
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.config import Config, plain_config, to_yaml
from finetune.dist import World
from finetune.errors import Preempted, RunFailed, UserError
from finetune.files import write_json
from finetune.planning import machine
from finetune.reporting import metrics_log
from finetune.reporting.redact import redact_text
from finetune.training.trainer import Result


def make_run_dir(cfg: Config, world: World) -> Path:
    """The one run directory of all ranks, named and made by rank 0; written into `cfg`.

    Raises:
        UserError: it cannot be made.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (
        Path(world.broadcast(cfg.run_dir or f"runs/{cfg.name}/{stamp}")).expanduser().absolute()
    )
    cfg.run_dir = str(folder)

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot be made: {error.strerror}", str(folder), "Try run_dir=DIR."
            ) from None

    world.on_main(make)
    return folder


def save_config(cfg: Config, about: dict[str, Any], texts: list[list[int]], run_dir: Path) -> None:
    """config.yaml, in task.json what the head learned from the data, in reference.json texts to compare exports on."""
    write_json(run_dir / "reference.json", texts)
    write_json(run_dir / "task.json", about)
    values = plain_config(cfg)
    for section, key in (
        ("model", "path"),
        ("model", "tokenizer"),
        ("data", "train"),
        ("data", "eval"),
    ):
        values[section][key] = wherever(values[section][key])
    (run_dir / "config.yaml").write_text(to_yaml(values), encoding="utf-8")


def wherever(path: str | None) -> str | None:
    """A local path, or pattern, as it is from any working directory; hub ids and what ships with the project stay."""
    if not path or path.startswith("asset:"):
        return path
    local = os.path.abspath(os.path.expanduser(path))
    return local if os.path.exists(local) or glob.glob(local, recursive=True) else path


def final_result(
    result: Result, world: World, optimizer_bytes: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """The object of result.json. Collective: peaks are those of the largest rank."""
    ranks = world.gather((machine.peak_host_bytes(), machine.peak_gpu_bytes(), optimizer_bytes))
    return {
        "status": result.status,
        "step": result.step,
        "loss": result.loss,
        "eval": result.eval,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_host_bytes": max(host for host, _, _ in ranks),
        "peak_gpu_bytes": max(gpu for _, gpu, _ in ranks),
        "peak_host_bytes_per_rank": [host for host, _, _ in ranks],
        "peak_gpu_bytes_per_rank": [gpu for _, gpu, _ in ranks],
        "world_size": world.size,
        "error": None,
        "optimizer_bytes_per_rank": [held for _, _, held in ranks],
        **extra,
    }


def with_logged(result: Result, run_dir: Path) -> Result:
    """A resumed run that had nothing left to train has the figures that its lines tell."""
    if result.loss is not None or result.step == 0:
        return result
    last, evaluated = metrics_log.newest(run_dir)
    return replace(result, loss=last.get("loss"), eval=result.eval or evaluated)


def failed_result(
    run_dir: Path, error: BaseException, world: World, start_host: int, zero_stage: int | None
) -> dict[str, Any]:
    """result.json of a run that ended in an error: what its own lines still tell."""
    last, evaluated = metrics_log.newest(run_dir)
    seconds = metrics_log.training_seconds(run_dir)
    stopped = isinstance(error, Preempted)
    text = (
        None
        if stopped
        else error.render()
        if isinstance(error, UserError)
        else f"{type(error).__name__}: {error}"
    )
    text = redact_text(text) if text else None
    return {
        "status": "preempted" if stopped else "failed",
        "stopped_by": error.reason if stopped else None,
        "step": last.get("step", 0),
        "loss": last.get("loss"),
        "eval": evaluated,
        "tokens": last.get("tokens", 0),
        "seconds": seconds,
        "tokens_per_second": last.get("tokens", 0) / seconds if seconds else 0.0,
        "peak_host_bytes": machine.peak_host_bytes(),
        "start_host_bytes": start_host,
        "peak_gpu_bytes": machine.peak_gpu_bytes(),
        "world_size": world.size,
        "zero_stage": zero_stage,
        "export": None,
        "error": text,
    }


# One run at a time in a run directory: two would write over each other's checkpoints and metrics.
#
# The lock goes with the process that holds it, however it ends. A run that was just stopped may still be saving, so a
# newcomer waits for it before it refuses.
PATIENCE_SECONDS = 60.0


class RunLock:
    """Taken by rank 0 for as long as the run lasts."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / ".lock"
        self._descriptor: int | None = None

    def take(self, say=None) -> None:
        """Wait for the lock, a minute at most.

        Raises:
            RunFailed: another process goes on holding it.
            UserError: the directory cannot be written.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror}", str(self.path.parent), "Try run_dir=DIR."
            ) from None
        deadline = time.monotonic() + PATIENCE_SECONDS
        told = False
        while not _locked(descriptor):
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise RunFailed(
                    f"another run is at work here: {holder or 'unknown process'}",
                    str(self.path.parent),
                    "Stop it (touch STOP in that directory), or choose another run_dir.",
                )
            if say and not told:
                say(f"waiting for {holder or 'another process'} to leave this run directory")
                told = True
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nothing to go by
    return True
