"""Distributed start-up, the control plane, and sums over ranks.

There are two planes. Gradients and weights are sent by DeepSpeed over NCCL (CUDA) or gloo (CPU).
Counts, decisions and errors are sent over a separate gloo group, so that no step waits for a GPU to
learn a number that the host already knows. Works under the deepspeed launcher, torchrun and plain
python (one process).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed import distributed_c10d as c10d

from finetune import process
from finetune.errors import UserError
from finetune.process import free_port

T = TypeVar("T")
CONTROL_TIMEOUT = timedelta(days=7)
"""Preparing data may take hours while the other ranks wait."""
LEAST_TIMEOUT, TIMEOUT_MARGIN = 1800.0, 600.0
"""Seconds: the process group's timeout is the larger of train.hang_timeout and the first, plus the second."""


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the run, and its control group."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: torch_dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def split(self) -> World:
        """Return the same ranks on a new group, for use by another thread. Collective."""
        if self.size == 1:
            return self
        return replace(self, control=torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks; exact for integers up to 2**53."""
        if self.size == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        torch_dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def maximum(self, value: float) -> float:
        if self.size == 1:
            return float(value)
        tensor = torch.tensor([value], dtype=torch.float64)
        torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX, group=self.control)
        return float(tensor.item())

    def barrier(self) -> None:
        if self.size > 1:
            torch_dist.barrier(group=self.control)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list = [None] * self.size
        torch_dist.all_gather_object(box, value, group=self.control)
        return box

    def gather_numbers(self, values: list[float]) -> list[list[float]]:
        """Return every rank's numbers, equally many, in rank order, in one small exchange."""
        n, table = len(values), [0.0] * (len(values) * self.size)
        table[self.rank * n : (self.rank + 1) * n] = values
        table = self.sum(table)
        return [table[i : i + n] for i in range(0, len(table), n)]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 while the others wait; every rank gets its result or its error."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.main:
            try:
                outcome = (work(), None)
            except Exception as error:
                if self.size == 1:
                    raise
                outcome = (None, error)
        result, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


def connect(threads: int = 0, hang_timeout: float = 0.0) -> World:
    """Join the launcher's process group (see the environment), or create one of a single process.

    Args:
        threads: CPU threads of this rank; 0: its share of the cores that this job may use.
        hang_timeout: seconds after which the run's own watch ends it; 0: there is none.

    Raises:
        UserError: the launcher's variables do not make sense, or the master cannot be reached.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    cuda = torch.cuda.is_available()
    if (
        cuda and max(local_size, local_rank + 1) > torch.cuda.device_count()
    ):  # on every rank, so that rank 0 reports it
        raise UserError(
            f"{local_size} ranks on this node, but no GPU for each: there are "
            f"{torch.cuda.device_count()}",
            remedy=f"Start with deepspeed --num_gpus {torch.cuda.device_count()} ...",
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        use_cores(threads, local_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    for name, value in (
        ("RANK", rank),
        ("WORLD_SIZE", size),
        ("LOCAL_RANK", local_rank),
        ("LOCAL_SIZE", local_size),
    ):
        os.environ.setdefault(name, str(value))
    backend = "nccl" if cuda else "gloo"
    timeout = collective_timeout(hang_timeout)
    # DeepSpeed's groups ask for no timeout and would get torch's default: 10 minutes with NCCL.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    torch_dist.init_process_group(backend, timeout=timeout, device_id=device if cuda else None)
    control = torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if size > 1 else None
    return World(rank, size, local_rank, local_size, device, control)


def collective_timeout(hang_timeout: float) -> timedelta:
    """Return the time after which a stuck collective is an error.

    It is longer than `hang_timeout`, so that the hang watch, which writes the stacks of all
    threads, ends such a run before NCCL does.
    """
    if hang_timeout <= 0:
        return CONTROL_TIMEOUT
    return timedelta(seconds=max(hang_timeout, LEAST_TIMEOUT) + TIMEOUT_MARGIN)


def disconnect() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def use_cores(threads: int, local_size: int) -> None:
    """Use `threads` CPU threads, or this process's share of the cores that the job may use."""
    process.one_arena()
    mine, bound = os.sched_getaffinity(0), False
    with suppress(OSError):  # deepspeed --bind_cores_to_rank has given this rank cores of its own
        bound = mine < os.sched_getaffinity(os.getppid())
    torch.set_num_threads(threads or max(1, len(mine) // (1 if bound else local_size)))


def seed_for(seed: int, position: int) -> None:
    """Seed torch for the micro-batch whose first sample is at `position` of the data order.

    Dropout is thereby a pure function of the seed and the data: resuming needs no generator state,
    and the same micro-batches get the same masks on any number of ranks.
    """
    torch.manual_seed((seed * 1_000_003 + position + 1) % (2**63 - 1))
