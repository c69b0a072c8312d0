"""Checkpoints that are written atomically and resume with any number of ranks and any ZeRO stage.

save: each rank writes its fragments to .tmp-step-N and hashes them as it writes -> gather ->
      manifest -> fsync -> rename to step-N -> retention. In the background: the same in a thread,
      from a copy, on a process group of its own.
load: newest step whose manifest verifies -> masters and moments by parameter name and element range
      -> weights.

A fragment is named by parameter and first element ("transformer.wte.weight|0|master"), so another
number of ranks or another stage only cuts the same numbers at other places. Frozen weights are not
written. Random state is not stored: dropout and data order are functions of the seed and the
position.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from finetune.checkpointing import faults
from finetune.checkpointing.format import (
    EVALUATED,
    FORMAT,
    STATE,
    Entry,
    Pieces,
    Saved,
    entry_of,
    find_resume,
    folder_bytes,
    free_bytes,
    read_state,
    saved_masters,
    step_folder,
    step_folders,
    step_of,
    verify,
    write_manifest,
    write_tensors,
)
from finetune.checkpointing.train_state import TrainState
from finetune.dist import World
from finetune.errors import RunFailed, UserError, command, gib
from finetune.files import fsync, write_atomic
from finetune.sharding import partitions

__all__ = ["Checkpoints", "TrainState", "find_resume", "read_state", "saved_masters"]

FEWEST_KEPT = 2
KINDS = ("master", *partitions.MOMENTS)
MARKS = ("best", "best_step", "without_gain", "owes_evaluation", "callbacks")
"""What an evaluation changes in the state."""
UNTOUCHED = "Earlier checkpoints are untouched. Free some space and run the same command again."


@dataclass
class _Save:
    """A checkpoint that is being written."""

    step: int
    pieces: Pieces
    """This rank's tensors."""
    about: dict[str, Any]
    """state.json."""
    needed: int
    """Bytes of all ranks."""


