"""The plan as text and as a picture: a table of all options, the choice and its reason, and advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

from finetune.errors import GIB, align, gib, plural
from finetune.planning.choose import Plan
from finetune.planning.estimate import PARTS

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
STYLE: Any = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "font.size": 9,
    "xtick.labelsize": 10,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlepad": 30,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.borderaxespad": 0.3,
    "legend.handlelength": 1.0,
    "legend.columnspacing": 1.4,
}
"""matplotlib's settings for the picture."""


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


# ---------------------------------------------------------------------- plan.png


def draw(plan: Plan, path: Union[str, Path]) -> None:
    """Write the picture of `plan` to `path` (png, svg or pdf by its suffix).

    One stacked bar per option, its parts against the limit of the device.
    """
    # Imported here: a plan alone starts without matplotlib.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1.9 + 0.42 * len(plan.options)))
        FigureCanvasAgg(figure)
        axes = figure.subplots()

        # Bars, faded where the option does not fit.
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
            axes.text(total, row, text, va="center", color=INK if option.fits else FAINT)

        # The device's memory; without GPUs each rank's share of the host. One far away is only
        # named.
        share = plan.machine.host_bytes // plan.job.ranks_per_node
        limit = (plan.machine.gpu_bytes if plan.job.on_gpu else share) / GIB
        largest = max(option.gpu_bytes for option in plan.options) / GIB
        label = f"limit {limit:.0f} GiB"
        if limit > 3 * largest:
            place = {"transform": axes.transAxes, "ha": "right"}
            axes.text(0.995, 0.02, f"{label} (far to the right)", color=LIMIT, **place)
        else:
            axes.axvline(limit, color=LIMIT, linewidth=1.5, zorder=3)
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            place |= {"xytext": (5, 4), "va": "bottom", "zorder": 4}
            axes.annotate(label, (limit, 0), color=LIMIT, **place)
            largest = max(largest, limit)
        axes.set_xlim(0, largest * 1.25)

        # Names of the options, title and legend.
        chosen = [option.option == plan.chosen.option for option in plan.options]
        names = [
            f"{option.option}  (chosen)" if mark else str(option.option)
            for option, mark in zip(plan.options, chosen, strict=True)
        ]
        axes.set_ylim(len(names) - 0.3, -0.6)
        axes.set_yticks(range(len(names)), names)
        axes.get_yticklabels()[chosen.index(True)].set_fontweight("bold")
        device = "GPU" if plan.job.on_gpu else "rank"
        axes.set_xlabel(f"GiB per {device} (faded: does not fit)")
        work, count = plan.job.work, plan.parameters
        axes.set_title(
            f"{count['total'] / 1e9:.2f} B parameters, {count['trainable'] / 1e6:,.1f} M trained, "
            f"{work.dtype}, {plural(plan.job.world_size, 'rank')}, micro-batch {work.micro_batch} "
            f"x {work.max_length} tokens{', checkpointing' if work.checkpointing else ''}"
        )
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.005, 1.0), ncols=len(PARTS))
        for handle in legend.legend_handles:  # the first bar may be faded
            handle.set_alpha(1.0)
        figure.savefig(path)
