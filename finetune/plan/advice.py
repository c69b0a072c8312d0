"""What to change: overrides that make a misfit fit, or that a fitting plan has room for, each with its numbers.

Every piece of advice is planned, not guessed: the job is changed, all options are estimated again, and only what fits
is returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Optional

from finetune.config import Config, LoraConfig, Offload
from finetune.errors import gib
from finetune.plan.choose import Plan, choose, largest_micro_batch, missing
from finetune.plan.estimate import Estimate, estimate, load_host_bytes
from finetune.plan.job import Job, Option
from finetune.plan.machine import GIB
from finetune.plan.options import wanted_options

MOST_GPUS = 256


def advise(cfg: Config, job: Job, chosen: Estimate) -> list[str]:
    return list(_room(job, chosen)) if chosen.fits else list(_remedies(cfg, job))


def after_overflow(
    cfg: Config, planned: Plan, gpu_bytes: Optional[int] = None, host_bytes: Optional[int] = None
) -> list[tuple[str, str]]:
    """What to type after memory ran out, and its numbers; the cheapest change first.

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
    """Another way to shard, a smaller micro-batch, then what changes the run."""
    yield "", job
    micro = largest_micro_batch(job, planned.chosen.option)
    if micro and micro < job.work.micro_batch:
        yield f"train.micro_batch={micro}", job.with_micro_batch(micro)
    yield from (change for change in _changes(cfg, job) if change[0] != "zero=auto")


def _words(option: Option) -> str:
    offloads = (("offload_optimizer", option.offload_optimizer), ("offload_params", option.offload_params))
    return " ".join([f"zero={option.zero}", *(f"zero.{key}={place}" for key, place in offloads if place != "none")])


def _room(job: Job, chosen: Estimate) -> Iterator[str]:
    """What a fitting plan could still afford."""
    micro = largest_micro_batch(job, chosen.option)
    if micro and micro > job.work.micro_batch:
        yield f"train.micro_batch={micro} fits too"
    for kind, gain in ((False, "saves a forward"), ("selective", "saves nearly a forward")):
        if job.work.rebuilds:
            lighter = _estimate(replace(job, work=replace(job.work, checkpointing=kind)), [chosen.option])
            if lighter:
                yield f"train.activation_checkpointing={str(kind).lower()} fits too ({_numbers(job, lighter)}) and {gain}"
                return


def _remedies(cfg: Config, job: Job) -> Iterator[str]:
    """Changes of one thing each, cheapest first; then the same with a smaller batch and checkpointing."""
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
        yield "train.activation_checkpointing=selective", replace(job, work=replace(work, checkpointing="selective"))
    if not work.rebuilds:
        yield "train.activation_checkpointing=true", lighter
    if work.checkpointing is True and job.on_gpu:
        yield "train.activation_checkpointing=offload", replace(job, work=replace(work, checkpointing="offload"))
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
        yield "adapter=lora train.activation_checkpointing=true", replace(lighter, adapter=LoraConfig())
    if work.micro_batch > 1 and not work.rebuilds:
        yield "train.activation_checkpointing=true train.micro_batch=1", lighter.with_micro_batch(1)
    if job.full and work.micro_batch > 1:
        yield "adapter=lora train.activation_checkpointing=true train.micro_batch=1", replace(
            lighter, adapter=LoraConfig()).with_micro_batch(1)


def _best(cfg: Config, job: Job) -> Optional[Estimate]:
    return _estimate(job, _auto_options(cfg, job))


def _auto_options(cfg: Config, job: Job) -> list[Option]:
    """Everything `zero=auto` would try, whatever the configuration asks for."""
    free = replace(cfg.zero, stage="auto", offload_optimizer=Offload.none, offload_params=Offload.none)
    return wanted_options(replace(cfg, zero=free), job)


def _estimate(job: Job, options: list[Option]) -> Optional[Estimate]:
    found, _ = choose(job, options)
    return found if found.fits else None


def _enough_gpus(cfg: Config, job: Job) -> Optional[str]:
    """The smallest number of GPUs like these that is enough without any other change."""
    gpus = job.machine.gpus + 1
    while gpus <= MOST_GPUS:
        machine = replace(job.machine, gpus=gpus, gpus_per_node=min(gpus, max(8, job.machine.gpus_per_node)))
        bigger = replace(job, machine=machine).with_ranks(gpus)
        found = _best(cfg, bigger)
        if found:
            return f"machine.gpus={gpus}: {found.option}, {_numbers(bigger, found)} each"
        gpus += 1 if gpus < 8 else 8
    return None


def _enough_memory(cfg: Config, job: Job) -> str:
    """The smallest memory, in whole GiB, of a machine without GPUs that is enough without any other change."""
    unlimited = replace(job, machine=replace(job.machine, host_bytes=2**60))
    options = {option: estimate(unlimited, option) for option in _auto_options(cfg, unlimited)}
    need = {option: max(found.host_bytes, load_host_bytes(unlimited, option)) for option, found in options.items()}
    least = min(need, key=lambda option: need[option])
    return f"machine.host_gib={-(-need[least] // GIB)} (free, on such a machine): {least}"


def _numbers(job: Job, found: Estimate) -> str:
    if not job.on_gpu:
        return f"{gib(found.host_bytes)} of {gib(job.machine.host_bytes)}"
    return f"{gib(found.gpu_bytes)} of {gib(job.machine.gpu_bytes)} per GPU, host {gib(found.host_bytes)}"