class Checkpoints:
    """The checkpoints of one run directory. Collective: every rank creates one.

    Args:
        folder: run_dir/checkpoints.
        keep: number of newest checkpoints to keep, at least 2.
        identity: settings that must not change between save and resume, e.g. {"data": hash,
            "seed": 0}.
        may_change: names in `identity` that the user allows to differ.
        background: copy the tensors to the host and write them while training continues.
        origin: this run's checkpoint that the user chose to continue from; newer ones that stem
            from it take precedence.
        best: whether to keep the checkpoint of the best evaluation too, whatever its age.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World,
        identity: dict[str, Any],
        may_change: list[str],
        background: bool = False,
        origin: str | None = None,
        best: bool = False,
    ):
        self.folder, self.keep, self.world = folder, max(FEWEST_KEPT, keep), world
        self.identity, self.may_change, self.background, self.origin = (
            identity,
            may_change,
            background,
            origin,
        )
        self.best = best
        self._sound: set[int] = set()
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[tuple[int, str]] = []
        self._marks: dict[int, dict[str, Any]] = {}
        self._marking = Lock()
        # Two threads must not use one group at a time.
        self._writers = world.split() if background else world

    # ------------------------------------------------------------------ save

    def save(self, engine, state: TrainState) -> None:
        """Write step-N. Collective.

        On any failure the staging folder is removed and older checkpoints are untouched. In the
        background the call returns once the tensors are copied; failures are raised by the next
        `save` or `wait`.

        Raises:
            RunFailed: the disk is full or not writable; the message says how much is missing.
        """
        self.wait()
        partitions.ensure_states(engine)
        pieces = self._pieces(engine)
        needed = int(self.world.sum([pieces.bytes])[0])
        self.world.on_main(lambda: self._require(needed, f"the checkpoint of step {state.step}"))
        about = {
            "format": FORMAT,
            "world_size": self.world.size,
            "adam_step": partitions.adam_step(engine),
            "loss_scale": _loss_scale(engine),
            "identity": self.identity,
            "origin": self.origin,
            "state": asdict(state),
        }
        save = _Save(state.step, pieces, about, needed)
        if not self.background:
            self._write(save, self.world)
            return
        save.pieces = pieces.copied()
        self._thread = Thread(
            target=self._write_behind, args=(save,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def mark_evaluated(self, state: TrainState) -> None:
        """Update the step's checkpoint, saved before its evaluation, with what that changed."""
        if self.world.main:
            self._marks = {state.step: {name: getattr(state, name) for name in MARKS}}
            self._write_marks(state.step)

    def wait(self) -> None:
        """Block until nothing is being written; raise the error of a failed background save."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    @property
    def broken(self) -> bool:
        """Tell whether a background save failed on this rank; `wait` raises its error."""
        return self._error is not None

    def finished(self) -> list[tuple[int, str]]:
        """Return (step, path) of the checkpoints completed since the last call."""
        done, self._finished = self._finished, []
        return done

    def _pieces(self, engine) -> Pieces:
        if not self.world.main and partitions.replicated(engine):
            return Pieces.of([])
        sizes = {
            f"{name}|{start}|{kind}": numel
            for name, start, numel in partitions.ranges(engine)
            for kind in KINDS
        }
        return Pieces(
            sizes,
            lambda: (
                (f"{piece.name}|{piece.start}|{kind}", tensor.detach())
                for piece in partitions.fragments(engine)
                for kind, tensor in piece.tensors().items()
            ),
        )

    def _write_behind(self, save: _Save) -> None:
        try:
            self._write(save, self._writers)
        except BaseException as error:
            self._error = error

    def _write(self, save: _Save, world: World) -> None:
        stage = self.folder / f".tmp-step-{save.step:08d}"
        final = step_folder(self.folder, save.step)
        entry, error = None, None
        try:
            faults.point("save.begin")
            world.on_main(lambda: _fresh(stage))
            name = f"optim-{world.rank:05d}-of-{world.size:05d}.safetensors"
            entry = name, write_tensors(stage / name, save.pieces)
            faults.point("save.written")
        except Exception as problem:
            error = f"rank {world.rank}: {problem}"
        results = world.gather((entry, error))
        world.on_main(lambda: self._finish(stage, final, save, results))
        self._finished.append((save.step, str(final)))

    def _finish(
        self,
        stage: Path,
        final: Path,
        save: _Save,
        results: list[tuple[tuple[str, Entry] | None, str | None]],
    ) -> None:
        try:
            errors = [error for _, error in results if error]
            if errors:
                raise OSError(errors[0])
            faults.point("save.gathered")
            write_atomic(stage / STATE, json.dumps(save.about, indent=1))
            faults.point("save.state")
            files = dict(entry for entry, _ in results if entry)
            files[STATE] = entry_of(stage / STATE)
            write_manifest(stage, save.step, files)
            faults.point("save.manifest")
            fsync(stage)
            if final.exists():
                self._discard(final)
            faults.point("save.rename")
            os.replace(stage, final)
            faults.point("save.renamed")
            fsync(self.folder)
            self._write_marks(save.step)
        except OSError as error:
            shutil.rmtree(stage, ignore_errors=True)
            raise self._failed(save, error) from None
        self._sound.add(save.step)
        self._retain(save.step, save.about["state"]["best_step"])

    def _write_marks(self, step: int) -> None:
        """Write the evaluation's marks into the checkpoint of `step` once both exist.

        Called when the marks arrive and when the folder is complete: with a background save either
        may come first. If the disk is too full for the marks, the evaluation remains due.
        """
        marks, folder = self._marks.get(step), step_folder(self.folder, step)
        if marks and folder.is_dir():
            with self._marking, suppress(OSError):
                write_atomic(folder / EVALUATED, json.dumps(marks, indent=1))

    def _failed(self, save: _Save, error: OSError) -> RunFailed:
        free = free_bytes(self.folder)
        missing = f"; {gib(save.needed - free)} more are needed" if save.needed > free else ""
        return RunFailed(
            f"the checkpoint of step {save.step} could not be written: {error}{missing}",
            str(self.folder),
            UNTOUCHED,
        )

    def _require(self, needed: int, what: str) -> None:
        free = free_bytes(self.folder)
        if needed > free:
            raise RunFailed(
                f"{what} needs {gib(needed)} and the disk has {gib(free)} free: {gib(needed - free)} are "
                "missing",
                str(self.folder),
                UNTOUCHED,
            )

    def require_room(self, engine, several: bool) -> None:
        """Check before the first step that the disk has room for all checkpoints kept at once.

        Existing checkpoints are included.

        Raises:
            RunFailed: the disk is too small; the message says how much is missing.
        """
        partitions.ensure_states(engine)
        one = int(self.world.sum([self._pieces(engine).bytes])[0])

        def check() -> None:
            here = step_folders(self.folder)
            count = (
                self.keep + 1 + self.best if several or self.best else min(self.keep, len(here)) + 1
            )
            held = sum(folder_bytes(step) for step in here)
            self._require(
                count * one - held,
                f"keeping {count} checkpoint{'s' * (count > 1)} of {gib(one)} at once",
            )

        self.world.on_main(check)

    def _retain(self, step: int, best: int) -> None:
        """Delete checkpoints older than the newest `keep` that are known to be sound.

        The best one is kept too if `self.best` is set. Nothing is deleted while there are fewer
        than `keep`.
        """
        if len(self._sound) < self.keep:
            return
        kept = sorted(self._sound)[-self.keep :] + [best] * self.best
        for path in step_folders(self.folder):
            if step_of(path) <= step and step_of(path) not in kept:
                self._discard(path)

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint, renaming it first so that a half-deleted one is never visible."""
        doomed = self.folder / f".tmp-old-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        faults.point("save.discard")
        shutil.rmtree(doomed, ignore_errors=True)

    # ------------------------------------------------------------------ start

    def newest(self) -> int:
        """Return the newest sound step in this run's own folder; -1 if there is none. Collective.

        It is the step that this run continues from or saved last.
        """
        return self.world.broadcast(max(self._sound, default=-1))

    def clean(self) -> None:
        """Remove the files that an interrupted save left behind; on rank 0, before training."""
        if self.folder.is_dir():
            for path in self.folder.glob(".tmp-*"):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside(self) -> None:
        """Rename the folder of older checkpoints, so that they are not mistaken for this run's.

        Used with resume=never.
        """
        if step_folders(self.folder):
            stamp = time.strftime("%Y%m%d-%H%M%S")
            os.replace(self.folder, self.folder.with_name(f"{self.folder.name}-before-{stamp}"))

    def restore(self, engine, folder: Path) -> TrainState:
        """Load a verified checkpoint of any world size and stage, and continue from it."""
        self._check_identity(read_state(folder), folder)
        state = self.load(engine, folder)
        self.world.on_main(lambda: self._continue_from(folder))
        return state

    def load(self, engine, folder: Path) -> TrainState:
        """Load weights, moments and loss scale of a verified checkpoint. Collective."""
        saved, source = read_state(folder), Saved(folder)
        partitions.ensure_states(engine)
        for piece in partitions.fragments(engine, write=True):
            for kind, tensor in piece.tensors().items():
                tensor.copy_(source.read(piece.name, kind, piece.start, piece.numel))
        partitions.set_adam_step(engine, saved["adam_step"])
        partitions.refresh_weights(
            engine, lambda name, start, n: source.read(name, "master", start, n)
        )
        _set_loss_scale(engine, saved["loss_scale"])
        known = {f.name for f in fields(TrainState)}
        return TrainState(**{key: value for key, value in saved["state"].items() if key in known})

    def _continue_from(self, folder: Path) -> None:
        """Rename valid checkpoints beyond the chosen one: they would be taken for newer ones."""
        if folder.parent.resolve() != self.folder.resolve():
            return
        self._sound.add(step_of(folder))
        for path in step_folders(self.folder):
            if step_of(path) > step_of(folder) and verify(path) is None:
                os.replace(
                    path, self.folder / f"set-aside-{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"
                )

    def _check_identity(self, saved: dict, folder: Path) -> None:
        before, now = _leaves(saved["identity"]), _leaves(self.identity)
        changed = [
            key
            for key, value in now.items()
            if key in before
            and before[key] != value
            and key not in self.may_change
            and key.split(".")[0] not in self.may_change
        ]
        if changed:
            told = "\n".join(f"  {key}: was {before[key]}, is {now[key]}" for key in changed)
            allow = command([f"resume_changed=[{','.join(changed)}]"])
            raise UserError(
                f"this run is not the one that was saved:\n{told}",
                str(folder),
                f"Undo the change, allow it with {allow}, or start anew with resume=never or another run_dir.",
            )


