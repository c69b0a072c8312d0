"""Build sweep.html from sweep.json.

The page shows parallel coordinates, the metric against each parameter, and all jobs, best first. A
job's colour is its place among the finished ones, from blue (best) to orange (worst). The page is
written during the sweep and at its end.
"""

from __future__ import annotations

import glob
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.errors import clock, command, figure, number, setting
from finetune.files import read_json, write_atomic
from finetune.reporting.metrics_log import is_number
from finetune.reporting.page.charts import Axis, place, round_axis
from finetune.reporting.page.tables import Tile
from finetune.reporting.page.template import render
from finetune.reporting.terminal_text import evaluate_command

HERE = Path(__file__).parent
SUMMARY, PAGE = "sweep.json", "sweep.html"
MANY, APART = 6, 0.12
"""At most this many different values, this share of the axis apart, are ticks of their own."""
LOG_RATIO = 15.0
"""Positive numbers that spread over more than this factor get a logarithmic axis."""

Row = dict[str, Any]


@dataclass
class Scale:
    """Axis of one parameter or of the metric: value -> place from 0 to 1."""

    key: str
    axis: Axis
    log: bool = False
    categories: list[str] = field(default_factory=list)

    def at(self, value: Any) -> float | None:
        if self.categories:
            text = str(value)
            return (
                (self.categories.index(text) + 0.5) / len(self.categories)
                if text in self.categories
                else None
            )
        return self.axis.at(math.log10(value) if self.log else value) if is_number(value) else None


def build_sweep_page(folder: Path | str) -> Path:
    """Write folder/sweep.html from folder/sweep.json and return its path."""
    folder = Path(folder)
    summary = read_json(folder / SUMMARY)
    return write_atomic(folder / PAGE, render(HERE / "sweep.html", page_context(summary, folder)))


