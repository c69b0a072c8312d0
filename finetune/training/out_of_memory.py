"""Explain out-of-memory errors: current activity, predicted and actual use, and what to try next.

`Overflow.explain` turns the errors that allocators raise into a `RunFailed` with commands to
paste. `HostWatch` ends a rank before the kernel kills it: a killed process leaves neither a message
nor a result.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from finetune import process
from finetune.config import Config
from finetune.dist import World
from finetune.errors import RunFailed, gib
from finetune.planning import machine
from finetune.planning.choose import Plan, after_overflow
from finetune.planning.estimate import Estimate
from finetune.planning.machine import host_free_bytes, host_left_bytes, host_total_bytes
from finetune.reporting.terminal_text import train_command

UNITS = {
    "B": 1,
    "bytes": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
    "EiB": 2**60,
}
ASKED = re.compile(r"allocat\w* (\d+(?:\.\d+)?) ?(bytes|[KMGTPE]iB)")
SHOWN = 3
"""Commands in the remedy."""
POLL_SECONDS = 0.5
RESERVE_SHARE, RESERVE_BYTES = 0.01, 192 * 2**20
"""Host memory left, as a share of the node's and in bytes, below which the kernel is about to kill."""


class Overflow:
    """The memory plan and state of a run, to explain an out-of-memory error.

    Args:
        words: the k=v words of the command line, for the command to paste.
    """

    def __init__(self, cfg: Config, words: list[str], world: World):
        self.cfg, self.words, self.world = cfg, words, world
        self.planned: Plan | None = None
        self.start_host = 0
        """Resident bytes of the largest rank just before the first step; 0 until then."""
        self.doing = "preparing the run"

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Label the block, so that an out-of-memory error inside it names the activity."""
        before, self.doing = self.doing, what
        yield
        self.doing = before  # not reached after an error, so that `explain` can name it

    def explain(self, error: BaseException) -> BaseException:
        """Return the RunFailed that explains an out-of-memory error; any other error unchanged."""
        if isinstance(error, torch.OutOfMemoryError):
            return self._failed(_asked(error), on_gpu=True)
        if is_host_overflow(error):
            return self._failed(_asked(error), on_gpu=False)
        return error

    @property
    def stage(self) -> int | None:
        """The planned ZeRO stage; None before planning."""
        return self.planned.chosen.option.stage if self.planned else None

    def low(self, free: int) -> RunFailed:
        """Return the error for host memory that is about to run out."""
        return self._failed(0, on_gpu=False, about=f"only {gib(free)} of host memory is left")

    def _failed(self, asked: int, on_gpu: bool, about: str = "") -> RunFailed:
        where = "GPU" if on_gpu else "host"
        total, free, mine = (
            _gpu_memory()
            if on_gpu
            else (host_total_bytes(), host_free_bytes(), machine.host_bytes())
        )
        more = (
            f": {gib(asked)} more were asked for, {gib(free)} of {gib(total)} are free"
            if asked
            else ""
        )
        lines = [about or f"out of {where} memory{more}"]
        if self.planned is not None:
            lines.append(
                _compared(
                    self.planned.chosen,
                    self.planned.job.on_gpu,
                    on_gpu,
                    mine,
                    self.planned.job.ranks_per_node,
                )
            )
        held = mine * (1 if on_gpu else self.world.local_size)
        others = max(0, total - free - held)
        if 0 < asked < free and not on_gpu:
            lines.append(
                "there is enough, but a limit of this account or container refuses it (see ulimit -a)"
            )
            room = held
        else:
            room = total - others
            if others > total / 10:
                lines.append(f"other programs hold {gib(others)} of it")
        remedies = [] if self.planned is None else self._remedies(on_gpu, asked, held, room)
        saved = "Checkpoints are safe; the same command goes on from the newest."
        return RunFailed("\n  ".join(lines), f"while {self.doing}", "\n  ".join([*remedies, saved]))

    def _remedies(self, on_gpu: bool, asked: int, held: int, room: int) -> list[str]:
        """Return commands that are predicted to fit.

        Predicted needs are scaled by the factor by which the prediction for this run was too low.
        """
        planned = self.planned
        assert planned is not None
        predicted = planned.chosen.gpu_bytes if on_gpu else planned.chosen.host_bytes
        factor = max(1.0, (held + asked) / max(predicted, 1))
        limit = min(int(room / factor), predicted - 1)
        found = after_overflow(
            self.cfg,
            planned,
            gpu_bytes=limit if on_gpu else None,
            host_bytes=None if on_gpu else limit,
        )
        lines = [
            f"{self._command(overrides)}   # {numbers}" for overrides, numbers in found[:SHOWN]
        ]
        return (
            ["Predicted to fit, by what was measured here:", *(f"  {line}" for line in lines)]
            if lines
            else [
                "Nothing smaller on this machine is predicted to fit: more GPUs, or more memory, are needed."
            ]
        )

    def _command(self, overrides: str) -> str:
        """Return the command of this run with `overrides` in place of the words they replace."""
        new = overrides.split()
        replaced = {word.split("=")[0] for word in new}
        if "zero" in replaced:
            replaced |= {"zero.stage", "zero.offload_optimizer", "zero.offload_params"}
        another = any(
            word.startswith(("adapter", "task.")) for word in new
        )  # would not continue this run's checkpoint
        replaced |= {"run_dir"} if another else set()
        kept = [word for word in self.words if word.lstrip("+").split("=")[0] not in replaced]
        ranks = (
            f" --num_gpus {self.world.local_size}"
            if self.world.local_size == self.world.size
            else ""
        )
        return train_command(
            [*kept, *new], None if another else self.cfg.run_dir, f"deepspeed{ranks}"
        )


class HostWatch:
    """Ends this process when the node's free memory, swap included, falls below a reserve.

    Args:
        on_low: (free bytes) -> None, called before the process ends with exit code 1.
    """

    def __init__(self, on_low: Callable[[int], None], free: Callable[[], int] = host_left_bytes):
        self.on_low, self.free = on_low, free
        self.reserve = min(RESERVE_BYTES, int(RESERVE_SHARE * host_total_bytes()))
        self._closed = threading.Event()

    def __enter__(self) -> HostWatch:
        self._thread = threading.Thread(target=self._watch, name="host-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self._thread.join(
            POLL_SECONDS
        )  # a thread that outlives the interpreter may abort the process

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if self.free() >= self.reserve:
                continue
            process.release()  # first give back what this process keeps for its next step
            free = self.free()
            if free < self.reserve:
                try:
                    self.on_low(free)
                finally:
                    sys.stderr.flush()
                    os._exit(1)


def is_host_overflow(error: BaseException) -> bool:
    """Tell whether a host allocator failed: Python's, numpy's or torch's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _asked(error: BaseException) -> int:
    """Return the requested bytes that the error names; 0 if it names none."""
    found = ASKED.search(str(error))
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def _gpu_memory() -> tuple[int, int, int]:
    """Return (total, free, reserved by this process) bytes of the current GPU."""
    free, total = torch.cuda.mem_get_info()
    return total, free, torch.cuda.memory_reserved()


def _compared(chosen: Estimate, cuda_run: bool, on_gpu: bool, mine: int, ranks: int) -> str:
    """Compare the predicted parts with the memory that the rank holds."""
    if on_gpu:
        parts, whose = chosen.parts, "rank"
    elif cuda_run:
        parts, whose = chosen.host_parts, "node"
    else:
        parts, whose = (
            {"interpreter and libraries": chosen.host_parts["processes"] // ranks} | chosen.parts,
            "rank",
        )
    listed = " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    return f"predicted for this {whose}: {gib(sum(parts.values()))} = {listed}; this rank holds {gib(mine)}"
