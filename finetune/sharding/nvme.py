"""Offload to a local disk: each run's own folder on it, and whether DeepSpeed can use it here.

DeepSpeed reads and writes through its op `async_io`, which is compiled at first use and needs libaio. Where the states
then are, and how to get at them, is partitions.py's business.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from finetune.dist import World
from finetune.errors import UserError
from finetune.sharding.ops import built_ops, find_stale_locks, hushed

OP = "async_io"
COMPILING = "compiling DeepSpeed's op for nvme offload, once, about two minutes"


def run_folder(nvme_path: str | None, run_dir: Path) -> Path | None:
    """Return this run's folder under zero.nvme_path, the same whenever it is started.

    DeepSpeed names its files by rank and parameter alone: two runs in one folder would overwrite each other's states.
    """
    if not nvme_path:
        return None
    name = hashlib.blake2b(str(run_dir.absolute()).encode(), digest_size=6).hexdigest()
    return Path(nvme_path).expanduser().absolute() / f"finetune-{name}"


def prepare(
    folder: Path, world: World, phase: Callable[[str], AbstractContextManager] = nullcontext
) -> None:
    """Make an empty folder and load the op on every node; its compile is announced. Collective.

    Raises:
        UserError: the folder cannot be made, or the op cannot be built.
    """
    problem = None
    with phase(COMPILING) if world.main and OP not in built_ops() else nullcontext():
        if world.local_rank == 0:
            try:
                make_empty(folder)
                load_op()
            except UserError as error:
                problem = error
    for error in world.gather(problem):
        if error:
            raise error


def clear(folder: Path | None, world: World) -> None:
    """Remove what the run left on this node's disk."""
    if folder and world.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def make_empty(folder: Path) -> None:
    """Make the run's folder, without what a killed run left in it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"nvme offload cannot use this folder: {error.strerror}",
            f"zero.nvme_path={folder.parent}",
            "Name a folder on a local disk that you may write to.",
        ) from None


def load_op() -> None:
    """Load DeepSpeed's op, and compile it if it has not been.

    Raises:
        UserError: it cannot be built, or a killed compile left a lock that would be waited for.
    """
    for lock in find_stale_locks(op=OP):
        raise UserError(
            f"a compile of DeepSpeed's async_io op was killed and left its lock: {lock}",
            "zero.nvme_path",
            f"Remove it and start again: rm {lock}",
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    try:
        with hushed():
            able = OP in built_ops() or builder.is_compatible(verbose=False)
            if able:
                builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(
            f"DeepSpeed's async_io op cannot be built: {str(error).splitlines()[0]}",
            "zero.nvme_path",
            "python launch/doctor.py tells what is missing. Or try zero.offload_optimizer=cpu.",
        ) from None
    if not able:
        raise UserError(
            "nvme offload needs libaio, with its headers",
            "zero.nvme_path",
            "Try apt install libaio-dev, or zero.offload_optimizer=cpu.",
        )
