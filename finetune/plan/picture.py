"""plan.png: one stacked bar per option, its parts against the limit of the device.

matplotlib is imported when a picture is asked for: a plan alone starts without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from finetune.plan.choose import Plan
from finetune.plan.estimate import PARTS, Estimate
from finetune.plan.machine import GIB
from finetune.plan.table import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

    figure = Figure(figsize=(10, 1.9 + 0.42 * len(plan.options)), layout="constrained", facecolor="white")
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
            rows, sizes, left=start, height=0.62, color=COLOURS[part], label=part, edgecolor="white", linewidth=0.6
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
    return {"gpu": "too large", "host": f"host {option.host_bytes / GIB:.0f} GiB"}.get(option.short, option.short)


def _limit(axes: Axes, plan: Plan) -> None:
    """The device's memory; without GPUs each rank's share of the host. One far away is only named."""
    limit = (plan.machine.gpu_bytes if plan.job.on_gpu else plan.machine.host_bytes // plan.job.ranks_per_node) / GIB
    largest = max(option.gpu_bytes for option in plan.options) / GIB
    label = f"limit {limit:.0f} GiB"
    if limit > 3 * largest:
        axes.text(
            0.995, 0.02, f"{label} (far to the right)", transform=axes.transAxes, ha="right", color=LIMIT, fontsize=9
        )
    else:
        axes.axvline(limit, color=LIMIT, linewidth=1.5, zorder=3)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom"}
        axes.annotate(label, (limit, 0), xytext=(5, 4), color=LIMIT, fontsize=9, zorder=4, **place)
        largest = max(largest, limit)
    axes.set_xlim(0, largest * 1.25)


def _dress(axes: Axes, plan: Plan) -> None:
    from matplotlib.patches import Patch

    axes.set_yticks(range(len(plan.options)), [_label(plan, option) for option in plan.options], fontsize=9)
    for tick, option in zip(axes.get_yticklabels(), plan.options, strict=True):
        tick.set_fontweight("bold" if option.option == plan.chosen.option else "normal")
    axes.set_ylim(len(plan.options) - 0.3, -0.6)
    axes.set_xlabel(f"GiB per {'GPU' if plan.job.on_gpu else 'rank'} (faded: does not fit)", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(_title(plan), loc="left", fontsize=10, color=INK, pad=30)
    handles = [Patch(color=COLOURS[part], label=part) for part in PARTS]
    place = {"loc": "lower left", "bbox_to_anchor": (-0.005, 1.0), "borderaxespad": 0.3}
    axes.legend(
        handles=handles, ncols=len(PARTS), frameon=False, fontsize=9, handlelength=1.0, columnspacing=1.4, **place
    )


def _label(plan: Plan, option: Estimate) -> str:
    return f"{option.option}  (chosen)" if option.option == plan.chosen.option else str(option.option)


def _title(plan: Plan) -> str:
    work, count = plan.job.work, plan.parameters
    checkpointing = ", checkpointing" if work.checkpointing else ""
    return (
        f"{count['total'] / 1e9:.2f} B parameters, {count['trainable'] / 1e6:,.1f} M trained, {work.dtype}, "
        f"{plural(plan.job.world_size, 'rank')}, micro-batch {work.micro_batch} x {work.max_length} tokens"
        f"{checkpointing}"
    )
