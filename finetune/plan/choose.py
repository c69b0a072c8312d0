"""Choose how to shard: the fastest option that fits, and the largest micro-batch that goes with it.

Flow: `plan(cfg, machine, shape, world_size)` -> `Plan`. Every sensible option is estimated; an explicit zero.stage is
taken as it is, `auto` takes the first one in the order of options.py that fits. Nothing fits: the one that comes
closest, with `fits` false and advice that would change it (advice.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from finetune.config import Config
from finetune.errors import gib
from finetune.plan.estimate import Estimate, checkpoint_bytes, estimate, export_bytes, load_host_bytes
from finetune.plan.job import Job, Option, Work
from finetune.plan.machine import Machine
from finetune.plan.options import all_options, refuse, wanted_options
from finetune.shape import ModelShape


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
        """The object of plan.json and of `plan.format=json`."""
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
        UserError: the configuration asks for what DeepSpeed cannot do.
    """
    from finetune.plan.advice import advise  # it plans alternatives, so it imports this module

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
    """The values of `cfg` that bytes depend on; `train.micro_batch=auto` starts from one sequence."""
    train = cfg.train
    micro = 1 if train.micro_batch == "auto" else int(train.micro_batch)
    work = Work(micro, cfg.task.max_length, 1, cfg.model.dtype.value, train.packing, train.activation_checkpointing)
    kept = cfg.checkpoint.keep + 1 if cfg.checkpoint.every else 1
    evaluated = train.eval_batch * cfg.task.max_length if cfg.data.eval else 0
    job = Job(
        shape, cfg.adapter, work, world_size, machine, train.global_batch, cfg.zero.bucket_elements, evaluated, kept
    )
    return job.with_micro_batch(micro)


def choose(job: Job, wanted: list[Option], auto_micro_batch: bool = False) -> tuple[Estimate, Job]:
    """The first of `wanted` that fits, or the one that misses by least; with it the job it was computed for."""
    for option in wanted:
        micro = largest_micro_batch(job, option) if auto_micro_batch else job.work.micro_batch
        if micro is None:
            continue
        candidate = job.with_micro_batch(micro)
        found = estimate(candidate, option)
        if found.fits:
            return found, candidate
    return min((estimate(job, option) for option in wanted), key=lambda found: _overshoot(job, found)), job


def largest_micro_batch(job: Job, option: Option) -> Optional[int]:
    """The largest divisor of each rank's share of the global batch that fits, or None."""
    for micro in _divisors(max(1, job.global_batch // job.world_size)):
        if estimate(job.with_micro_batch(micro), option).fits:
            return micro
    return None


def _divisors(number: int) -> Iterator[int]:
    """Descending, so that the first one that fits is the answer."""
    return (divisor for divisor in range(number, 0, -1) if number % divisor == 0)


def _overshoot(job: Job, found: Estimate) -> float:
    """How many times the scarcest memory is needed."""
    if found.short in ("disk", "nvme"):  # no option saves disk: it stands behind what memory decides
        return found.disk_bytes / max(1, job.machine.nvme_bytes or 0 if found.short == "nvme" else job.machine.disk_bytes)
    host = found.host_bytes / max(1, job.machine.host_bytes)
    return max(host, found.gpu_bytes / max(1, job.machine.gpu_bytes)) if job.on_gpu else host


def _reason(cfg: Config, job: Job, chosen: Estimate, wanted: list[Option]) -> str:
    """One sentence: why this option."""
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
    """What a misfit lacks, e.g. "it needs 95.20 GiB of 80.00 GiB on the GPU"."""
    machine = job.machine
    need, have, where = {
        "gpu": (found.gpu_bytes, machine.gpu_bytes, "on the GPU"),
        "host": (max(found.host_bytes, load_host_bytes(job, found.option)), machine.host_bytes, "of host memory"),
        "disk": (found.disk_bytes, machine.disk_bytes, "on disk"),
        "nvme": (found.disk_bytes, machine.nvme_bytes or 0, "on nvme"),
    }.get(found.short, (0, 0, "more"))
    return f"it needs {gib(need)} {where}, there are {gib(have)}"
