"""Which options there are, which of them a configuration allows, and in which order they are tried.

Fastest first, for the reasons given in docs/memory.md. An explicit zero.stage or offload narrows the list.
"""

from __future__ import annotations

from finetune.config import Config, Dtype, Offload
from finetune.errors import UserError
from finetune.plan.job import Job, Option
from finetune.plan.machine import Machine

REPLICATED = Option(0)
PLAIN = (Option(1), Option(2), Option(3))
OPTIMIZER_OFFLOAD = (Option(1, "cpu"), Option(2, "cpu"), Option(3, "cpu"))
PARAM_OFFLOAD = (Option(3, "none", "cpu"), Option(3, "cpu", "cpu"))
NVME_OFFLOAD = (Option(3, "nvme"), Option(3, "nvme", "cpu"), Option(3, "nvme", "nvme"))
TINY_STATES = 0.01
"""An adapter below this share of the model's parameters gains nothing from sharding its states."""


def all_options(job: Job, nvme_path: str | None) -> list[Option]:
    """Every sensible option; without GPUs the host is the device, so offloading moves nothing."""
    options = [REPLICATED, *PLAIN]
    if job.on_gpu:
        options += [*OPTIMIZER_OFFLOAD, *PARAM_OFFLOAD]
    if job.on_gpu and nvme_path:
        options += NVME_OFFLOAD
    return options


def wanted_options(cfg: Config, job: Job) -> list[Option]:
    """The options that `cfg.zero` allows, fastest first; never empty."""
    offloads = (cfg.zero.offload_optimizer.value, cfg.zero.offload_params.value)
    if cfg.zero.stage != "auto":
        return [Option(int(cfg.zero.stage), *offloads)]
    order = [option for option in all_options(job, cfg.zero.nvme_path) if option != REPLICATED]
    if _replicates(job):
        order.insert(0, REPLICATED)
    allowed = [option for option in order if _matches(option, *offloads)]
    return allowed or [Option(3 if offloads[1] != "none" or "nvme" in offloads else 1, *offloads)]


def _replicates(job: Job) -> bool:
    """Whether stage 0 is worth trying first.

    Several ranks: only where there is next to nothing to shard. And it sums the gradients of micro-steps in the
    weights' own precision, so only where that is fp32 or there is a single micro-step.
    """
    exact = job.work.accumulation == 1 or job.work.element_bytes == 4
    tiny = job.shape.trainable(job.adapter) < TINY_STATES * job.shape.parameters()
    return exact and (job.world_size == 1 or tiny)


def _matches(option: Option, optimizer: str, params: str) -> bool:
    """`none` is also what nobody set, so it constrains nothing; anything else was asked for."""
    return optimizer in ("none", option.offload_optimizer) and params in ("none", option.offload_params)


def refuse(cfg: Config, machine: Machine) -> None:
    """Raise UserError for what DeepSpeed cannot do."""
    zero = cfg.zero
    if cfg.model.dtype is Dtype.fp16 and machine.gpus == 0:
        raise UserError("fp16 training needs a GPU", "model.dtype", "Try model.dtype=bf16 or model.dtype=fp32.")
    if zero.stage not in ("auto", 3, "3") and zero.offload_params is not Offload.none:
        raise UserError(
            f"zero.offload_params={zero.offload_params.value} needs stage 3, not {zero.stage}", "", "Try zero=stage3."
        )
    if zero.stage in (0, "0") and zero.offload_optimizer is not Offload.none:
        raise UserError("stage 0 cannot offload the optimizer", "zero.offload_optimizer", "Try zero=stage1.")
    if zero.stage not in ("auto", 3, "3") and zero.offload_optimizer is Offload.nvme:
        raise UserError(
            f"zero.offload_optimizer=nvme needs stage 3, not {zero.stage}", "", "Try zero=stage3, or offload it to cpu."
        )
    if Offload.nvme in (zero.offload_optimizer, zero.offload_params) and not zero.nvme_path:
        raise UserError("nvme offload needs a folder", "zero.nvme_path", "Try zero.nvme_path=/local/nvme.")
