"""Checkpoints that are complete or absent, and resume at any number of ranks and any ZeRO stage.

save: each rank writes its fragments to .tmp-step-N -> every rank hashes its own file -> barrier -> manifest ->
      fsync -> rename to step-N -> retention.
load: newest step whose manifest verifies -> masters and moments by parameter name and element range -> weights.

    checkpoints/step-00000010/
      manifest.json                     every file with size and hash
      state.json                        step, tokens, best metric, what the run was
      optim-00000-of-00002.safetensors  fp32 master, exp_avg, exp_avg_sq of the ranges rank 0 owned

A fragment is named by parameter and first element ("transformer.wte.weight|0|master"), so another number of ranks or
another stage only cuts the same numbers elsewhere. Nothing is pickled. Frozen weights are not written.
Random state is not stored: dropout and data order are functions of the seed and the position.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune import partitions
from finetune.dist import World
from finetune.errors import RunFailed, UserError, gib

MANIFEST, STATE = "manifest.json", "state.json"
STEP_DIR = re.compile(r"^step-(\d{8})$")
FORMAT = 1
HASH_CHUNK = 1 << 24


@dataclass
class TrainState:
    """Where a run stands; the data position is step x global_batch."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Real tokens seen."""
    seconds: float = 0.0
    """Training time so far."""
    updates: int = 0
    """Steps that changed the weights (non-finite ones are skipped)."""
    best: float | None = None
    """Best evaluation metric so far."""
    best_step: int = 0
    """Step of the best metric."""
    without_gain: int = 0
    """Evaluations since the best one."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """What trackers keep, by class name."""


def file_hash(path: Path) -> str:
    """blake2b-128 of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as f:
        while chunk := f.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Atomic: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        folder: run_dir/checkpoints.
        keep: newest ones kept, at least 2.
        identity: what must not change between save and resume, e.g. {"data": hash, "seed": 0}.
        may_change: names in `identity` that the user allows to differ.
    """

    def __init__(self, folder: Path, keep: int, world: World, identity: dict[str, Any], may_change: list[str]):
        self.folder, self.keep, self.world = folder, keep, world
        self.identity, self.may_change = identity, may_change

    def save(self, engine, state: TrainState) -> Path:
        """Write step-N; collective. On any failure the staging folder is gone and older checkpoints are untouched.

        Raises:
            RunFailed: the disk is full or not writable; says how much is missing.
        """
        final = self.folder / f"step-{state.step:08d}"
        stage = self.folder / f".tmp-step-{state.step:08d}"
        self.world.on_main(lambda: _fresh(stage))
        error = None
        entry: tuple[str, dict] | None = None
        try:
            entry = self._write_rank(engine, stage)
        except (OSError, RuntimeError) as problem:
            error = str(problem)
        results = self.world.gather((entry, error))
        self.world.on_main(lambda: self._finish(stage, final, state, engine, results))
        return final

    def _write_rank(self, engine, stage: Path) -> tuple[str, dict]:
        partitions.ensure_states(engine)
        mine = self.world.main or not partitions.replicated(engine)
        tensors = {
            f"{piece.name}|{piece.start}|{kind}": tensor.detach().to("cpu").contiguous()
            for piece in (partitions.fragments(engine) if mine else ())
            for kind, tensor in piece.tensors().items()
        }
        name = f"optim-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        free = shutil.disk_usage(stage).free
        if needed > free:
            raise OSError(f"rank {self.world.rank} has {gib(needed)} to write, the disk has {gib(free)} free")
        save_file(tensors, stage / name)
        _fsync(stage / name)
        return name, _entry(stage / name)

    def _finish(self, stage: Path, final: Path, state: TrainState, engine, results: list) -> None:
        errors = [error for _, error in results if error]
        if errors:
            shutil.rmtree(stage, ignore_errors=True)
            raise RunFailed(f"the checkpoint of step {state.step} could not be written: {errors[0]}", str(self.folder),
                            "Earlier checkpoints are untouched. Free some space and run the same command again.")
        try:
            steps = partitions.adam_step(engine)
            write_json(stage / STATE, {"format": FORMAT, "world_size": self.world.size, "adam_step": steps,
                                       "loss_scale": _loss_scale(engine), "identity": self.identity,
                                       "state": asdict(state)})
            files = dict(entry for entry, _ in results)
            files[STATE] = _entry(stage / STATE)
            write_json(stage / MANIFEST, {"format": FORMAT, "step": state.step, "files": files})
            _fsync(stage)
            if final.exists():
                shutil.rmtree(final)
            os.replace(stage, final)
            _fsync(self.folder)
        except OSError as error:
            shutil.rmtree(stage, ignore_errors=True)
            raise RunFailed(f"the checkpoint of step {state.step} could not be written: {error}", str(self.folder),
                            "Earlier checkpoints are untouched. Free some space and run the same command again.") from None
        self._retain()

    def _retain(self) -> None:
        for path in step_folders(self.folder)[: -max(2, self.keep)]:
            shutil.rmtree(path, ignore_errors=True)

    def clean(self) -> None:
        """Remove what an interrupted save left behind; rank 0, before training."""
        if self.folder.is_dir():
            for path in self.folder.glob(".tmp-step-*"):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside(self) -> None:
        """For resume=never: older checkpoints must not be taken for this run's; they are kept under another name."""
        if step_folders(self.folder):
            os.replace(self.folder, self.folder.with_name(f"{self.folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))

    def restore(self, engine, folder: Path) -> TrainState:
        """Load one verified checkpoint into the engine; any world size, any stage."""
        saved = read_state(folder)
        self._check_identity(saved, folder)
        source = _Saved(folder)
        partitions.ensure_states(engine)
        for piece in partitions.fragments(engine):
            for kind, tensor in piece.tensors().items():
                tensor.copy_(source.read(piece.name, kind, piece.start, piece.numel))
        partitions.set_adam_step(engine, saved["adam_step"])
        partitions.refresh_weights(engine, lambda name, start, n: source.read(name, "master", start, n))
        _set_loss_scale(engine, saved["loss_scale"])
        self.world.barrier()
        return TrainState(**saved["state"])

    def _check_identity(self, saved: dict, folder: Path) -> None:
        before = saved["identity"]
        changed = [f"{key}: was {before.get(key)}, is {now}" for key, now in self.identity.items()
                   if before.get(key) != now and key not in self.may_change]
        if changed:
            names = ",".join(line.split(":")[0] for line in changed)
            raise UserError("this run is not the one that was saved: " + "; ".join(changed), str(folder),
                            f"Undo the change, allow it with 'resume_changed=[{names}]', or start anew with "
                            "resume=never or another run_dir.")


def _fresh(stage: Path) -> None:
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)


def _entry(path: Path) -> dict:
    return {"size": path.stat().st_size, "hash": file_hash(path)}


def _loss_scale(engine) -> float | None:
    scaler = getattr(engine.optimizer, "cur_scale", None) or getattr(engine.optimizer, "loss_scale", None)
    return float(scaler) if engine.fp16_enabled() and scaler else None


def _set_loss_scale(engine, value: float | None) -> None:
    if value is None:
        return
    for owner in (engine.optimizer, getattr(engine.optimizer, "loss_scaler", None)):
        if owner is not None and hasattr(owner, "cur_scale"):
            owner.cur_scale = value


def step_folders(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_DIR.match(path.name) and path.is_dir())


def verify(folder: Path) -> str | None:
    """Why a checkpoint is not valid, naming the file; None when every byte is what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return f"{folder / MANIFEST}: missing"
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        return f"{folder / MANIFEST}: not readable"
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name:
            return f"{folder / MANIFEST}: names '{name}', outside its directory"
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry["size"]:
            return f"{path}: {path.stat().st_size} bytes, {entry['size']} were written"
        if file_hash(path) != entry["hash"]:
            return f"{path}: its bytes are not those that were written"
    return None


def newest_valid(folder: Path, warn) -> Path | None:
    """Newest checkpoint that verifies; `warn(text)` names each one that does not."""
    for path in reversed(step_folders(folder)):
        reason = verify(path)
        if reason is None:
            return path
        warn(f"skipping a damaged checkpoint: {reason}")
    return None


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def find_resume(resume: str, run_dir: Path, warn) -> Path | None:
    """Checkpoint to continue from, or None for a fresh start.

    Raises:
        UserError: resuming was asked for (a directory), or this run has only damaged checkpoints.
    """
    if resume == "never":
        return None
    own = run_dir / "checkpoints"
    found = newest_valid(own, warn)
    if found is not None:
        return found
    if step_folders(own):
        raise UserError("none of the checkpoints here is valid", str(own),
                        "See the reasons above. Restore one from a backup, or start anew with resume=never.")
    if resume == "auto":
        return None
    return _named_checkpoint(Path(resume).expanduser(), warn)


def _named_checkpoint(path: Path, warn) -> Path:
    if STEP_DIR.match(path.name) and path.is_dir():
        reason = verify(path)
        if reason:
            raise UserError(f"the checkpoint is damaged: {reason}", "resume", "Name another step, or its run directory.")
        return path
    found = newest_valid(path / "checkpoints", warn) if path.is_dir() else None
    if found is None:
        raise UserError(f"there is no valid checkpoint in {path}", "resume",
                        "Give a run directory or one of its checkpoints/step-N, or resume=never.")
    return found


class _Saved:
    """Element ranges of a checkpoint, whoever wrote them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in sorted(folder.glob("optim-*.safetensors")):
            handle = safe_open(str(file), framework="pt")
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, start, kind = key.rsplit("|", 2)
                size = handle.get_slice(key).get_shape()[0]
                self.pieces[name, kind].append((int(start), int(start) + size, handle, key))

    def names(self) -> list[str]:
        return sorted({name for name, _ in self.pieces})

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) as fp32.

        Raises:
            UserError: the checkpoint has no such parameter, or not all of the range.
        """
        out = torch.empty(numel, dtype=torch.float32)
        covered = 0
        for low, high, handle, key in self.pieces.get((name, kind), ()):
            a, b = max(low, start), min(high, start + numel)
            if a < b:
                out[a - start : b - start] = handle.get_slice(key)[a - low : b - low]
                covered += b - a
        if covered != numel:
            raise UserError(f"the checkpoint holds {covered} of the {numel} elements of {name}", str(self.folder),
                            "Was it saved with another adapter or model? Start anew with resume=never.")
        return out


def saved_masters(folder: Path) -> _Saved:
    """The trained weights of a checkpoint in fp32, by name and range; for exporting without an engine."""
    return _Saved(folder)
