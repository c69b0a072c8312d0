"""Files of a run directory besides metrics and checkpoints, and the directory's lock."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.checkpointing.checkpoints import Checkpoints
from finetune.checkpointing.format import entry_of
from finetune.checkpointing.train_state import TrainState
from finetune.config import Config, Offload, plain_config, to_yaml
from finetune.dist import World
from finetune.errors import Preempted, RunFailed, UserError
from finetune.files import read_object, write_atomic, write_json
from finetune.gptj.adapter_init import FILE as ADAPTER_INIT
from finetune.gptj.adapter_init import read_init, starts_from_base, write_init
from finetune.gptj.load import local_folder, weights_identity
from finetune.planning import machine
from finetune.reporting import metrics_log
from finetune.reporting.redact import redact_text
from finetune.sharding.deepspeed_config import Sharding
from finetune.training.inputs import Inputs
from finetune.training.trainer import Result


def make_run_dir(run_dir: str | None, name: str, world: World) -> Path:
    """Return the one run directory of all ranks, named and made by rank 0.

    Args:
        run_dir: as configured; None: a folder for this recipe and second.

    Raises:
        UserError: it cannot be made.
    """

    def make() -> Path:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path(run_dir or f"runs/{name}/{stamp}").expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot be made: {error.strerror}", str(folder), "Try run_dir=DIR."
            ) from None
        return folder

    return world.on_main(make)


def refuse_finished(run_dir: Path) -> None:
    """Check that this run is not done already, with nothing kept to continue from.

    Raises:
        UserError: it is, and starting it would silently train anew.
    """
    result = read_object(run_dir / metrics_log.RESULT)
    if result.get("status") == "done" and result.get("checkpoint") == "none":
        raise UserError(
            "this run is done, and kept no checkpoint (checkpoint.final=none)",
            str(run_dir),
            "Train anew here with resume=never, or choose another run_dir.",
        )


def save_config(cfg: Config, about: dict[str, Any], texts: list[list[int]], run_dir: Path) -> None:
    """Write the files that describe a run.

    config.yaml; in task.json, what the head learned from the data; in reference.json, token ids on
    which exports are compared with the trained model.
    """
    write_json(run_dir / "reference.json", texts)
    write_json(run_dir / "task.json", about)
    values = plain_config(cfg)
    for section, key in (
        ("model", "path"),
        ("model", "tokenizer"),
        ("data", "train"),
        ("data", "eval"),
        ("adapter", "start"),
    ):
        if key in values[section]:
            values[section][key] = wherever(values[section][key])
    (run_dir / "config.yaml").write_text(to_yaml(values), encoding="utf-8")


def wherever(path: Any) -> Any:
    """Make a local path or pattern absolute, also those in lists and dicts; leave hub ids and assets as they are."""
    if isinstance(path, list):
        return [wherever(item) for item in path]
    if isinstance(path, dict):  # of a source, only its path names a file
        return {k: wherever(v) if k == "path" or "path" not in path else v for k, v in path.items()}
    if not isinstance(path, str) or not path or path.startswith("asset:"):
        return path
    local = os.path.abspath(os.path.expanduser(path))
    return local if os.path.exists(local) or glob.glob(local, recursive=True) else path


def keep_adapter_init(
    cfg: Config,
    resume_from: Path | None,
    world: World,
    run_dir: Path,
    phase: Callable[[str], AbstractContextManager],
) -> None:
    """Keep what an adapter with `adapter.init` begins from in the run directory. Collective.

    A new run computes it; one that continues has it, or takes it over from the run it continues.

    Args:
        phase: context, by name, that shows the user of rank 0 that something takes long.
    """
    if not starts_from_base(cfg.adapter):
        return
    file = run_dir / ADAPTER_INIT
    if resume_from is None:
        with phase("decomposing the weights that the adapter begins from") as shown:

            def progress(done: int, total: int) -> None:
                if shown:
                    shown.total = total
                    shown.update(done)

            world.on_main(lambda: write_init(cfg, file, world.device, progress))
    elif (begun := resume_from.parent.parent).resolve() != run_dir.resolve():

        def take_over() -> None:
            read_init(cfg, begun)
            write_atomic(file, (begun / ADAPTER_INIT).read_bytes())

        world.on_main(take_over)


def open_checkpoints(
    cfg: Config, data_fingerprint: str, sharding: Sharding, world: World, run_dir: Path
) -> Checkpoints:
    """Open the run's checkpoints; clean up incomplete ones, or set all aside with resume=never."""
    background = cfg.checkpoint.background
    if background == "auto":
        # Optimizer states on GPUs are copied to the host anyway, and can be written from the copy.
        on_gpu = world.device.type == "cuda"
        background = on_gpu and sharding.offload_optimizer is Offload.none
    weights = world.on_main(lambda: weights_identity(local_folder(cfg.model)))
    plain, init = plain_config(cfg), run_dir / ADAPTER_INIT
    must_not_change = {
        "data": data_fingerprint,
        "seed": cfg.seed,
        "global_batch": cfg.train.global_batch,
        "packing": cfg.train.packing,
        "max_length": cfg.task.max_length,
        "model": f"{cfg.model.init.value} {cfg.model.path}",
        "dtype": cfg.model.dtype.value,
        "quantize": [cfg.model.quantize.value, cfg.model.quantize_double],
        "weights": weights,
        "class_weights": str(getattr(cfg.task, "class_weights", None)),
        "preference": [
            getattr(cfg.task, name, None) for name in ("loss", "beta", "label_smoothing", "gamma")
        ],
        "adapter": plain["adapter"],
        "adapter_init": world.on_main(lambda: entry_of(init)["hash"])
        if starts_from_base(cfg.adapter)
        else None,
        "optim": plain["optim"],
        "dropout": [cfg.model.embd_pdrop, cfg.model.attn_pdrop, cfg.model.resid_pdrop],
    }
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        cfg.checkpoint.keep,
        world,
        must_not_change,
        cfg.resume_changed,
        bool(background),
        Path(cfg.resume).name,
        cfg.checkpoint.best,
    )
    world.on_main(checkpoints.set_aside if cfg.resume == "never" else checkpoints.clean)
    return checkpoints


