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
from finetune.reporting.page.charts import HEIGHT, WIDTH, Axis, round_axis
from finetune.reporting.page.tables import Tile
from finetune.reporting.page.template import render

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
    values: list[Any]
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


@dataclass
class Line:
    """Line of one job in the parallel coordinates."""

    job: int
    d: str
    tone: int
    """0 best to 100 worst, in percent."""
    ended: bool


@dataclass
class Scatter:
    scale: Scale
    marks: list[dict[str, Any]]
    """job, x and y in percent, tone, text."""


def build_sweep_page(folder: Path | str) -> Path:
    """Write folder/sweep.html from folder/sweep.json and return its path."""
    folder = Path(folder)
    summary = read_json(folder / SUMMARY)
    return write_atomic(
        folder / PAGE,
        render(HERE / "sweep.html", page_context(summary, folder)),
    )


def page_context(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return all variables of the template."""
    jobs = summary["jobs"]
    tones = tone_of(jobs)
    metric = metric_scale(
        summary["metric"], [job["value"] for job in jobs if is_number(job["value"])]
    )
    keys = list(dict.fromkeys(key for job in jobs for key in job["chosen"]))
    scales = [scale_of(key, [value_of(job["chosen"].get(key)) for job in jobs]) for key in keys]
    running = any(job["status"] in ("running", "waiting") for job in jobs)
    name = summary["name"]
    return {
        "name": name if "sweep" in name else f"sweep {name}",
        "folder": str(folder),
        "running": running,
        "status": "running" if running else "done" if summary["best"] is not None else "failed",
        "told": f"{sum(job['status'] == 'done' for job in jobs)} of {summary['total']} jobs done",
        "tiles": tiles(summary),
        "axes": [*scales, metric] if keys and metric else [],
        "lines": lines(jobs, scales, metric, tones) if metric else [],
        "scatters": [scatter(jobs, scale, metric, tones) for scale in scales] if metric else [],
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
    found = [value for value in values if value is not None]
    if not found:
        return None
    if not all(is_number(value) for value in found):
        names = sorted({str(value) for value in found})
        ticks = [(100 * (i + 0.5) / len(names), name) for i, name in enumerate(names)]
        return Scale(key, found, Axis(0, 1, ticks), categories=names)
    different = sorted(set(found))
    log = different[0] > 0 and different[-1] / different[0] >= LOG_RATIO
    places = [math.log10(value) if log else value for value in different]
    room = (places[-1] - places[0]) or 1.0
    close = any(b - a < APART * room for a, b in pairwise(places))
    if len(different) > MANY or close:
        return Scale(
            key,
            found,
            _log_axis(different) if log else round_axis(different[0], different[-1]),
            log,
        )
    axis = Axis(places[0] - 0.08 * room, places[-1] + 0.08 * room)
    axis.ticks = [
        (100 * axis.at(place), swept_value(value))
        for place, value in zip(places, different, strict=True)
    ]
    return Scale(key, found, axis, log)


def metric_scale(name: str, values: list[float]) -> Scale | None:
    """Return the axis of the compared metric, with round ticks."""
    return Scale(name, list(values), round_axis(min(values), max(values))) if values else None


def swept_value(value: float) -> str:
    """Format the value of a swept parameter: `3e-05`, `0.25`, `64`."""
    return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.4g}"


def lines(jobs: list[Row], scales: list[Scale], metric: Scale, tones: dict[int, int]) -> list[Line]:
    """Return one line per job, worst first, so that the best is drawn on top.

    Lines of jobs without a metric end at the last parameter.
    """
    found = []
    for job in reversed(jobs):
        values = [(scale, value_of(job["chosen"].get(scale.key))) for scale in scales] + [
            (metric, job["value"])
        ]
        places = [(n / len(scales), scale.at(value)) for n, (scale, value) in enumerate(values)]
        points = [f"{WIDTH * x:.1f} {HEIGHT * (1 - y):.1f}" for x, y in places if y is not None]
        if len(points) > 1:
            found.append(
                Line(
                    job["job"],
                    "M" + "L".join(points),
                    tones.get(job["job"], 100),
                    job["status"] == "done",
                )
            )
    return found


def scatter(jobs: list[Row], scale: Scale, metric: Scale, tones: dict[int, int]) -> Scatter:
    marks = []
    for job in reversed(jobs):
        x, y = scale.at(value_of(job["chosen"].get(scale.key))), metric.at(job["value"])
        if x is not None and y is not None:
            value = figure(job["value"])
            text = f"job {job['job']}: {scale.key}={job['chosen'][scale.key]}, {metric.key} {value}"
            marks.append(
                {
                    "job": job["job"],
                    "x": round(100 * x, 2),
                    "y": round(100 * y, 2),
                    "text": text,
                    "tone": tones.get(job["job"], 100),
                    "ended": job["status"] == "done",
                }
            )
    return Scatter(scale, marks)


def rows(
    jobs: list[Row], keys: list[str], tones: dict[int, int], folder: Path
) -> list[dict[str, Any]]:
    """Return the rows of the table; each job links to its page, or to its output if it has none."""

    def cells(job: Row) -> list[str]:
        chosen = [_brief(job["chosen"].get(key, "-")) for key in keys]
        return [
            figure(job["value"]),
            *chosen,
            f"{job['step']:,}",
            clock(job["seconds"]),
            number(job["tokens_per_second"], ",.0f"),
        ]

    def link(job: Row) -> str:
        page = f"{job['job']}/report.html"
        return page if (folder / page).is_file() else f"{job['job']}/output.log"

    return [
        {
            "job": job["job"],
            "status": job["status"],
            "tone": tones.get(job["job"]),
            "link": link(job),
            "cells": cells(job),
        }
        for job in jobs
    ]


def tiles(summary: dict[str, Any]) -> list[Tile]:
    jobs = summary["jobs"]
    count = {
        status: sum(job["status"] == status for job in jobs)
        for status in ("done", "pruned", "failed", "stopped")
    }
    others = ", ".join(f"{n} {status}" for status, n in count.items() if n and status != "done")
    found = [
        Tile("jobs done", f"{count['done']} of {summary['total']}", others or summary["strategy"])
    ]
    if summary["best"] is not None:
        best = jobs[0]
        told = " ".join(
            f"{key.rpartition('.')[2]}={_brief(value)}" for key, value in best["chosen"].items()
        )
        found.append(
            Tile(f"best {summary['metric']}", figure(best["value"]), f"job {best['job']}: {told}")
        )
    values = [job["value"] for job in jobs if is_number(job["value"]) and job["status"] == "done"]
    if len(values) > 1:
        better = "highest" if summary["direction"] == "maximize" else "lowest"
        found.append(
            Tile("spread", figure(max(values) - min(values)), f"best to worst; {better} wins")
        )
    seconds = sum(job["seconds"] for job in jobs)
    return [
        *found,
        Tile("time of all jobs", clock(seconds), f"{clock(seconds / max(1, len(jobs)))} each"),
    ]


def commands(summary: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Return commands for the sweep and for its best job."""
    found = []
    if summary["best"] is not None:
        best = summary["jobs"][0]
        alone = [
            "deepspeed",
            *(summary.get("launcher") or []),
            "launch/train.py",
            *best["overrides"],
        ]
        found = [
            ("the best job alone", command(alone)),
            (
                "evaluate it",
                command(["deepspeed", "launch/evaluate.py", setting("run", best["run_dir"])]),
            ),
        ]
    again = command(["python", "launch/train.py", "-m", setting("sweep.dir", folder)])
    return [*found, ("compare all jobs", compare_command(folder)), ("go on with this sweep", again)]


def compare_command(folder: Path) -> str:
    """Return the command that shows all jobs of a sweep on one page."""
    return command(["python", "launch/report.py", setting("runs", f"{glob.escape(str(folder))}/*")])


def _log_axis(values: list[float]) -> Axis:
    low, high = math.floor(math.log10(values[0]) + 1e-9), math.ceil(math.log10(values[-1]) - 1e-9)
    axis = Axis(low, max(high, low + 1))
    axis.ticks = [
        (100 * axis.at(power), swept_value(10.0**power))
        for power in range(low, max(high, low + 1) + 1)
    ]
    return axis


def _brief(text: str) -> str:
    value = value_of(text)
    return swept_value(value) if is_number(value) and len(str(text)) > 8 else str(text)
