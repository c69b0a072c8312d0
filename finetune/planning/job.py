"""The values a plan is computed from: what is trained, on how many ranks, with which batch.

Plain frozen dataclasses, so that "what if" is `dataclasses.replace`. Also the rules on batch sizes,
stages and offload that a config must follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import Optional, Union

from finetune.config import (
    AdapterConfig,
    Config,
    Dtype,
    FullConfig,
    Offload,
    OptimName,
    PromptConfig,
    Quantize,
)
from finetune.errors import UserError, broken
from finetune.planning import parameter_groups
from finetune.planning.machine import Machine
from finetune.planning.quantization import packed_bytes
from finetune.planning.shape import LINEARS, ModelShape


@dataclass(frozen=True)
class Work:
    """One micro-step of one rank."""

    micro_batch: int
    """Sequences per rank and forward."""
    max_length: int
    """Tokens of a document."""
    accumulation: int
    """Micro-steps per optimizer step."""
    dtype: str = "bf16"
    """Precision of weights and arithmetic: bf16, fp16 or fp32."""
    documents: int = 1
    """Documents of `max_length` tokens in a sequence: 2 for preferences."""
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
        return Dtype(self.dtype).element_bytes

    @property
    def accumulation_bytes(self) -> int:
        """Bytes of a summed gradient: fp32 for bf16 over several micro-steps, else the model's."""
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

    @property
    def places(self) -> dict[str, str]:
        """Settings below `zero.` that move states off the device, and where to."""
        return {
            "offload_optimizer": self.offload_optimizer,
            "offload_params": self.offload_params,
        }

    @property
    def offloads(self) -> bool:
        return any(place != "none" for place in self.places.values())

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
    optimizer: OptimName = OptimName.adamw
    quantize: Quantize = Quantize.none
    quantize_double: bool = True
    eval_tokens: int = 0
    """Tokens of one forward in evaluation; 0 without evaluation."""
    checkpoints_kept: int = 1
    """Full checkpoints on disk at once, one being written included."""
    weights_kept: bool = False
    """A checkpoint of the weights alone is written when the run is done."""

    def with_micro_batch(self, micro_batch: int) -> Job:
        """Return the same optimizer step in larger or smaller micro-batches."""
        return self.with_ranks(self.world_size, micro_batch)

    def with_ranks(self, world_size: int, micro_batch: Optional[int] = None) -> Job:
        """Return the same optimizer step on more or fewer ranks; accumulation follows."""
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
    def trains_lm_head(self) -> bool:
        whole = getattr(self.adapter, "modules_to_save", ())
        return self.shape.head == "lm" and (self.full or "lm_head" in whole)

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
        """Tokens of one forward of one rank, with those that prompt tuning adds to every row."""
        virtual = self.adapter.virtual_tokens if isinstance(self.adapter, PromptConfig) else 0
        work = self.work
        return work.micro_batch * work.documents * (work.max_length + virtual)

    @cached_property
    def trainable_groups(self) -> list[list[int]]:
        """Elements of the trained tensors, by parameter group of the optimizer.

        `parameter_groups` makes them. Order and split decide the padding of ZeRO's flat buffers.
        """
        tensors = list(self.shape.trainable_tensors(self.adapter))
        groups = parameter_groups.split(tensors, getattr(self.adapter, "lr_ratio", 1.0))
        return [[prod(tensors[i][1]) for i in group.indices] for group in groups]

    @cached_property
    def trained_numels(self) -> list[int]:
        """Elements of the trained tensors."""
        return [numel for group in self.trainable_groups for numel in group]

    @cached_property
    def frozen_numels(self) -> list[int]:
        """Elements of the untrained tensors: with an adapter the whole model, its head included."""
        if self.full:
            return []
        return [self.stored_numel(name, shape) for name, shape in self.shape.tensors()]

    def stored_numel(self, name: str, shape: tuple[int, ...]) -> int:
        """Return the elements that an untrained tensor takes, if it is quantised its packed form."""
        linear = name.endswith(tuple(f"{module}.weight" for module in LINEARS))
        if self.quantize is Quantize.none or not linear:
            return prod(shape)
        packed = packed_bytes(self.quantize, self.quantize_double, *shape)
        return packed // self.work.element_bytes

    @cached_property
    def stored_total(self) -> int:
        """Elements of all tensors, a quantised one counted in its packed form."""
        return sum(self.trained_numels) + sum(self.frozen_numels)


def padded(numel: int, multiple: int) -> int:
    """Round `numel` up to a multiple."""
    return ceil(numel / multiple) * multiple


def accumulation(micro_batch: int, global_batch: int, world_size: int) -> int:
    """Return the micro-batches per optimizer step and rank.

    That is global_batch / (micro_batch x ranks).

    Raises:
        UserError: it is not a whole number.
    """
    at_once = micro_batch * world_size
    if global_batch % at_once == 0:
        return global_batch // at_once
    near = max(1, round(global_batch / at_once)) * at_once
    remedy = f"Try train.global_batch={near}"
    divisors = (m for m in range(micro_batch, 0, -1) if global_batch % (m * world_size) == 0)
    if smaller := next(divisors, None):
        remedy += f", or train.micro_batch={smaller}"
    raise UserError(
        f"train.global_batch = {global_batch} is not a multiple of train.micro_batch x ranks = "
        f"{micro_batch} x {world_size} = {at_once}",
        remedy=f"{remedy}.",
    )


def sharding_problems(cfg: Config, cuda: bool) -> Iterator[UserError]:
    """Return what DeepSpeed cannot do among precision, stage and offload."""
    zero, optimizer = cfg.zero, cfg.optim.name
    offloads = zero.offload_optimizer is not Offload.none
    stage = f"zero.stage={zero.stage}"
    return broken(
        [
            (
                cfg.model.dtype is Dtype.fp16 and not cuda,
                "fp16 trains on GPUs only, and there is none here",
                "model.dtype",
                "Try model.dtype=bf16 or model.dtype=fp32.",
            ),
            (
                optimizer is OptimName.adafactor and zero.stage not in ("auto", 0),
                "adafactor needs whole matrices, which ZeRO cuts from stage 1 on",
                stage,
                "Try zero=stage0, or optim.name=adamw8bit.",
            ),
            (
                optimizer is not OptimName.adamw and offloads,
                f"optim.name = {optimizer.value} keeps its small states beside the weights",
                f"zero.offload_optimizer={zero.offload_optimizer.value}",
                "Try zero.offload_optimizer=none, or optim.name=adamw.",
            ),
            (
                zero.stage == 0 and offloads,
                "zero.offload_optimizer needs stage 1, 2 or 3",
                stage,
                "Try zero=stage1.",
            ),
            (
                zero.stage in (0, 1, 2) and zero.offload_params is not Offload.none,
                "zero.offload_params needs stage 3",
                stage,
                "Try zero=stage3.",
            ),
            (
                zero.stage in (1, 2) and zero.offload_optimizer is Offload.nvme,
                "zero.offload_optimizer=nvme needs stage 3; below it DeepSpeed would take the host "
                "instead",
                stage,
                "Try zero=stage3, or zero.offload_optimizer=cpu.",
            ),
            (
                Offload.nvme in (zero.offload_optimizer, zero.offload_params)
                and not zero.nvme_path,
                "nvme offload needs a folder on a local disk",
                "zero.nvme_path",
                "Try zero.nvme_path=/local_nvme.",
            ),
        ]
    )
