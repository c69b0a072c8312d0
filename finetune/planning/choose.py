"""Choose how to shard: the fastest option that fits, and the largest micro-batch that goes with it.

Flow: `plan(cfg, machine, shape, world_size)` -> `Plan`. Every sensible option is estimated. An
explicit zero.stage is taken as it is; `auto` takes the first one that fits, in the order of the
options below. If nothing fits, the plan holds the option that comes closest, with `fits` false and
advice on what to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from finetune.config import Config, Dtype, LoraConfig, Offload
from finetune.errors import UserError, gib
from finetune.planning.estimate import (
    Estimate,
    checkpoint_bytes,
    estimate,
    export_bytes,
    load_host_bytes,
)
from finetune.planning.job import Job, Option, Work
from finetune.planning.machine import GIB, Machine
from finetune.planning.shape import ModelShape


@dataclass(frozen=True)
class Plan:
    chosen: Estimate
    machine: Machine
    job: Job
    """What the chosen option was computed from, its micro-batch included."""
    options: list[Estimate]
    parameters: dict[str, int]
    max_micro_batch: int
    """Largest micro-batch of the chosen option that divides the global batch; 0: not even one sequence fits."""
    checkpoint_bytes: int
    export_bytes: int
    load_host_bytes: int
    """Host memory of one node while weights are read."""
    reason: str
    advice: list[str] = field(default_factory=list)
    """Overrides that make it fit, or that it has room for, each with its numbers."""

    @property
    def fits(self) -> bool:
        return self.chosen.fits

    @property
    def micro_batch(self) -> int:
        return self.job.work.micro_batch

    @property
    def accumulation(self) -> int:
        return self.job.work.accumulation

    def to_json(self) -> dict[str, Any]:
        """Return the object of plan.json and of `plan.format=json`."""
        option, machine = self.chosen.option, self.machine
        return {
            "fits": self.fits,
            "chosen": {
                "zero": option.zero,
                "offload_optimizer": option.offload_optimizer,
                "offload_params": option.offload_params,
            },
            "machine": {
                "name": machine.name,
                "gpus": machine.gpus,
                "gpus_per_node": machine.gpus_per_node,
                "gpu_bytes": machine.gpu_bytes,
                "host_bytes": machine.host_bytes,
                "disk_bytes": machine.disk_bytes,
            },
            "options": [option.to_json() for option in self.options],
            "parameters": self.parameters,
            "world_size": self.job.world_size,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "max_micro_batch": self.max_micro_batch,
            "checkpoint_bytes": self.checkpoint_bytes,
            "export_bytes": self.export_bytes,
            "load_host_bytes": self.load_host_bytes,
            "reason": self.reason,
            "advice": self.advice,
        }


def plan(cfg: Config, machine: Machine, shape: ModelShape, world_size: int) -> Plan:
    """Estimate every option for `cfg` on `machine` and choose one.

    Raises:
        UserError: the configuration asks for something that DeepSpeed cannot do.
    """

    refuse(cfg, machine)
    auto = cfg.train.micro_batch == "auto"
    job = build_job(cfg, machine, shape, world_size)
    wanted = wanted_options(cfg, job)
    chosen, job = choose(job, wanted, auto)
    listed = dict.fromkeys([*all_options(job, cfg.zero.nvme_path), *wanted])
    return Plan(
        chosen=chosen,
        machine=machine,
        job=job,
        options=[estimate(job, option) for option in listed],
        parameters={"total": shape.total(job.adapter), "trainable": shape.trainable(job.adapter)},
        max_micro_batch=largest_micro_batch(job, chosen.option) or 0,
        checkpoint_bytes=checkpoint_bytes(job),
        export_bytes=export_bytes(job),
        load_host_bytes=load_host_bytes(job, chosen.option),
        reason=_reason(cfg, job, chosen, wanted),
        advice=advise(cfg, job, chosen),
    )


def build_job(cfg: Config, machine: Machine, shape: ModelShape, world_size: int) -> Job:
    """Collect the values of `cfg` that bytes depend on.

    `train.micro_batch=auto` starts from one sequence.
    """
    train = cfg.train
    micro = 1 if train.micro_batch == "auto" else int(train.micro_batch)
    work = Work(
        micro,
        cfg.task.max_length,
        1,
        cfg.model.dtype.value,
        train.packing,
        train.activation_checkpointing,
    )
    kept = cfg.checkpoint.keep + 1 if cfg.checkpoint.every else 1
    evaluated = train.eval_batch * cfg.task.max_length if cfg.data.eval else 0
    job = Job(
        shape,
        cfg.adapter,
        work,
        world_size,
        machine,
        train.global_batch,
        cfg.zero.bucket_elements,
        evaluated,
        kept,
    )
    return job.with_micro_batch(micro)


def choose(job: Job, wanted: list[Option], auto_micro_batch: bool = False) -> tuple[Estimate, Job]:
    """Return the first of `wanted` that fits, or the one that exceeds memory by the least.

    The second value is the job that the estimate was computed for.
    """
    for option in wanted:
        micro = largest_micro_batch(job, option) if auto_micro_batch else job.work.micro_batch
        if micro is None:
            continue
        candidate = job.with_micro_batch(micro)
        found = estimate(candidate, option)
        if found.fits:
            return found, candidate
    return min(
        (estimate(job, option) for option in wanted), key=lambda found: _overshoot(job, found)
    ), job


def largest_micro_batch(job: Job, option: Option) -> Optional[int]:
    """Return the largest divisor of each rank's share of the global batch that fits, or None."""
    for micro in _divisors(max(1, job.global_batch // job.world_size)):
        if estimate(job.with_micro_batch(micro), option).fits:
            return micro
    return None


def _divisors(number: int) -> Iterator[int]:
    """Yield the divisors in descending order, so that the first one that fits is the answer."""
    return (divisor for divisor in range(number, 0, -1) if number % divisor == 0)


def _overshoot(job: Job, found: Estimate) -> float:
    """Return the need for the scarcest memory as a multiple of its size."""
    if found.short in (
        "disk",
        "nvme",
    ):  # no option saves disk, so it ranks behind memory
        return found.disk_bytes / max(
            1, job.machine.nvme_bytes or 0 if found.short == "nvme" else job.machine.disk_bytes
        )
    host = found.host_bytes / max(1, job.machine.host_bytes)
    return max(host, found.gpu_bytes / max(1, job.machine.gpu_bytes)) if job.on_gpu else host


def _reason(cfg: Config, job: Job, chosen: Estimate, wanted: list[Option]) -> str:
    """Return one sentence on why this option was chosen."""
    if cfg.zero.stage != "auto":
        return f"zero.stage={cfg.zero.stage} was asked for; it {'fits' if chosen.fits else 'does not fit'}."
    if not chosen.fits:
        return f"No option fits; {chosen.option} comes closest ({missing(job, chosen)})."
    before = wanted[: wanted.index(chosen.option)]
    if not before:
        return f"{chosen.option} is the fastest and fits."
    last = estimate(job, before[-1])
    return f"{chosen.option} is the fastest that fits; {last.option} is faster but does not ({missing(job, last)})."


def missing(job: Job, found: Estimate) -> str:
    """Describe what a misfit lacks, e.g. "it needs 95.20 GiB of 80.00 GiB on the GPU"."""
    machine = job.machine
    need, have, where = {
        "gpu": (found.gpu_bytes, machine.gpu_bytes, "on the GPU"),
        "host": (
            max(found.host_bytes, load_host_bytes(job, found.option)),
            machine.host_bytes,
            "of host memory",
        ),
        "disk": (found.disk_bytes, machine.disk_bytes, "on disk"),
        "nvme": (found.disk_bytes, machine.nvme_bytes or 0, "on nvme"),
    }.get(found.short, (0, 0, "more"))
    return f"it needs {gib(need)} {where}, there are {gib(have)}"


# All options, which of them a configuration allows, and the order in which they are tried.
#
# Fastest first, for the reasons given in docs/memory.md. An explicit zero.stage or offload narrows
# the list.
REPLICATED = Option(0)
PLAIN = (Option(1), Option(2), Option(3))
OPTIMIZER_OFFLOAD = (Option(1, "cpu"), Option(2, "cpu"), Option(3, "cpu"))
PARAM_OFFLOAD = (Option(3, "none", "cpu"), Option(3, "cpu", "cpu"))
NVME_OFFLOAD = (Option(3, "nvme"), Option(3, "nvme", "cpu"), Option(3, "nvme", "nvme"))
TINY_STATES = 0.01
"""An adapter below this share of the model's parameters gains nothing from sharding its states."""


def all_options(job: Job, nvme_path: str | None) -> list[Option]:
    """Return every sensible option.

    Without GPUs the host is the device, so offloading moves nothing.
    """
    options = [REPLICATED, *PLAIN]
    if job.on_gpu:
        options += [*OPTIMIZER_OFFLOAD, *PARAM_OFFLOAD]
    if job.on_gpu and nvme_path:
        options += NVME_OFFLOAD
    return options


def wanted_options(cfg: Config, job: Job) -> list[Option]:
    """Return the options that `cfg.zero` allows, fastest first; never empty."""
    offloads = (cfg.zero.offload_optimizer.value, cfg.zero.offload_params.value)
    if cfg.zero.stage != "auto":
        return [Option(int(cfg.zero.stage), *offloads)]
    order = [option for option in all_options(job, cfg.zero.nvme_path) if option != REPLICATED]
    if _replicates(job):
        order.insert(0, REPLICATED)
    allowed = [option for option in order if _matches(option, *offloads)]
    return allowed or [Option(3 if offloads[1] != "none" or "nvme" in offloads else 1, *offloads)]


def _replicates(job: Job) -> bool:
    """Tell whether stage 0 is worth trying first.

    With several ranks, it is only if there is next to nothing to shard. Besides, stage 0 sums the
    gradients of micro-steps in the weights' own precision, so that must be fp32, or there must be a
    single micro-step.
    """
    exact = job.work.accumulation == 1 or job.work.element_bytes == 4
    tiny = job.shape.trainable(job.adapter) < TINY_STATES * job.shape.parameters()
    return exact and (job.world_size == 1 or tiny)


def _matches(option: Option, optimizer: str, params: str) -> bool:
    """Tell whether an option has the requested offloading.

    `none` is also the default, so it constrains nothing; anything else was asked for.
    """
    return optimizer in ("none", option.offload_optimizer) and params in (
        "none",
        option.offload_params,
    )


def refuse(cfg: Config, machine: Machine) -> None:
    """Raise UserError for anything that DeepSpeed cannot do."""
    zero = cfg.zero
    if cfg.model.dtype is Dtype.fp16 and machine.gpus == 0:
        raise UserError(
            "fp16 training needs a GPU", "model.dtype", "Try model.dtype=bf16 or model.dtype=fp32."
        )
    if zero.stage not in ("auto", 3, "3") and zero.offload_params is not Offload.none:
        raise UserError(
            f"zero.offload_params={zero.offload_params.value} needs stage 3, not {zero.stage}",
            "",
            "Try zero=stage3.",
        )
    if zero.stage in (0, "0") and zero.offload_optimizer is not Offload.none:
        raise UserError(
            "stage 0 cannot offload the optimizer", "zero.offload_optimizer", "Try zero=stage1."
        )
    if zero.stage not in ("auto", 3, "3") and zero.offload_optimizer is Offload.nvme:
        raise UserError(
            f"zero.offload_optimizer=nvme needs stage 3, not {zero.stage}",
            "",
            "Try zero=stage3, or offload it to cpu.",
        )
    if Offload.nvme in (zero.offload_optimizer, zero.offload_params) and not zero.nvme_path:
        raise UserError(
            "nvme offload needs a folder", "zero.nvme_path", "Try zero.nvme_path=/local/nvme."
        )


# Advice: overrides that make a misfit fit, or that a fitting plan has room for, with their numbers.
#
# Every piece of advice is planned, not guessed: the job is changed, all options are estimated
# again, and only what fits is returned.
MOST_GPUS = 256


def advise(cfg: Config, job: Job, chosen: Estimate) -> list[str]:
    return list(_room(job, chosen)) if chosen.fits else list(_remedies(cfg, job))


def after_overflow(
    cfg: Config, planned: Plan, gpu_bytes: Optional[int] = None, host_bytes: Optional[int] = None
) -> list[tuple[str, str]]:
    """Return (overrides, numbers) to try after memory ran out, the cheapest change first.

    Args:
        gpu_bytes, host_bytes: limit for predictions, lower than the machine's; None: the machine's.
    """
    machine = planned.machine
    less = replace(machine, gpu_bytes=min(machine.gpu_bytes, gpu_bytes or machine.gpu_bytes),
                   host_bytes=min(machine.host_bytes, host_bytes or machine.host_bytes))  # fmt: skip
    job = replace(planned.job, machine=less)
    found = []
    for overrides, changed in _smaller(cfg, job, planned):
        best = _best(cfg, changed)
        if best and _words(best.option) != _words(planned.chosen.option):
            overrides = f"{overrides} {_words(best.option)}".strip()
        if best and overrides:
            found.append((overrides, _numbers(changed, best)))
    return found


def _smaller(cfg: Config, job: Job, planned: Plan) -> Iterator[tuple[str, Job]]:
    """Yield another way to shard, then a smaller micro-batch, then what changes the run."""
    yield "", job
    micro = largest_micro_batch(job, planned.chosen.option)
    if micro and micro < job.work.micro_batch:
        yield f"train.micro_batch={micro}", job.with_micro_batch(micro)
    yield from (change for change in _changes(cfg, job) if change[0] != "zero=auto")


def _words(option: Option) -> str:
    offloads = (
        ("offload_optimizer", option.offload_optimizer),
        ("offload_params", option.offload_params),
    )
    return " ".join(
        [
            f"zero={option.zero}",
            *(f"zero.{key}={place}" for key, place in offloads if place != "none"),
        ]
    )


def _room(job: Job, chosen: Estimate) -> Iterator[str]:
    """Yield the changes that a fitting plan could still afford."""
    micro = largest_micro_batch(job, chosen.option)
    if micro and micro > job.work.micro_batch:
        yield f"train.micro_batch={micro} fits too"
    for kind, gain in ((False, "saves a forward"), ("selective", "saves nearly a forward")):
        if job.work.rebuilds:
            lighter = _estimate(
                replace(job, work=replace(job.work, checkpointing=kind)), [chosen.option]
            )
            if lighter:
                yield f"train.activation_checkpointing={str(kind).lower()} fits too ({_numbers(job, lighter)}) and {gain}"
                return


def _remedies(cfg: Config, job: Job) -> Iterator[str]:
    """Yield single changes, cheapest first.

    Then yield the same ones with a smaller batch and checkpointing.
    """
    chosen, _ = choose(job, wanted_options(cfg, job))
    if chosen.short in ("disk", "nvme"):  # no change to the run shrinks what it must write
        yield f"free disk space: {missing(job, chosen)}"
        return
    for overrides, changed in _changes(cfg, job):
        found = _best(cfg, changed)
        if found:
            yield f"{overrides}: {found.option}, {_numbers(changed, found)}"
    if job.on_gpu:
        gpus = _enough_gpus(cfg, job)
        if gpus:
            yield gpus
    else:
        yield _enough_memory(cfg, job)
        yield "debug=tiny: the same command with the tiny GPT-J that ships with the project"


def _changes(cfg: Config, job: Job) -> Iterator[tuple[str, Job]]:
    work = job.work
    lighter = replace(job, work=replace(work, checkpointing=True))
    yield "zero=auto", job
    if not work.checkpointing:
        yield (
            "train.activation_checkpointing=selective",
            replace(job, work=replace(work, checkpointing="selective")),
        )
    if not work.rebuilds:
        yield "train.activation_checkpointing=true", lighter
    if work.checkpointing is True and job.on_gpu:
        yield (
            "train.activation_checkpointing=offload",
            replace(job, work=replace(work, checkpointing="offload")),
        )
    if work.micro_batch > 1:
        yield "train.micro_batch=1", job.with_micro_batch(1)
    if work.max_length > 512:
        yield (
            f"task.max_length={work.max_length // 2}",
            replace(job, work=replace(work, max_length=work.max_length // 2)),
        )
    if job.full:
        yield "adapter=lora", replace(job, adapter=LoraConfig())
    if job.full and not work.rebuilds:
        yield (
            "adapter=lora train.activation_checkpointing=true",
            replace(lighter, adapter=LoraConfig()),
        )
    if work.micro_batch > 1 and not work.rebuilds:
        yield "train.activation_checkpointing=true train.micro_batch=1", lighter.with_micro_batch(1)
    if job.full and work.micro_batch > 1:
        yield (
            "adapter=lora train.activation_checkpointing=true train.micro_batch=1",
            replace(lighter, adapter=LoraConfig()).with_micro_batch(1),
        )


def _best(cfg: Config, job: Job) -> Optional[Estimate]:
    return _estimate(job, _auto_options(cfg, job))


def _auto_options(cfg: Config, job: Job) -> list[Option]:
    """Return every option that `zero=auto` would try, whatever the configuration asks for."""
    free = replace(
        cfg.zero, stage="auto", offload_optimizer=Offload.none, offload_params=Offload.none
    )
    return wanted_options(replace(cfg, zero=free), job)


def _estimate(job: Job, options: list[Option]) -> Optional[Estimate]:
    found, _ = choose(job, options)
    return found if found.fits else None


def _enough_gpus(cfg: Config, job: Job) -> Optional[str]:
    """Return the smallest number of GPUs like these that is enough without any other change."""
    gpus = job.machine.gpus + 1
    while gpus <= MOST_GPUS:
        machine = replace(
            job.machine, gpus=gpus, gpus_per_node=min(gpus, max(8, job.machine.gpus_per_node))
        )
        bigger = replace(job, machine=machine).with_ranks(gpus)
        found = _best(cfg, bigger)
        if found:
            return f"machine.gpus={gpus}: {found.option}, {_numbers(bigger, found)} each"
        gpus += 1 if gpus < 8 else 8
    return None


def _enough_memory(cfg: Config, job: Job) -> str:
    """Return the smallest memory of a machine without GPUs that is enough without other changes.

    The memory is given in whole GiB.
    """
    unlimited = replace(job, machine=replace(job.machine, host_bytes=2**60))
    options = {option: estimate(unlimited, option) for option in _auto_options(cfg, unlimited)}
    need = {
        option: max(found.host_bytes, load_host_bytes(unlimited, option))
        for option, found in options.items()
    }
    least = min(need, key=lambda option: need[option])
    return f"machine.host_gib={-(-need[least] // GIB)} (free, on such a machine): {least}"


def _numbers(job: Job, found: Estimate) -> str:
    if not job.on_gpu:
        return f"{gib(found.host_bytes)} of {gib(job.machine.host_bytes)}"
    return f"{gib(found.gpu_bytes)} of {gib(job.machine.gpu_bytes)} per GPU, host {gib(found.host_bytes)}"
