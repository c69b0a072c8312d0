"""The plan as text and as a picture: a table of all options, what was chosen and why, and what to change.

`readme_table` plans GPT-J-6B on common GPUs and returns markdown. Knows nothing of how the numbers come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from finetune.config import (
    AdapterConfig,
    Config,
    FullConfig,
    LoraConfig,
    ModelConfig,
    TaskConfig,
    TrainConfig,
)
from finetune.errors import gib
from finetune.planning.choose import Plan, plan
from finetune.planning.estimate import PARTS, Estimate
from finetune.planning.machine import GIB, Machine
from finetune.planning.shape import load_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    head = [
        "",
        "stage",
        "states",
        "weights",
        device,
        "host",
        "disk",
        *(HEADS.get(part, part) for part in PARTS),
        "",
    ]
    rows = [_row(plan, option) for option in plan.options]
    return [
        "GiB per rank; host and disk per node. states, weights: where they live",
        *align([head, *rows], left=(0, 1, 2, 3, len(head) - 1)),
    ]


def _row(plan: Plan, option: Estimate) -> list[str]:
    chosen = option.option == plan.chosen.option
    places = [
        "gpu" if place == "none" else place
        for place in (option.option.offload_optimizer, option.option.offload_params)
    ]
    if not plan.job.on_gpu:
        places = ["host", "host"]
    sizes = [
        option.gpu_bytes,
        option.host_bytes,
        option.disk_bytes,
        *(option.parts[part] for part in PARTS),
    ]
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
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=False))
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
        lines.append(
            f"Largest micro-batch: {plan.max_micro_batch} (train.micro_batch={plan.max_micro_batch})"
        )
    lines.append(
        f"On disk: checkpoint {gib(plan.checkpoint_bytes)}, export {gib(plan.export_bytes)}; "
        f"host memory while loading {gib(plan.load_host_bytes)}"
    )
    return lines


# ---------------------------------------------------------------------- README


def readme_table() -> str:
    """Markdown: the stage that zero=auto takes for GPT-J-6B (bf16, 2048 tokens, micro-batch 1, checkpointing), GiB."""
    head = (
        "| GPUs | "
        + " | ".join(f"{kind}, {size} GB" for kind in ("full", "LoRA") for size in README_GIB)
        + " |"
    )
    lines = [head, "|--:|" + "---|" * (2 * len(README_GIB))]
    for gpus in README_GPUS:
        cells = [
            _readme_cell(gpus, size, adapter)
            for adapter in (FullConfig(), LoraConfig())
            for size in README_GIB
        ]
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
    settings = replace(
        TrainConfig(global_batch=64, micro_batch=1, activation_checkpointing=True), **train
    )  # type: ignore[arg-type]
    cfg = Config(
        model=ModelConfig(path="asset:gptj_6b"), task=TaskConfig(), adapter=adapter, train=settings
    )
    machine = Machine(gpus, min(gpus, 8), gpu_gib * GIB, README_HOST_GIB * GIB, 2000 * GIB)
    return plan(cfg, machine, shape, gpus)


# plan.png: one stacked bar per option, its parts against the limit of the device.
#
# matplotlib is imported when a picture is asked for: a plan alone starts without it.
COLOURS = {
    "weights": "#4c78a8",
    "gradients": "#72b7b2",
    "optimizer": "#eeca3b",
    "activations": "#f58518",
    "logits": "#b279a2",
    "workspace": "#9d9da1",
}
LIMIT, INK, FAINT = "#c0392b", "#222222", "#666666"


def draw(plan: Plan, path: Union[str, Path]) -> None:
    """Write the picture of `plan` to `path` (png, svg or pdf by its suffix)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(10, 1.9 + 0.42 * len(plan.options)), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _bars(axes, plan)
    _limit(axes, plan)
    _dress(axes, plan)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, plan: Plan) -> None:
    rows = range(len(plan.options))
    start = [0.0] * len(plan.options)
    for part in PARTS:
        sizes = [option.parts[part] / GIB for option in plan.options]
        bars: Any = axes.barh(
            rows,
            sizes,
            left=start,
            height=0.62,
            color=COLOURS[part],
            label=part,
            edgecolor="white",
            linewidth=0.6,
        )
        for bar, option in zip(bars, plan.options, strict=False):
            bar.set_alpha(1.0 if option.fits else 0.45)
        start = [left + size for left, size in zip(start, sizes, strict=False)]
    for row, (total, option) in enumerate(zip(start, plan.options, strict=False)):
        axes.text(
            total,
            row,
            f"  {total:.1f}{'' if option.fits else '  (' + _why(option) + ')'}",
            va="center",
            fontsize=9,
            color=INK if option.fits else FAINT,
        )


def _why(option: Estimate) -> str:
    return {"gpu": "too large", "host": f"host {option.host_bytes / GIB:.0f} GiB"}.get(
        option.short, option.short
    )


def _limit(axes: Axes, plan: Plan) -> None:
    """The device's memory; without GPUs each rank's share of the host. One far away is only named."""
    limit = (
        plan.machine.gpu_bytes
        if plan.job.on_gpu
        else plan.machine.host_bytes // plan.job.ranks_per_node
    ) / GIB
    largest = max(option.gpu_bytes for option in plan.options) / GIB
    label = f"limit {limit:.0f} GiB"
    if limit > 3 * largest:
        axes.text(
            0.995,
            0.02,
            f"{label} (far to the right)",
            transform=axes.transAxes,
            ha="right",
            color=LIMIT,
            fontsize=9,
        )
    else:
        axes.axvline(limit, color=LIMIT, linewidth=1.5, zorder=3)
        place = {
            "xycoords": ("data", "axes fraction"),
            "textcoords": "offset points",
            "va": "bottom",
        }
        axes.annotate(label, (limit, 0), xytext=(5, 4), color=LIMIT, fontsize=9, zorder=4, **place)
        largest = max(largest, limit)
    axes.set_xlim(0, largest * 1.25)


def _dress(axes: Axes, plan: Plan) -> None:
    from matplotlib.patches import Patch

    axes.set_yticks(
        range(len(plan.options)), [_label(plan, option) for option in plan.options], fontsize=9
    )
    for tick, option in zip(axes.get_yticklabels(), plan.options, strict=True):
        tick.set_fontweight("bold" if option.option == plan.chosen.option else "normal")
    axes.set_ylim(len(plan.options) - 0.3, -0.6)
    axes.set_xlabel(
        f"GiB per {'GPU' if plan.job.on_gpu else 'rank'} (faded: does not fit)", fontsize=9
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(_title(plan), loc="left", fontsize=10, color=INK, pad=30)
    handles = [Patch(color=COLOURS[part], label=part) for part in PARTS]
    place = {"loc": "lower left", "bbox_to_anchor": (-0.005, 1.0), "borderaxespad": 0.3}
    axes.legend(
        handles=handles,
        ncols=len(PARTS),
        frameon=False,
        fontsize=9,
        handlelength=1.0,
        columnspacing=1.4,
        **place,
    )


def _label(plan: Plan, option: Estimate) -> str:
    return (
        f"{option.option}  (chosen)" if option.option == plan.chosen.option else str(option.option)
    )


def _title(plan: Plan) -> str:
    work, count = plan.job.work, plan.parameters
    checkpointing = ", checkpointing" if work.checkpointing else ""
    return (
        f"{count['total'] / 1e9:.2f} B parameters, {count['trainable'] / 1e6:,.1f} M trained, {work.dtype}, "
        f"{plural(plan.job.world_size, 'rank')}, micro-batch {work.micro_batch} x {work.max_length} tokens"
        f"{checkpointing}"
    )