def page_context(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return all variables of the template."""
    jobs, name = summary["jobs"], summary["name"]
    tones = tone_of(jobs)
    values = [job["value"] for job in jobs if is_number(job["value"])]
    metric = metric_scale(summary["metric"], values)
    keys = list(dict.fromkeys(key for job in jobs for key in job["chosen"]))
    scales = [scale_of(key, [value_of(job["chosen"].get(key)) for job in jobs]) for key in keys]
    scatters = [(scale, marks(jobs, scale, metric, tones)) for scale in scales if metric]
    status = "done" if summary["best"] is not None else "failed"
    progress = f"{sum(job['status'] == 'done' for job in jobs)} of {summary['total']} jobs done"
    if summary.get("stopped"):
        status, progress = "preempted", f"{progress}, stopped"
    elif any(job["status"] in ("running", "waiting") for job in jobs):
        status = "running"
    return {
        "name": name if "sweep" in name else f"sweep {name}",
        "folder": str(folder),
        "running": status == "running",
        "status": status,
        "progress": progress,
        "tiles": tiles(summary),
        "axes": [*scales, metric] if keys and metric else [],
        "lines": lines(jobs, scales, metric, tones) if metric else [],
        "scatters": scatters,
        "metric": metric,
        "keys": keys,
        "rows": rows(jobs, keys, tones, folder),
        "heading": summary["metric"],
        "errors": [(f"job {job['job']}", job["error"]) for job in jobs if job["error"]],
        "commands": commands(summary, folder),
    }


def tone_of(jobs: list[Row]) -> dict[int, int]:
    """Map each finished job to its rank, 0 (best) to 100 (worst); `jobs` is sorted best first."""
    finished = [job["job"] for job in jobs if job["status"] == "done"]
    return {
        job: round(100 * place / max(1, len(finished) - 1)) for place, job in enumerate(finished)
    }


def value_of(text: Any) -> Any:
    """Return a typed value as a number if it is one, otherwise as text."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None if text is None else str(text).strip("'\"")


def scale_of(key: str, values: list[Any]) -> Scale | None:
    """Return the axis of a parameter; None if there are no values."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if not all(is_number(value) for value in values):
        names = sorted({str(value) for value in values})
        ticks = [(100 * (i + 0.5) / len(names), name) for i, name in enumerate(names)]
        return Scale(key, Axis(0, 1, ticks), categories=names)
    different = sorted(set(values))
    log = different[0] > 0 and different[-1] / different[0] >= LOG_RATIO
    places = [math.log10(value) if log else value for value in different]
    room = (places[-1] - places[0]) or 1.0
    if len(different) <= MANY and all(b - a >= APART * room for a, b in pairwise(places)):
        # Few values: each is a tick.
        axis = Axis(places[0] - 0.08 * room, places[-1] + 0.08 * room)
        ticks = list(zip(places, different, strict=True))
    elif log:
        # Many values over several powers of ten: the powers are the ticks.
        low, high = math.floor(places[0] + 1e-9), math.ceil(places[-1] - 1e-9)
        axis = Axis(low, max(high, low + 1))
        ticks = [(power, 10.0**power) for power in range(low, max(high, low + 1) + 1)]
    else:
        return Scale(key, round_axis(different[0], different[-1]))
    axis.ticks = [(100 * axis.at(place), swept_value(value)) for place, value in ticks]
    return Scale(key, axis, log)


def metric_scale(name: str, values: list[float]) -> Scale | None:
    """Return the axis of the compared metric, with round ticks."""
    return Scale(name, round_axis(min(values), max(values))) if values else None


def swept_value(value: float) -> str:
    """Format the value of a swept parameter: `3e-05`, `0.25`, `64`."""
    return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.4g}"


def brief(text: str) -> str:
    """Shorten a number of many digits."""
    value = value_of(text)
    return swept_value(value) if is_number(value) and len(str(text)) > 8 else str(text)


def lines(
    jobs: list[Row], scales: list[Scale], metric: Scale, tones: dict[int, int]
) -> list[dict[str, Any]]:
    """Return one line per job, worst first, so that the best is drawn on top.

    Lines of jobs without a metric end at the last parameter.
    """
    drawn = []
    for job in reversed(jobs):
        heights = [scale.at(value_of(job["chosen"].get(scale.key))) for scale in scales]
        heights.append(metric.at(job["value"]))
        points = [place(n / len(scales), y) for n, y in enumerate(heights) if y is not None]
        if len(points) > 1:
            drawn.append({**_look(job, tones), "d": "M" + "L".join(points)})
    return drawn


def marks(
    jobs: list[Row], scale: Scale, metric: Scale, tones: dict[int, int]
) -> list[dict[str, Any]]:
    """Return one mark per job where a parameter meets the metric: x and y in percent."""
    drawn = []
    for job in reversed(jobs):
        x, y = scale.at(value_of(job["chosen"].get(scale.key))), metric.at(job["value"])
        if x is not None and y is not None:
            chosen, value = job["chosen"][scale.key], figure(job["value"])
            text = f"job {job['job']}: {scale.key}={chosen}, {metric.key} {value}"
            at = {"x": round(100 * x, 2), "y": round(100 * y, 2)}
            drawn.append({**_look(job, tones), **at, "text": text})
    return drawn


def _look(job: Row, tones: dict[int, int]) -> dict[str, Any]:
    tone = tones.get(job["job"], 100)
    return {"job": job["job"], "tone": tone, "ended": job["status"] == "done"}


def rows(
    jobs: list[Row], keys: list[str], tones: dict[int, int], folder: Path
) -> list[dict[str, Any]]:
    """Return the rows of the table; each job links to its page, or to its output if it has none."""
    shown = []
    for job in jobs:
        page = f"{job['job']}/report.html"
        cells = [
            figure(job["value"]),
            *(brief(job["chosen"].get(key, "-")) for key in keys),
            f"{job['step']:,}",
            clock(job["seconds"]),
            number(job["tokens_per_second"]),
        ]
        shown.append(
            {
                "job": job["job"],
                "status": job["status"],
                "tone": tones.get(job["job"]),
                "link": page if (folder / page).is_file() else f"{job['job']}/output.log",
                "cells": cells,
            }
        )
    return shown


def tiles(summary: dict[str, Any]) -> list[Tile]:
    jobs = summary["jobs"]
    statuses = [job["status"] for job in jobs]
    others = [(statuses.count(name), name) for name in ("pruned", "failed", "stopped")]
    note = ", ".join(f"{n} {name}" for n, name in others if n) or summary["strategy"]
    shown = [Tile("jobs done", f"{statuses.count('done')} of {summary['total']}", note)]
    if summary["best"] is not None:
        best = jobs[0]
        varied = " ".join(
            f"{key.rpartition('.')[2]}={brief(value)}" for key, value in best["chosen"].items()
        )
        value, note = figure(best["value"]), f"job {best['job']}: {varied}"
        shown.append(Tile(f"best {summary['metric']}", value, note))
    values = [job["value"] for job in jobs if is_number(job["value"]) and job["status"] == "done"]
    if len(values) > 1:
        better = "highest" if summary["direction"] == "maximize" else "lowest"
        spread = figure(max(values) - min(values))
        shown.append(Tile("spread", spread, f"best to worst; {better} wins"))
    seconds = sum(job["seconds"] for job in jobs)
    each = clock(seconds / max(1, len(jobs)))
    return [*shown, Tile("time of all jobs", clock(seconds), f"{each} each")]


def commands(summary: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Return commands for the sweep and for its best job."""
    again = command(["python", "launch/train.py", "-m", setting("sweep.dir", folder)])
    for_sweep = [("compare all jobs", compare_command(folder)), ("go on with this sweep", again)]
    if summary["best"] is None:
        return for_sweep
    best = summary["jobs"][0]
    return [
        ("the best job alone", alone_command(best, summary)),
        ("evaluate it", evaluate_command(best["run_dir"])),
        *for_sweep,
    ]


def alone_command(job: Row, summary: dict[str, Any]) -> str:
    """Return the command that trains a job outside of its sweep."""
    launcher = summary.get("launcher") or []
    return command(["deepspeed", *launcher, "launch/train.py", *job["overrides"]])


def compare_command(folder: Path) -> str:
    """Return the command that shows all jobs of a sweep on one page."""
    return command(["python", "launch/report.py", setting("runs", f"{glob.escape(str(folder))}/*")])
