"""The values a plan is computed from: what is trained, on how many ranks, with which batch, and the options of ZeRO.

Plain frozen dataclasses, so that "what if" is `dataclasses.replace` and nothing here reads a config or a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import Optional, Union

from finetune.config import AdapterConfig, Config, FullConfig, PrefixConfig, PromptConfig
from finetune.errors import UserError
from finetune.planning import parameter_groups
from finetune.planning.machine import Machine
from finetune.planning.shape import ModelShape

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Work:
    """One micro-step of one rank."""

    micro_batch: int
    """Sequences per rank and forward."""
    max_length: int
    """Tokens of a sequence."""
    accumulation: int
    """Micro-steps per optimizer step."""
    dtype: str = "bf16"
    """Precision of weights and arithmetic: bf16, fp16 or fp32."""
    packing: bool = True
    """Rows are filled; without it they are at most as long, so the plan holds for both."""
    checkpointing: Union[bool, str] = False
    """train.activation_checkpointing: false, true, selective or offload."""

    @property
    def rebuilds(self) -> bool:
        """Blocks are computed again in the backward pass."""
        return self.checkpointing in (True, "offload")

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def accumulation_bytes(self) -> int:
        """bf16 gradients are summed over micro-steps in fp32, fp16 ones with loss scaling as they are."""
        return 4 if self.accumulation > 1 and self.dtype == "bf16" else self.element_bytes


@dataclass(frozen=True)
class Option:
    """One way to spread the model states."""

    stage: int
    offload_optimizer: str = "none"
    offload_params: str = "none"

    @property
    def zero(self) -> str:
        return f"stage{self.stage}"

    def __str__(self) -> str:
        text = f"stage {self.stage}"
        if self.offload_optimizer != "none":
            text += f", optimizer on {self.offload_optimizer}"
        if self.offload_params != "none":
            text += f", weights on {self.offload_params}"
        return text


@dataclass(frozen=True)
class Job:
    """Everything that bytes depend on, except the option."""

    shape: ModelShape
    adapter: AdapterConfig
    work: Work
    world_size: int
    machine: Machine
    global_batch: int = 1
    """Sequences per optimizer step, all ranks together."""
    bucket_elements: int = 50_000_000
    eval_tokens: int = 0
    """Tokens of one forward in evaluation; 0 without evaluation."""
    checkpoints_kept: int = 1
    """Checkpoints on disk at once, one being written included."""

    def with_micro_batch(self, micro_batch: int) -> Job:
        """The same optimizer step in larger or smaller bites."""
        return self.with_ranks(self.world_size, micro_batch)

    def with_ranks(self, world_size: int, micro_batch: Optional[int] = None) -> Job:
        """The same optimizer step on more or fewer ranks; accumulation follows."""
        micro = micro_batch or self.work.micro_batch
        accumulation = max(1, self.global_batch // (micro * world_size))
        return replace(
            self,
            world_size=world_size,
            work=replace(self.work, micro_batch=micro, accumulation=accumulation),
        )

    @property
    def full(self) -> bool:
        return isinstance(self.adapter, FullConfig)

    @property
    def on_gpu(self) -> bool:
        return self.machine.gpus > 0

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share one host's memory; without GPUs all of them run here."""
        per_node = self.machine.gpus_per_node if self.on_gpu else self.world_size
        return max(1, min(self.world_size, per_node))

    @property
    def tokens(self) -> int:
        """Tokens of one forward of one rank; prompt tuning puts its trained tokens before every row."""
        virtual = self.adapter.virtual_tokens if isinstance(self.adapter, PromptConfig) else 0
        return self.work.micro_batch * (self.work.max_length + virtual)

    @property
    def prefix_tokens(self) -> int:
        """Trained key/value pairs that prefix tuning adds to every row of every layer."""
        virtual = self.adapter.virtual_tokens if isinstance(self.adapter, PrefixConfig) else 0
        return self.work.micro_batch * virtual

    @cached_property
    def trainable_groups(self) -> list[list[int]]:
        """Elements of the trained tensors, split as the optimizer's parameter groups are: with weight decay
        (matrices) and without (biases, norms), each cut by `parameter_groups`. Order and split decide the padding of ZeRO's
        flat buffers."""
        shapes = [shape for _, shape in self.shape.trainable_tensors(self.adapter)]
        kinds = [[prod(s) for s in shapes if len(s) >= 2], [prod(s) for s in shapes if len(s) < 2]]
        return [
            [numels[i] for i in run] for numels in kinds for run in parameter_groups.cut(numels)
        ]

    @cached_property
    def frozen_numels(self) -> list[int]:
        """Elements of the untrained tensors; a head that an adapter trains is kept once more, untrained."""
        return [prod(shape) for _, shape in self.shape.frozen_tensors(self.adapter)]

    def largest_trainable(self) -> int:
        return max((max(group) for group in self.trainable_groups), default=0)


def padded(numel: int, multiple: int) -> int:
    """`numel` rounded up to a multiple."""
    return ceil(numel / multiple) * multiple


def accumulation(cfg: Config, world_size: int) -> int:
    """Micro-batches per optimizer step and rank: global_batch / (micro_batch x ranks).

    Raises:
        UserError: it is not a whole number.
    """
    micro, ranks, total = int(cfg.train.micro_batch), world_size, cfg.train.global_batch
    if total % (micro * ranks):
        near = max(1, round(total / (micro * ranks))) * micro * ranks
        raise UserError(
            f"train.global_batch = {total} is not a multiple of train.micro_batch x ranks = {micro} x {ranks} = "
            f"{micro * ranks}",
            remedy=f"Try train.global_batch={near}" + _smaller_micro(total, ranks, micro) + ".",
        )
    return total // (micro * ranks)


def _smaller_micro(total: int, ranks: int, micro: int) -> str:
    fits = [m for m in range(micro, 0, -1) if total % (m * ranks) == 0]
    return f", or train.micro_batch={fits[0]}" if fits else ""
