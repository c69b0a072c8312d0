"""Choose how to shard: the fastest option that fits, and the largest micro-batch that goes with it.

Flow: `plan(cfg, machine, shape, world_size)` -> `Plan`. Every sensible option is estimated. An
explicit zero.stage is taken as it is; `auto` takes the first one that fits, in the order of the
options below. If nothing fits, the plan holds the option that comes closest, with `fits` false and
advice on what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Optional

from finetune.config import (
    Config,
    FinalCheckpoint,
    LoraConfig,
    Offload,
    OptimName,
    Quantize,
    ZeroConfig,
    own_tokens,
)
from finetune.errors import GIB, gib
from finetune.planning.estimate import (
    Estimate,
    checkpoint_bytes,
    estimate,
    export_bytes,
    load_host_bytes,
)
from finetune.planning.job import Job, Option, Work, sharding_problems
from finetune.planning.machine import Machine
from finetune.planning.shape import ModelShape


@dataclass(frozen=True)
class Plan:
    chosen: Estimate
    machine: Machine
    job: Job
    """The input of the chosen option's estimate, its micro-batch included."""
    options: list[Estimate]
    parameters: dict[str, int]
    max_micro_batch: int
    """Largest micro-batch of the chosen option that divides the global batch; 0: none fits."""
    checkpoint_bytes: int
    export_bytes: int
    load_host_bytes: int
    """Host memory of one node while weights are read."""
    reason: str
    advice: list[str]
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
        option = self.chosen.option
        return {
            "fits": self.fits,
            "chosen": {"zero": option.zero, **option.places},
            "machine": asdict(self.machine),
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
    for problem in sharding_problems(cfg, machine.gpus > 0):
        raise problem
    job = build_job(cfg, machine, shape, world_size)
    wanted = wanted_options(cfg.zero, job)
    chosen, job = choose(job, wanted, cfg.train.micro_batch == "auto")
    listed = dict.fromkeys([*all_options(job, cfg.zero.nvme_path), *wanted])

    before = wanted[: wanted.index(chosen.option)]
    if cfg.zero.stage != "auto":
        verdict = "fits" if chosen.fits else "does not fit"
        reason = f"zero.stage={cfg.zero.stage} was asked for; it {verdict}."
    elif not chosen.fits:
        reason = f"No option fits; {chosen.option} comes closest ({missing(chosen)})."
    elif not before:
        reason = f"{chosen.option} is the fastest and fits."
    else:
        faster = estimate(job, before[-1])
        reason = (
            f"{chosen.option} is the fastest that fits; {faster.option} is faster but does not "
            f"({missing(faster)})."
        )
    return Plan(
        chosen=chosen,
        machine=machine,
        job=job,
        options=[estimate(job, option) for option in listed],
        parameters={
            "total": job.shape.total(job.adapter),
            "trainable": job.shape.trainable(job.adapter),
        },
        max_micro_batch=largest_micro_batch(job, chosen.option) or 0,
        checkpoint_bytes=checkpoint_bytes(job),
        export_bytes=export_bytes(job),
        load_host_bytes=load_host_bytes(job, chosen.option),
        reason=reason,
        advice=(room if chosen.fits else remedies)(cfg.zero, job, chosen),
    )


def build_job(cfg: Config, machine: Machine, shape: ModelShape, world_size: int) -> Job:
    """Collect the values of `cfg` that bytes depend on.

    `train.micro_batch=auto` starts from one sequence.
    """
    train = cfg.train
    micro_batch = 1 if train.micro_batch == "auto" else int(train.micro_batch)
    eval_tokens = train.eval_batch * cfg.task.documents * cfg.task.max_length
    full = cfg.checkpoint.final is FinalCheckpoint.full or cfg.checkpoint.best
    job = Job(
        replace(shape, own_tokens=len(own_tokens(cfg.task))),
        cfg.adapter,
        Work(
            micro_batch=micro_batch,
            max_length=cfg.task.max_length,
            documents=cfg.task.documents,
            accumulation=1,
            dtype=cfg.model.dtype.value,
            packing=train.packing,
            checkpointing=train.activation_checkpointing,
        ),
        world_size,
        machine,
        train.global_batch,
        cfg.zero.bucket_elements,
        optimizer=cfg.optim.name,
        quantize=cfg.model.quantize,
        quantize_double=cfg.model.quantize_double,
        eval_tokens=eval_tokens if cfg.data.evaluates else 0,
        checkpoints_kept=cfg.checkpoint.keep + 1 if cfg.checkpoint.every else int(full),
        weights_kept=cfg.checkpoint.final is FinalCheckpoint.weights and not cfg.checkpoint.every,
    )
    return job.with_micro_batch(micro_batch)


def choose(job: Job, wanted: list[Option], auto_micro_batch: bool = False) -> tuple[Estimate, Job]:
    """Return the first of `wanted` that fits, or the one that exceeds memory by the least.

    The second value is the job that the estimate was computed for.
    """
    for option in wanted:
        micro_batch = largest_micro_batch(job, option) if auto_micro_batch else job.work.micro_batch
        if micro_batch is None:
            continue
        candidate = job.with_micro_batch(micro_batch)
        estimated = estimate(candidate, option)
        if estimated.fits:
            return estimated, candidate

    def overshoot(estimated: Estimate) -> float:
        """Return the need for the scarcest memory as a multiple of its size."""
        # No option saves disk, so it counts only where there is enough memory.
        scarce = [estimated.needs[place] for place in {"gpu", "host", estimated.short}]
        return max(need / max(1, have) for need, have in scarce)

    return min((estimate(job, option) for option in wanted), key=overshoot), job


def largest_micro_batch(job: Job, option: Option) -> Optional[int]:
    """Return the largest divisor of each rank's share of the global batch that fits, or None."""
    share = max(1, job.global_batch // job.world_size)
    for micro_batch in range(share, 0, -1):
        if share % micro_batch == 0 and estimate(job.with_micro_batch(micro_batch), option).fits:
            return micro_batch
    return None


def missing(misfit: Estimate) -> str:
    """Describe what a misfit lacks: `it needs 95.20 GiB on the GPU, there are 80.00 GiB`."""
    where = {
        "gpu": "on the GPU",
        "host": "of host memory",
        "disk": "on disk",
        "nvme": "on nvme",
    }
    need, have = misfit.needs[misfit.short]
    return f"it needs {gib(need)} {where[misfit.short]}, there are {gib(have)}"


# ---------------------------------------------------------------------- options

OPTIONS = (
    Option(0),
    Option(1),
    Option(2),
    Option(3),
    Option(1, "cpu"),
    Option(2, "cpu"),
    Option(3, "cpu"),
    Option(3, "none", "cpu"),
    Option(3, "cpu", "cpu"),
    Option(3, "nvme"),
    Option(3, "nvme", "cpu"),
    Option(3, "nvme", "nvme"),
)
"""Every sensible option, the fastest first, for the reasons given in docs/memory.md."""
TINY_STATES = 0.01
"""An adapter below this share of the model's parameters gains nothing from sharding its states."""


def all_options(job: Job, nvme_path: str | None) -> list[Option]:
    """Return the options that this machine has, fastest first.

    Without GPUs the host is the device, so offloading moves nothing.
    """
    places = {"none"} | ({"cpu"} if job.on_gpu else set())
    places |= {"nvme"} if job.on_gpu and nvme_path else set()
    options = [option for option in OPTIONS if places.issuperset(option.places.values())]
    if job.optimizer is OptimName.adafactor:
        return [Option(0)]
    keeps = job.optimizer is not OptimName.adamw
    return [o for o in options if not keeps or o.offload_optimizer == "none"]


def wanted_options(zero: ZeroConfig, job: Job) -> list[Option]:
    """Return the options that `zero` allows, fastest first; never empty."""
    optimizer, params = zero.offload_optimizer.value, zero.offload_params.value
    if zero.stage != "auto":
        return [Option(int(zero.stage), optimizer, params)]
    order = all_options(job, zero.nvme_path)
    if job.optimizer is OptimName.adafactor:
        return order
    # With several ranks, stage 0 is worth trying only if there is next to nothing to shard. It sums
    # the gradients of micro-steps in the weights' own precision, so that must be fp32, or there
    # must be a single micro-step.
    exact = job.work.accumulation == 1 or job.work.element_bytes == 4
    tiny = job.shape.trainable(job.adapter) < TINY_STATES * job.shape.parameters()
    if not exact or not (job.world_size == 1 or tiny):
        order.remove(Option(0))
    # `none` is also the default, so it constrains nothing; anything else was asked for.
    allowed = [
        option
        for option in order
        if optimizer in ("none", option.offload_optimizer)
        and params in ("none", option.offload_params)
    ]
    stage = 3 if params != "none" or optimizer == "nvme" else 1
    return allowed or [Option(stage, optimizer, params)]


# ---------------------------------------------------------------------- advice

# Every piece of advice is planned, not guessed: the job is changed, all options are estimated
# again, and only what fits is returned.
MOST_GPUS = 256
SMALLER = {"optim.name=adamw8bit", "model.quantize=nf4"}
"""Changes that need less memory and hardly change the run."""


def room(zero: ZeroConfig, job: Job, chosen: Estimate) -> list[str]:
    """Return the overrides that a fitting plan could still afford, with their numbers."""
    advice = []
    micro_batch = largest_micro_batch(job, chosen.option)
    if micro_batch and micro_batch > job.work.micro_batch:
        advice.append(f"train.micro_batch={micro_batch} fits too")
    if job.work.rebuilds:
        for kind, gain in ((False, "saves a forward"), ("selective", "saves nearly a forward")):
            work = replace(job.work, checkpointing=kind)
            lighter = estimate(replace(job, work=work), chosen.option)
            if lighter.fits:
                words = f"train.activation_checkpointing={str(kind).lower()}"
                advice.append(f"{words} fits too ({_numbers(job, lighter)}) and {gain}")
                break
    if chosen.option.offloads:
        for steps, changed in _changes(job):
            best = _best(zero, changed)
            if steps.keys() <= SMALLER and best and not best.option.offloads:
                numbers = _numbers(changed, best)
                advice.append(f"{' '.join(steps)} needs no offload: {best.option}, {numbers}")
    return advice


def remedies(zero: ZeroConfig, job: Job, misfit: Estimate) -> list[str]:
    """Return the overrides that make a misfit fit, cheapest first, with their numbers."""
    if misfit.short in ("disk", "nvme"):
        advice = [f"free disk space: {missing(misfit)}"]
        saved = checkpoint_bytes(job) - 4 * job.shape.trainable(job.adapter)
        if misfit.short == "disk" and job.checkpoints_kept == 1:
            need, _ = misfit.needs["disk"]
            advice.append(
                f"checkpoint.final=weights: {gib(need - saved)} on disk; none: still less"
            )
        return advice
    advice: list[str] = []
    enough: list[tuple[set[str], bool]] = []
    for steps, changed in _changes(job):
        best = _best(zero, changed)
        # Further changes to what is enough already are worth it only if they spare an offload.
        fewer = [offloads for words, offloads in enough if words < steps.keys()]
        if best and (not fewer or (all(fewer) and not best.option.offloads)):
            enough.append((set(steps), best.option.offloads))
            words = f"{' '.join(steps)}: {best.option}, {_numbers(changed, best)}"
            advice.append("; ".join([words, *_savings(job, steps, Option(misfit.option.stage))]))
    if not job.on_gpu:
        # The smallest memory that is enough without other changes, in whole GiB.
        needs = {
            option: estimate(job, option).needs["host"][0]
            for option in wanted_options(_auto(zero), job)
        }
        least = min(needs, key=needs.__getitem__)
        host_gib = ceil(needs[least] / GIB)
        advice.append(f"machine.host_gib={host_gib} (free, on such a machine): {least}")
        advice.append(
            "debug=tiny: the same command with the tiny GPT-J that ships with the project"
        )
        return advice
    # The smallest number of GPUs like these that is enough without any other change.
    gpus, per_node = job.machine.gpus + 1, max(8, job.machine.gpus_per_node)
    while gpus <= MOST_GPUS:
        machine = replace(job.machine, gpus=gpus, gpus_per_node=min(gpus, per_node))
        bigger = replace(job, machine=machine).with_ranks(gpus)
        if best := _best(zero, bigger):
            advice.append(f"machine.gpus={gpus}: {best.option}, {_numbers(bigger, best)} each")
            break
        gpus += 1 if gpus < 8 else 8
    return advice


def after_overflow(
    cfg: Config, planned: Plan, gpu_bytes: Optional[int] = None, host_bytes: Optional[int] = None
) -> list[tuple[str, str]]:
    """Return (overrides, numbers) to try after memory ran out, the cheapest change first.

    First another way to shard, then a smaller micro-batch, then what changes the run.

    Args:
        gpu_bytes, host_bytes: limit for predictions, lower than the machine's; None: the machine's.
    """
    machine, option = planned.machine, planned.chosen.option
    less = replace(
        machine,
        gpu_bytes=min(machine.gpu_bytes, gpu_bytes or machine.gpu_bytes),
        host_bytes=min(machine.host_bytes, host_bytes or machine.host_bytes),
    )
    job = replace(planned.job, machine=less)
    changes = [("", job)]
    micro_batch = largest_micro_batch(job, option)
    if micro_batch and micro_batch < job.work.micro_batch:
        changes.append((f"train.micro_batch={micro_batch}", job.with_micro_batch(micro_batch)))
    changes += [(" ".join(steps), changed) for steps, changed in _changes(job)][1:]

    smaller = []
    for overrides, changed in changes:
        best = _best(cfg.zero, changed)
        if best and best.option != option:
            overrides = f"{overrides} {_words(best.option)}".strip()
        if best and overrides:
            smaller.append((overrides, _numbers(changed, best)))
    return smaller


def _changes(job: Job) -> Iterator[tuple[dict[str, Job], Job]]:
    """Yield (override -> the job with it and those before, the job with all of them).

    Single changes come first, then combinations, the mildest first.
    """
    work, half = job.work, job.work.max_length // 2
    key = "train.activation_checkpointing"
    checkpointed, small = f"{key}=true", "train.micro_batch=1"
    adam8, nf4, lora = "optim.name=adamw8bit", "model.quantize=nf4", "adapter=lora"

    def with_work(**changes: Any) -> Callable[[Job], Job]:
        return lambda job: replace(job, work=replace(job.work, **changes))

    # Override -> does it change anything, and how.
    singles: dict[str, tuple[bool, Callable[[Job], Job]]] = {
        "zero=auto": (True, lambda job: job),
        f"{key}=selective": (not work.checkpointing, with_work(checkpointing="selective")),
        checkpointed: (not work.rebuilds, with_work(checkpointing=True)),
        f"{key}=offload": (
            work.checkpointing is True and job.on_gpu,
            with_work(checkpointing="offload"),
        ),
        adam8: (
            job.full and job.optimizer is OptimName.adamw,
            lambda job: replace(job, optimizer=OptimName.adamw8bit),
        ),
        nf4: (
            job.quantize is not Quantize.nf4,
            lambda job: replace(job, quantize=Quantize.nf4),
        ),
        small: (work.micro_batch > 1, lambda job: job.with_micro_batch(1)),
        f"task.max_length={half}": (work.max_length > 512, with_work(max_length=half)),
        lora: (job.full, lambda job: replace(job, adapter=LoraConfig())),
    }
    combinations = [
        (checkpointed, small),
        (adam8, checkpointed),
        (nf4, checkpointed),
        (lora, checkpointed),
        (lora, nf4),
        (adam8, checkpointed, small),
        (nf4, checkpointed, small),
        (lora, checkpointed, small),
        (lora, nf4, checkpointed),
    ]
    for words in [*((word,) for word in singles), *combinations]:
        quantises_trained = nf4 in words and job.full and lora not in words
        if quantises_trained or not all(singles[word][0] for word in words):
            continue
        steps, changed = {}, job
        for word in words:
            changed = steps[word] = singles[word][1](changed)
        yield steps, changed


def _savings(job: Job, steps: dict[str, Job], option: Option) -> Iterator[str]:
    """Yield what each change saves beyond those before it, at the same stage without offload."""
    before = estimate(job, option)
    for word, changed in steps.items():
        after = estimate(changed, option)
        saved = (
            before.gpu_bytes - after.gpu_bytes
            if job.on_gpu
            else before.host_bytes - after.host_bytes
        )
        if saved > 0:
            yield f"{word.partition('=')[0]} saves {gib(saved)}"
        before = after


def _best(zero: ZeroConfig, job: Job) -> Optional[Estimate]:
    """Return the first option that fits, whatever the configuration asks for; None: none does."""
    best, _ = choose(job, wanted_options(_auto(zero), job))
    return best if best.fits else None


def _auto(zero: ZeroConfig) -> ZeroConfig:
    return replace(zero, stage="auto", offload_optimizer=Offload.none, offload_params=Offload.none)


def _words(option: Option) -> str:
    """Return the overrides that ask for an option."""
    words = [f"zero.{key}={place}" for key, place in option.places.items() if place != "none"]
    return " ".join([f"zero={option.zero}", *words])


def _numbers(job: Job, estimated: Estimate) -> str:
    host, limits = gib(estimated.host_bytes), job.machine
    if not job.on_gpu:
        return f"{host} of {gib(limits.host_bytes)}"
    return f"{gib(estimated.gpu_bytes)} of {gib(limits.gpu_bytes)} per GPU, host {host}"