def _leaves(identity: dict[str, Any]) -> dict[str, Any]:
    """Flatten the identity to one dotted key per setting, so that only differences are reported."""
    leaves = dict[str, Any]()
    for key, value in identity.items():
        section = _section(value)
        if section is None:
            leaves[key] = value
        else:
            leaves |= {f"{key}.{name}": item for name, item in section.items()}
    return leaves


def _section(value: Any) -> dict[str, Any] | None:
    """Return the settings of a section.

    Older checkpoints store a section as text: `OptimConfig(lr=0.01, schedule='cosine')`.
    """
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or not re.fullmatch(r"\w+Config\(.*\)", value, re.DOTALL):
        return None
    call = ast.parse(value, mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords} | {
        "kind": value.partition("Config(")[0].lower()
    }


def _fresh(stage: Path) -> None:
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)


def _loss_scale(engine) -> float | None:
    scaler = getattr(engine.optimizer, "cur_scale", None) or getattr(
        engine.optimizer, "loss_scale", None
    )
    return float(scaler) if engine.fp16_enabled() and scaler else None


def _set_loss_scale(engine, value: float | None) -> None:
    if value is None:
        return
    for owner in (engine.optimizer, getattr(engine.optimizer, "loss_scaler", None)):
        if owner is not None and hasattr(owner, "cur_scale"):
            owner.cur_scale = value
