"""The plan as text: an aligned table of all options, what was chosen and why, and what to change.

`readme_table` plans GPT-J-6B on common GPUs and returns markdown. Knows nothing of how the numbers come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.config import AdapterConfig, Config, FullConfig, LoraConfig, ModelConfig, TaskConfig, TrainConfig
from finetune.errors import gib
from finetune.plan.choose import Plan, plan
from finetune.plan.estimate import PARTS, Estimate
from finetune.plan.machine import GIB, Machine
from finetune.shape import load_shape

HEADS = {"optimizer": "optim", "activations": "activ", "gradients": "grads", "workspace": "work"}
README_GPUS = (1, 2, 4, 8)
README_GIB = (24, 40, 80)
README_HOST_GIB = 256
SHORT = {"gpu": "GPU", "host": "host", "disk": "disk", "nvme": "nvme"}


def render_table(plan: Plan) -> str:
    """The plan for people, in GiB; fits 120 columns."""
    lines = [_headline(plan), "", *_options_table(plan), "", *_summary(plan)]
    if plan.advice:
        lines += [
            "",
            "What would fit:" if not plan.fits else "Room for more:",
            *(f"  {advice}" for advice in plan.advice),
        ]
    return "\n".join(lines)


def _headline(plan: Plan) -> str:
    work, count = plan.job.work, plan.parameters
    ranks = plural(plan.job.world_size, "rank")
    batch = plan.job.world_size * plan.micro_batch * plan.accumulation
    kind = "" if work.checkpointing is True else f" ({work.checkpointing})"
    checkpointing = f", activation checkpointing{kind}" if work.checkpointing else ""
    return (
        f"{count['total'] / 1e6:,.1f} M parameters, {count['trainable'] / 1e6:,.2f} M trained, {work.dtype}; "
        f"{ranks} on {plan.machine.name or 'this machine'}\n"
        f"{ranks} x micro-batch {plan.micro_batch} x accumulation {plan.accumulation} = {batch} sequences "
        f"of {work.max_length} tokens per step{checkpointing}"
    )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _options_table(plan: Plan) -> list[str]:
    device = "GPU" if plan.job.on_gpu else "rank"
    head = ["", "stage", "states", "weights", device, "host", "disk", *(HEADS.get(part, part) for part in PARTS), ""]
    rows = [_row(plan, option) for option in plan.options]
    return [
        "GiB per rank; host and disk per node. states, weights: where they live",
        *align([head, *rows], left=(0, 1, 2, 3, len(head) - 1)),
    ]


def _row(plan: Plan, option: Estimate) -> list[str]:
    chosen = option.option == plan.chosen.option
    places = [
        "gpu" if place == "none" else place for place in (option.option.offload_optimizer, option.option.offload_params)
    ]
    if not plan.job.on_gpu:
        places = ["host", "host"]
    sizes = [option.gpu_bytes, option.host_bytes, option.disk_bytes, *(option.parts[part] for part in PARTS)]
    verdict = "fits" if option.fits else f"{SHORT[option.short]} too small"
    return [
        "->" if chosen else "",
        str(option.option.stage),
        *places,
        *(f"{size / GIB:.2f}" for size in sizes),
        verdict,
    ]


def align(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Columns padded to their widest cell, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def _summary(plan: Plan) -> list[str]:
    limit = f", limit {gib(plan.machine.gpu_bytes)} per GPU" if plan.job.on_gpu else ""
    lines = [
        f"{'Chosen' if plan.fits else 'NOTHING FITS'}: {plan.reason}",
        f"Limits: host {gib(plan.machine.host_bytes)}, disk {gib(plan.machine.disk_bytes)}{limit}",
    ]
    if plan.max_micro_batch:
        lines.append(f"Largest micro-batch: {plan.max_micro_batch} (train.micro_batch={plan.max_micro_batch})")
    lines.append(
        f"On disk: checkpoint {gib(plan.checkpoint_bytes)}, export {gib(plan.export_bytes)}; "
        f"host memory while loading {gib(plan.load_host_bytes)}"
    )
    return lines


# ---------------------------------------------------------------------- README


def readme_table() -> str:
    """Markdown: the stage that zero=auto takes for GPT-J-6B (bf16, 2048 tokens, micro-batch 1, checkpointing), GiB."""
    head = "| GPUs | " + " | ".join(f"{kind}, {size} GB" for kind in ("full", "LoRA") for size in README_GIB) + " |"
    lines = [head, "|--:|" + "---|" * (2 * len(README_GIB))]
    for gpus in README_GPUS:
        cells = [_readme_cell(gpus, size, adapter) for adapter in (FullConfig(), LoraConfig()) for size in README_GIB]
        lines.append(f"| {gpus} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _readme_cell(gpus: int, gpu_gib: int, adapter: AdapterConfig) -> str:
    made = plan_6b(gpus, gpu_gib, adapter)
    if not made.fits:
        return "no"
    option, host = made.chosen.option, ""
    if option.offload_optimizer != "none" or option.offload_params != "none":
        host = f" + host {made.chosen.host_bytes / GIB:.0f}"
    return f"stage {option.stage}: {made.chosen.gpu_bytes / GIB:.0f}{host}"


def plan_6b(gpus: int, gpu_gib: int, adapter: AdapterConfig, **train: object) -> Plan:
    """GPT-J-6B at 2048 tokens, 64 sequences a step, on GPUs that are not here."""
    shape = load_shape("asset:gptj_6b")
    settings = replace(TrainConfig(global_batch=64, micro_batch=1, activation_checkpointing=True), **train)  # type: ignore[arg-type]
    cfg = Config(model=ModelConfig(path="asset:gptj_6b"), task=TaskConfig(), adapter=adapter, train=settings)
    machine = Machine(gpus, min(gpus, 8), gpu_gib * GIB, README_HOST_GIB * GIB, 2000 * GIB)
    return plan(cfg, machine, shape, gpus)
