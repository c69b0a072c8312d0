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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from torch import Tensor

from finetune.checkpointing import faults
from finetune.checkpointing.format import (
    EVALUATED,
    FORMAT,
    STATE,
    Entry,
    Pieces,
    StateReader,
    entry_of,
    folder_bytes,
    read_state,
    step_folder,
    step_folders,
    step_of,
    verify,
    write_manifest,
    write_tensors,
)
from finetune.checkpointing.train_state import TrainState
from finetune.config import FinalCheckpoint
from finetune.dist import World
from finetune.errors import RunFailed, UserError, command, gib, plural
from finetune.files import fsync, write_atomic
from finetune.planning.machine import disk_free_bytes
from finetune.sharding import partitions

FEWEST_KEPT = 2
MARKS = ("best", "best_step", "without_gain", "owes_evaluation", "callbacks")
"""Fields of the state that an evaluation changes."""
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
        self.identity, self.may_change = identity, may_change
        self.background, self.origin, self.best = background, origin, best
        self._sound: set[int] = set()
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[tuple[int, str]] = []
        self._marks: dict[int, dict[str, Any]] = {}
        self._marking = Lock()
        # Two threads must not use one group at a time.
        self._writers = world.split() if background else world

    # ------------------------------------------------------------------ save

    def save(self, engine, state: TrainState, moments: bool = True) -> None:
        """Write step-N, without the optimizer's moments if the run is done. Collective.

        On any failure the staging folder is removed and older checkpoints are untouched. In the
        background the call returns once the tensors are copied; failures are raised by the next
        `save` or `wait`.

        Raises:
            RunFailed: the disk is full or not writable; the message says how much is missing.
        """
        self.wait()
        partitions.ensure_states(engine)
        pieces = self._pieces(engine, moments)
        needed = int(self.world.sum([pieces.bytes])[0])
        self.world.on_main(lambda: self._require(needed, f"the checkpoint of step {state.step}"))
        about = {
            "format": FORMAT,
            "world_size": self.world.size,
            "adam_step": partitions.adam_step(engine),
            "loss_scale": engine.loss_scale,
            "moments": moments,
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

    def _pieces(self, engine, moments: bool = True) -> Pieces:
        if not self.world.main and partitions.replicated(engine):
            return Pieces.of([])
        sizes = {
            f"{name}|{start}|{kind}": numel
            for name, start, sizes in partitions.sizes(engine)
            for kind, numel in sizes.items()
            if kind == "master" or moments
        }

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for piece in partitions.fragments(engine):
                for kind, tensor in piece.tensors.items():
                    if kind == "master" or moments:
                        yield f"{piece.name}|{piece.start}|{kind}", tensor

        return Pieces(sizes, tensors)

    def _write_behind(self, save: _Save) -> None:
        try:
            self._write(save, self._writers)
        except BaseException as error:
            self._error = error

    def _write(self, save: _Save, world: World) -> None:
        """Write this rank's file; then rank 0 completes the folder and gives it its final name."""
        stage = self.folder / f".tmp-step-{save.step:08d}"

        def make_stage() -> None:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)

        entry, error = None, None
        try:
            faults.point("save.begin")
            world.on_main(make_stage)
            name = f"optim-{world.rank:05d}-of-{world.size:05d}.safetensors"
            entry = name, write_tensors(stage / name, save.pieces)
            faults.point("save.written")
        except Exception as problem:
            error = f"rank {world.rank}: {problem}"
        results = world.gather((entry, error))
        world.on_main(lambda: self._complete(stage, save, results))
        self._finished.append((save.step, str(step_folder(self.folder, save.step))))

    def _complete(
        self,
        stage: Path,
        save: _Save,
        results: list[tuple[tuple[str, Entry] | None, str | None]],
    ) -> None:
        """Make a checkpoint of the files of all ranks, and delete old ones.

        Args:
            results: of each rank, its file with size and hash, or its error.
        """
        try:
            errors = [error for _, error in results if error]
            if errors:
                raise OSError(errors[0])
            faults.point("save.gathered")
            files = dict(entry for entry, _ in results if entry)
            self._publish(stage, save.step, save.about, files)
            self._write_marks(save.step)
        except OSError as error:
            shutil.rmtree(stage, ignore_errors=True)
            free = disk_free_bytes(self.folder)
            missing = f"; {gib(save.needed - free)} more are needed" if save.needed > free else ""
            raise RunFailed(
                f"the checkpoint of step {save.step} could not be written: {error}{missing}",
                str(self.folder),
                UNTOUCHED,
            ) from None

        # Delete checkpoints older than the newest `keep` that are known to be sound, except the
        # best one; nothing while there are fewer.
        self._sound.add(save.step)
        if len(self._sound) < self.keep:
            return
        kept = sorted(self._sound)[-self.keep :]
        if self.best:
            kept.append(save.about["state"]["best_step"])
        for path in step_folders(self.folder):
            if step_of(path) <= save.step and step_of(path) not in kept:
                self._discard(path)

    def _publish(
        self, stage: Path, step: int, about: dict[str, Any], files: dict[str, Entry]
    ) -> None:
        """Add state and manifest to the tensors in `stage`, and give the folder its final name.

        A checkpoint of that name is hidden just before and deleted afterwards, as deleting takes
        time in which a kill must not leave the run without it.
        """
        final, hidden = step_folder(self.folder, step), None
        write_atomic(stage / STATE, json.dumps(about, indent=1))
        faults.point("save.state")
        write_manifest(stage, step, files | {STATE: entry_of(stage / STATE)})
        faults.point("save.manifest")
        fsync(stage)
        if final.exists():
            hidden = self._hide(final)
        faults.point("save.rename")
        os.replace(stage, final)
        faults.point("save.renamed")
        fsync(self.folder)
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)

    def _write_marks(self, step: int) -> None:
        """Write the evaluation's marks into the checkpoint of `step` once both exist.

        Called when the marks arrive and when the folder is complete: with a background save either
        may come first. If the disk is too full for the marks, the evaluation remains due.
        """
        marks, folder = self._marks.get(step), step_folder(self.folder, step)
        if marks and folder.is_dir():
            with self._marking, suppress(OSError):
                write_atomic(folder / EVALUATED, json.dumps(marks, indent=1))

    def _require(self, needed: int, what: str) -> None:
        free = disk_free_bytes(self.folder)
        if needed > free:
            raise RunFailed(
                f"{what} needs {gib(needed)} and the disk has {gib(free)} free: "
                f"{gib(needed - free)} are missing",
                str(self.folder),
                UNTOUCHED,
            )

    def require_room(self, engine, several: bool, final: FinalCheckpoint) -> None:
        """Check before the first step that the disk has room for all checkpoints kept at once.

        Existing checkpoints are included.

        Args:
            several: checkpoints are written during the run, and not only when it is done.
            final: what is kept then.

        Raises:
            RunFailed: the disk is too small; the message says how much is missing.
        """
        partitions.ensure_states(engine)
        one, masters = map(
            int, self.world.sum([self._pieces(engine, kind).bytes for kind in (True, False)])
        )

        def check() -> None:
            here = step_folders(self.folder)
            if final is not FinalCheckpoint.full and not several and not self.best:
                weights = masters if final is FinalCheckpoint.weights else 0
                return self._require(weights, f"keeping the weights, {gib(weights)},")
            count = (
                self.keep + 1 + self.best if several or self.best else min(self.keep, len(here)) + 1
            )
            held = sum(folder_bytes(step) for step in here)
            self._require(
                count * one - held,
                f"keeping {plural(count, 'checkpoint')} of {gib(one)} at once",
            )

        self.world.on_main(check)

    def keep_at_end(self, final: FinalCheckpoint, steps: list[int]) -> None:
        """Keep of a run that is done what `final` says; on rank 0, once the export is there.

        Args:
            steps: whose weights are kept: the last one, and the best.
        """
        if final is FinalCheckpoint.full:
            return
        for path in step_folders(self.folder):
            if final is FinalCheckpoint.none or step_of(path) not in steps:
                self._discard(path)
            elif read_state(path).get("moments", True):
                try:
                    self._drop_moments(path)
                except OSError:  # the disk has no room for the copy: the full one stays
                    self.clean()
        self._sound &= {step_of(path) for path in step_folders(self.folder)}

    def _drop_moments(self, path: Path) -> None:
        """Replace a checkpoint by one with the same weights and no moments."""
        stage, reader = self.folder / f".tmp-{path.name}", StateReader(path)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        sizes = reader.sizes("master")

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, numel in sizes.items():
                yield f"{name}|0|master", reader.read(name, "master", 0, numel)

        file = "optim-00000-of-00001.safetensors"
        pieces = Pieces({f"{name}|0|master": numel for name, numel in sizes.items()}, tensors)
        files = {file: write_tensors(stage / file, pieces)}
        self._publish(stage, step_of(path), read_state(path) | {"moments": False}, files)

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; a half-deleted one is never visible."""
        shutil.rmtree(self._hide(path), ignore_errors=True)

    def _hide(self, path: Path) -> Path:
        """Rename a checkpoint that is to be deleted, and return its new path."""
        hidden = self.folder / f".tmp-old-{path.name}"
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        faults.point("save.discard")
        return hidden

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

    def restore(self, engine, folder: Path | None, end_step: int) -> TrainState:
        """Load a verified checkpoint of any world size and stage, and continue from it.

        Args:
            folder: of the checkpoint; None: start at step 0.

        Raises:
            UserError: it is another run's, or holds weights alone and the run has steps left.
        """
        if folder is None:
            return TrainState()
        saved = read_state(folder)
        self._check_identity(saved, folder)
        if not saved.get("moments", True) and saved["state"]["step"] < end_step:
            raise UserError(
                f"this checkpoint of step {saved['state']['step']} holds weights alone "
                f"(checkpoint.final=weights): training cannot go on from it to step {end_step}",
                str(folder),
                "Start a new run from the export, or this one anew with resume=never.",
            )
        state = self.load(engine, folder)
        self.world.on_main(lambda: self._continue_from(folder))
        return state

    def load(self, engine, folder: Path) -> TrainState:
        """Load weights, moments and loss scale of a verified checkpoint. Collective."""
        saved, reader = read_state(folder), StateReader(folder)
        partitions.ensure_states(engine)
        moments = saved.get("moments", True)
        for piece in partitions.fragments(engine, write=True):
            for kind, tensor in piece.tensors.items():
                if kind == "master" or moments:
                    tensor.copy_(reader.read(piece.name, kind, piece.start, tensor.numel()))
        partitions.set_adam_step(engine, saved["adam_step"])
        partitions.refresh_weights(
            engine, lambda name, start, numel: reader.read(name, "master", start, numel)
        )
        if saved["loss_scale"] is not None:
            engine.loss_scale = saved["loss_scale"]
        names = {field.name for field in fields(TrainState)}
        return TrainState(**{key: value for key, value in saved["state"].items() if key in names})

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
        before, now = _settings(saved["identity"]), _settings(self.identity)
        changed = [
            key
            for key, value in now.items()
            if key in before
            and before[key] != value
            and not {key, key.split(".")[0]} & set(self.may_change)
        ]
        if changed:
            listed = "\n".join(f"  {key}: was {before[key]}, is {now[key]}" for key in changed)
            allow = command([f"resume_changed=[{','.join(changed)}]"])
            raise UserError(
                f"this run is not the one that was saved:\n{listed}",
                str(folder),
                f"Undo the change, allow it with {allow}, or start anew with resume=never or "
                "another run_dir.",
            )


def _settings(identity: dict[str, Any]) -> dict[str, Any]:
    """Flatten the identity to one dotted key per setting, so that only differences are reported.

    Older checkpoints store a section as text: `OptimConfig(lr=0.01, schedule='cosine')`.
    """
    settings: dict[str, Any] = {}
    for key, value in identity.items():
        if isinstance(value, str) and re.fullmatch(r"\w+Config\(.*\)", value, re.DOTALL):
            call = ast.parse(value, mode="eval").body
            assert isinstance(call, ast.Call)
            kind = value.partition("Config(")[0].lower()
            value = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            value |= {"kind": kind}
        if isinstance(value, dict):
            settings |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            settings[key] = value
    return settings
