"""Explain out-of-memory errors: current activity, predicted and actual use, and what to try next.

`explain_overflow` turns the errors that allocators raise into a `RunFailed` with commands to paste.
`HostWatch` ends a rank before the kernel kills it: a killed process leaves neither a message nor a
result.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from finetune import process
from finetune.config import Config
from finetune.dist import World
from finetune.errors import RunFailed, gib
from finetune.planning import machine
from finetune.planning.choose import Plan, after_overflow
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


class Use(NamedTuple):
    """Memory of the GPU or the host when it ran out, in bytes."""

    on_gpu: bool
    asked: int
    """Requested by the allocation that failed; 0 if unknown."""
    total: int
    free: int
    mine: int
    """Held by this rank."""


def measure_use(on_gpu: bool, asked: int = 0) -> Use:
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        return Use(True, asked, total, free, torch.cuda.memory_reserved())
    return Use(False, asked, host_total_bytes(), host_free_bytes(), machine.host_bytes())


class OutOfMemory:
    """Explanations of memory that ran out in one run.

    Args:
        words: the k=v words of the command line, for the commands to paste.
    """

    def __init__(self, cfg: Config, words: list[str], run_dir: Path, world: World):
        self.cfg, self.words, self.run_dir, self.world = cfg, words, run_dir, world
        self.plan: Plan | None = None
        """The memory that was predicted; None before planning."""
        self.activity = "preparing the run"

    def explain(self, error: BaseException) -> BaseException:
        """Return the RunFailed that explains an out-of-memory error; any other error unchanged."""
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and not is_host_overflow(error):
            return error
        match = ASKED.search(str(error))
        asked = int(float(match[1]) * UNITS[match[2]]) if match else 0
        return self._failed(measure_use(on_gpu, asked))

    def host_runs_out(self, free: int) -> RunFailed:
        """Return the error for host memory of which only `free` bytes are left."""
        return self._failed(measure_use(on_gpu=False), f"only {gib(free)} of host memory is left")

    def _failed(self, use: Use, about: str = "") -> RunFailed:
        """Compare the memory that was held with the plan, and look for options that need less."""
        lines = [about or f"out of {'GPU' if use.on_gpu else 'host'} memory"]
        if use.asked:
            lines[0] += (
                f": {gib(use.asked)} more were asked for, {gib(use.free)} of {gib(use.total)} are "
                "free"
            )
        if self.plan is not None:
            lines.append(compared(self.plan, use))

        # The room that this run has: the whole memory without what other programs hold.
        held = use.mine * (1 if use.on_gpu else self.world.local_size)
        others = max(0, use.total - use.free - held)
        room = use.total - others
        if 0 < use.asked < use.free and not use.on_gpu:
            room = held
            lines.append(
                "there is enough, but a limit of this account or container refuses it (see "
                "ulimit -a)"
            )
        elif others > use.total / 10:
            lines.append(f"other programs hold {gib(others)} of it")

        # Predicted needs are scaled by the factor by which the prediction for this run was too low.
        remedies = []
        if self.plan is not None:
            chosen = self.plan.chosen
            predicted = chosen.gpu_bytes if use.on_gpu else chosen.host_bytes
            factor = max(1.0, (held + use.asked) / max(predicted, 1))
            limit = min(int(room / factor), predicted - 1)
            limits = {"gpu_bytes" if use.on_gpu else "host_bytes": limit}
            smaller = after_overflow(self.cfg, self.plan, **limits)[:SHOWN]
            remedies = [f"  {self._command(words)}   # {numbers}" for words, numbers in smaller]
            remedies.insert(0, "Predicted to fit, by what was measured here:")
            if not smaller:
                remedies = [
                    "Nothing smaller on this machine is predicted to fit: more GPUs, or more "
                    "memory, are needed."
                ]
        remedies.append("Checkpoints are safe; the same command goes on from the newest.")
        return RunFailed("\n  ".join(lines), f"while {self.activity}", "\n  ".join(remedies))

    def _command(self, overrides: str) -> str:
        """Return the command of this run with `overrides` in place of the words they replace."""
        new = overrides.split()
        replaced = {word.split("=")[0] for word in new}
        if "zero" in replaced:
            replaced |= {"zero.stage", "zero.offload_optimizer", "zero.offload_params"}
        # Another adapter or task would not continue this run's checkpoint.
        another = any(word.startswith(("adapter", "task.")) for word in new)
        replaced |= {"run_dir"} if another else set()
        kept = [word for word in self.words if word.lstrip("+").split("=")[0] not in replaced]
        one_node = self.world.local_size == self.world.size
        launcher = f"deepspeed --num_gpus {self.world.local_size}" if one_node else "deepspeed"
        return train_command([*kept, *new], None if another else self.run_dir, launcher)


def compared(plan: Plan, use: Use) -> str:
    """Compare the predicted parts with the memory that the rank holds."""
    chosen, whose = plan.chosen, "rank"
    if use.on_gpu:
        parts = chosen.parts
    elif plan.job.on_gpu:
        parts, whose = chosen.host_parts, "node"
    else:
        libraries = chosen.host_parts["processes"] // plan.job.ranks_per_node
        parts = {"interpreter and libraries": libraries} | chosen.parts
    listed = " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    predicted = gib(sum(parts.values()))
    return f"predicted for this {whose}: {predicted} = {listed}; this rank holds {gib(use.mine)}"


def is_host_overflow(error: BaseException) -> bool:
    """Tell whether a host allocator failed: Python's, numpy's or torch's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
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