def final_result(
    result: Result,
    exported: Result | None,
    state: TrainState,
    inputs: Inputs,
    world: World,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Return the object of result.json. Collective: peaks are those of the largest rank.

    Args:
        exported: the result as it was at the exported step; None if nothing was exported.
        facts: further keys.
    """
    ranks = world.gather((machine.peak_host_bytes(), machine.peak_gpu_bytes()))
    host_peaks, gpu_peaks = (list(values) for values in zip(*ranks, strict=True))
    return {
        **asdict(result),
        "peak_host_bytes": max(host_peaks),
        "peak_gpu_bytes": max(gpu_peaks),
        "peak_host_bytes_per_rank": host_peaks,
        "peak_gpu_bytes_per_rank": gpu_peaks,
        "world_size": world.size,
        "error": None,
        "export": "export" if exported else None,
        "export_step": exported.step if exported else None,
        "best": state.best,
        "best_step": state.best_step or None,
        "skipped_steps": state.skipped,
        "bad_rows": inputs.train.stats["bad_rows"],
        "bad_eval_rows": sum(
            part.store.stats["bad_rows"]
            for part in inputs.eval.values()
            if part.store is not inputs.train
        ),
        "data_notes": inputs.notes,
        **facts,
    }


def with_logged(result: Result, run_dir: Path) -> Result:
    """Return the result of a resumed run that had nothing left to train with its logged figures."""
    if result.loss is not None or result.step == 0:
        return result
    last, evaluated = metrics_log.newest(run_dir)
    return replace(result, loss=last.get("loss"), eval=result.eval or evaluated)


def failed_result(
    run_dir: Path, error: BaseException, world: World, start_host: int, zero_stage: int | None
) -> dict[str, Any]:
    """Return the object of result.json for a run that ended in an error, from its logged lines."""
    last, evaluated = metrics_log.newest(run_dir)
    seconds = metrics_log.training_seconds(run_dir)
    stopped = isinstance(error, Preempted)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        text = error.render()
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
        "error": None if stopped else redact_text(text),
    }


PATIENCE_SECONDS = 60.0
"""A run that was just stopped may still be saving: the next one waits before it refuses."""


class RunLock:
    """Lock of a run directory, held by rank 0 for as long as the run lasts.

    Two runs at a time would overwrite each other's checkpoints and metrics. The lock ends with the
    process that holds it, however that ends.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.holder = run_dir, run_dir / ".lock.holder"
        self.lock = FileLock(run_dir / ".lock")

    def take(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Wait for the lock, a minute at most.

        Raises:
            RunFailed: another process goes on holding it.
            UserError: the directory cannot be written.
        """
        try:
            try:
                self.lock.acquire(timeout=0)
            except Timeout:
                say(f"waiting for {self._held_by()} to leave this run directory")
                self.lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=0.2)
            self.holder.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        except Timeout:
            raise RunFailed(
                f"another run is at work here: {self._held_by()}",
                str(self.run_dir),
                "Stop it (touch STOP in that directory), or choose another run_dir.",
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror}", str(self.run_dir), "Try run_dir=DIR."
            ) from None

    def _held_by(self) -> str:
        try:
            return self.holder.read_text()
        except OSError:
            return "another process"

    def release(self) -> None:
        self.lock.release()
