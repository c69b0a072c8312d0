"""The plan as text and as a picture: a table of all options, the choice and its reason, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from finetune.errors import gib
from finetune.planning.choose import Plan
from finetune.planning.estimate import PARTS
from finetune.planning.machine import GIB

HEADINGS = {"optimizer": "optim", "activations": "activ", "gradients": "grads", "workspace": "work"}
COLOURS = {
    "weights": "#4c78a8",
    "gradients": "#72b7b2",
    "optimizer": "#eeca3b",
    "activations": "#f58518",
    "logits": "#b279a2",
    "workspace": "#9d9da1",
}
LIMIT, INK, FAINT = "#c0392b", "#222222", "#666666"


def render_table(plan: Plan) -> str:
    """Return the plan for people, in GiB; it fits 120 columns."""
    work, machine, on_gpu = plan.job.work, plan.machine, plan.job.on_gpu
    ranks = plural(plan.job.world_size, "rank")
    batch = plan.job.world_size * plan.micro_batch * plan.accumulation
    kind = "" if work.checkpointing is True else f" ({work.checkpointing})"
    checkpointing = f", activation checkpointing{kind}" if work.checkpointing else ""
    total, trained = plan.parameters["total"] / 1e6, plan.parameters["trainable"] / 1e6
    lines = [
        f"{total:,.1f} M parameters, {trained:,.2f} M trained, {work.dtype}; "
        f"{ranks} on {machine.name or 'this machine'}",
        f"{ranks} x micro-batch {plan.micro_batch} x accumulation {plan.accumulation} = {batch} "
        f"sequences of {work.max_length} tokens per step{checkpointing}",
        "",
    ]

    # The table of options.
    sizes = ["GPU" if on_gpu else "rank", "host", "disk"]
    sizes += [HEADINGS.get(part, part) for part in PARTS]
    rows = [["", "stage", "states", "weights", *sizes, ""]]
    for estimated in plan.options:
        option = estimated.option
        places = [option.offload_optimizer, option.offload_params]
        places = [("gpu" if p == "none" else p) if on_gpu else "host" for p in places]
        bytes_ = [estimated.gpu_bytes, estimated.host_bytes, estimated.disk_bytes]
        bytes_ += [estimated.parts[part] for part in PARTS]
        short = "GPU" if estimated.short == "gpu" else estimated.short
        rows.append(
            [
                "->" if option == plan.chosen.option else "",
                str(option.stage),
                *places,
                *(f"{size / GIB:.2f}" for size in bytes_),
                f"{short} too small" if short else "fits",
            ]
        )
    lines += [
        "GiB per rank; host and disk per node. states, weights: where they live",
        *align(rows, left=(0, 1, 2, 3, len(rows[0]) - 1)),
        "",
    ]

    # The choice, and what else it needs.
    limit = f", limit {gib(machine.gpu_bytes)} per GPU" if on_gpu else ""
    lines += [
        f"{'Chosen' if plan.fits else 'NOTHING FITS'}: {plan.reason}",
        f"Limits: host {gib(machine.host_bytes)}, disk {gib(machine.disk_bytes)}{limit}",
    ]
    if largest := plan.max_micro_batch:
        lines.append(f"Largest micro-batch: {largest} (train.micro_batch={largest})")
    lines.append(
        f"On disk: checkpoint {gib(plan.checkpoint_bytes)}, export {gib(plan.export_bytes)}; "
        f"host memory while loading {gib(plan.load_host_bytes)}"
    )
    if plan.advice:
        lines += ["", "Room for more:" if plan.fits else "What would fit:"]
        lines += [f"  {advice}" for advice in plan.advice]
    return "\n".join(lines)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def align(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Pad columns to their widest cell, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


# ---------------------------------------------------------------------- plan.png


def draw(plan: Plan, path: Union[str, Path]) -> None:
    """Write the picture of `plan` to `path` (png, svg or pdf by its suffix).

    One stacked bar per option, its parts against the limit of the device.
    """
    # Imported here: a plan alone starts without matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (10, 1.9 + 0.42 * len(plan.options))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()

    # Bars.
    start = [0.0] * len(plan.options)
    for part in PARTS:
        sizes = [option.parts[part] / GIB for option in plan.options]
        style: dict[str, Any] = {"color": COLOURS[part], "edgecolor": "white", "linewidth": 0.6}
        bars = axes.barh(range(len(sizes)), sizes, left=start, height=0.62, label=part, **style)
        for bar, option in zip(bars, plan.options, strict=True):
            bar.set_alpha(1.0 if option.fits else 0.45)
        start = [left + size for left, size in zip(start, sizes, strict=True)]
    for row, (total, option) in enumerate(zip(start, plan.options, strict=True)):
        host = f"host {option.host_bytes / GIB:.0f} GiB"
        short = {"gpu": "too large", "host": host}.get(option.short, option.short)
        text = f"  {total:.1f}" if option.fits else f"  {total:.1f}  ({short})"
        colour = INK if option.fits else FAINT
        axes.text(total, row, text, va="center", fontsize=9, color=colour)

    # The device's memory; without GPUs each rank's share of the host. One far away is only named.
    share = plan.machine.host_bytes // plan.job.ranks_per_node
    limit = (plan.machine.gpu_bytes if plan.job.on_gpu else share) / GIB
    largest = max(option.gpu_bytes for option in plan.options) / GIB
    label, style = f"limit {limit:.0f} GiB", {"color": LIMIT, "fontsize": 9}
    if limit > 3 * largest:
        corner = {"transform": axes.transAxes, "ha": "right"}
        axes.text(0.995, 0.02, f"{label} (far to the right)", **corner, **style)
    else:
        axes.axvline(limit, color=LIMIT, linewidth=1.5, zorder=3)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(label, (limit, 0), xytext=(5, 4), va="bottom", zorder=4, **place, **style)
        largest = max(largest, limit)
    axes.set_xlim(0, largest * 1.25)

    # Labels, grid, title and legend.
    chosen = [option.option == plan.chosen.option for option in plan.options]
    names = [f"{option.option}" for option in plan.options]
    names = [f"{n}  (chosen)" if c else n for n, c in zip(names, chosen, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    for tick, bold in zip(axes.get_yticklabels(), chosen, strict=True):
        tick.set_fontweight("bold" if bold else "normal")
    axes.set_ylim(len(names) - 0.3, -0.6)
    device = "GPU" if plan.job.on_gpu else "rank"
    axes.set_xlabel(f"GiB per {device} (faded: does not fit)", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    work, count = plan.job.work, plan.parameters
    title = (
        f"{count['total'] / 1e9:.2f} B parameters, {count['trainable'] / 1e6:,.1f} M trained, "
        f"{work.dtype}, {plural(plan.job.world_size, 'rank')}, micro-batch {work.micro_batch} x "
        f"{work.max_length} tokens{', checkpointing' if work.checkpointing else ''}"
    )
    axes.set_title(title, loc="left", fontsize=10, color=INK, pad=30)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.005, 1.0),
        borderaxespad=0.3,
        ncols=len(PARTS),
        frameon=False,
        fontsize=9,
        handlelength=1.0,
        columnspacing=1.4,
    )
    for handle in axes.get_legend().legend_handles:  # the first bar may be faded
        handle.set_alpha(1.0)
    figure.savefig(path, dpi=150)
