"""Geometry of charts: series in, paths and ticks out.

All functions are pure; the HTML template and the PNG draw the same geometry. A chart is drawn on a
stretched canvas of WIDTH x HEIGHT units: lines stay thin (non-scaling strokes) and labels are HTML
beside it, so that the same page is crisp on a phone and on a wide screen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from finetune.errors import gib
from finetune.reporting.metrics_log import is_number

WIDTH, HEIGHT = 1000.0, 400.0
MAX_POINTS = 800
SMOOTH_FROM = 40
"""Series with fewer points are shown as they are."""

Point = tuple[float, float]


@dataclass
class Series:
    name: str
    points: list[Point]
    color: int = 1
    """1 to 6: the page's palette."""
    style: str = "line"
    """line, faint (raw behind its average), dots (a line with a mark at each point) or dashed (predicted)."""


@dataclass
class Chart:
    title: str
    series: list[Series]
    unit: str = "number"
    """number, exp, bytes or share: how values are written."""
    from_zero: bool = False


@dataclass
class Axis:
    low: float
    high: float
    ticks: list[tuple[float, str]] = field(default_factory=list)
    """(position in percent from the low end, label)."""

    def at(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


@dataclass
class Drawing:
    """Geometry and labels of one chart for the template."""

    chart: Chart
    x: Axis
    y: Axis
    paths: list[dict[str, Any]]
    hover: dict[str, Any]


def column(records: list[dict[str, Any]], key: str) -> list[Point]:
    """Return (step, value) of every record that has a finite number under `key`."""
    return [
        (float(record["step"]), float(record[key]))
        for record in records
        if is_number(record.get(key))
    ]


def smooth(points: list[Point]) -> list[Point]:
    """Average over a window centred on each point, so that the curve does not lag behind.

    The window narrows to one point at the start, where losses fall fast, and is cut off at the end,
    where they are noise.
    """
    sums = [0.0, *accumulate(y for _, y in points)]
    reach = max(1, min(50, len(points) // 40))
    averaged = []
    for i, (x, _) in enumerate(points):
        half = min(reach, i)
        end = min(i + half + 1, len(points))
        averaged.append((x, (sums[end] - sums[i - half]) / (end - i + half)))
    return averaged


def thin(points: list[Point]) -> list[Point]:
    """Reduce a curve to about `MAX_POINTS` points.

    The lowest and highest point of each stretch are kept, so that no spike disappears.
    """
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS / 2))
    kept = {points[0], points[-1]}
    for begin in range(0, len(points), size):
        chunk = points[begin : begin + size]
        kept |= {min(chunk, key=lambda p: p[1]), max(chunk, key=lambda p: p[1])}
    return sorted(kept)


def draw(chart: Chart, steps: tuple[float, float] | None = None) -> Drawing:
    """Compute the geometry of a chart; its series must not all be empty.

    Args:
        steps: first and last step to include, so that charts beside each other share an axis.
    """
    series = [Series(s.name, thin(s.points), s.color, s.style) for s in chart.series if s.points]
    xs = [*(steps or ()), *(x for s in series for x, _ in s.points)]
    ys = [y for s in series for _, y in s.points] + ([0.0] if chart.from_zero else [])
    x_axis = round_axis(min(xs), max(xs), "step", pad=False)
    y_axis = round_axis(min(ys), max(ys), chart.unit)
    paths, hover = [], []
    for s in series:
        places = [place(x_axis.at(x), y_axis.at(y)) for x, y in s.points]
        # Zero-length lines with round caps: marks that stay round on the stretched canvas.
        marked = s.style == "dots" or len(places) == 1
        dots = "".join(f"M{at}h.01" for at in places) if marked else ""
        path = {"d": "M" + "L".join(places), "dots": dots}
        paths.append({"name": s.name, "color": s.color, "style": s.style, **path})
        points = [[x, float(f"{y:.6g}")] for x, y in s.points]
        hover.append({"name": s.name, "color": s.color, "points": points})
    ends = {"x": [x_axis.low, x_axis.high], "y": [y_axis.low, y_axis.high]}
    return Drawing(chart, x_axis, y_axis, paths, {"unit": chart.unit, **ends, "series": hover})


def draw_all(charts: list[Chart]) -> list[Drawing]:
    """Draw charts over the same steps."""
    steps = [step for chart in charts for series in chart.series for step, _ in series.points]
    return [draw(chart, (min(steps), max(steps))) for chart in charts]


def place(x: float, y: float) -> str:
    """Format a point of a path, from shares of the axes."""
    return f"{WIDTH * x:.1f} {HEIGHT * (1 - y):.1f}"


def round_axis(low: float, high: float, unit: str = "number", pad: bool = True) -> Axis:
    """Return an axis with about four round ticks.

    Args:
        pad: begin and end at a tick, at or beyond `low` and `high`.
    """
    if low == high:
        spread = (abs(low) * 0.1 or 1.0) if pad else 1.0
        low, high = low - spread, high + spread
    # A round distance of ticks; bytes are round in the unit of their labels.
    sizes = (2.0**30, 2.0**20, 2.0**10) if unit == "bytes" else ()
    scale = next((size for size in sizes if high - low >= size), 1.0)
    rough = (high - low) / scale / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = scale * power * next(m for m in (1, 2, 5, 10) if rough <= m * power * (1 + 1e-9))
    if pad:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    elif unit == "step":
        step = max(1.0, step)
    axis = Axis(low, high)
    first = math.ceil(low / step - 1e-9)
    values = [(first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1)]
    axis.ticks = [(100 * axis.at(value), tick_label(value, unit, step)) for value in values]
    return axis


def tick_label(value: float, unit: str, step: float) -> str:
    """Format a tick that is `step` from the next: `1,200`, `2.5`, `1.0e-04`, `3 GiB`, `40%`, `49.6%`."""
    if unit == "bytes":
        return gib(value, ".4g")
    if unit == "exp":
        return "0" if value == 0 else f"{value:.1e}"
    percent = unit == "share"
    digits = max(0, -math.floor(math.log10(100 * step if percent else step) + 1e-9))
    return f"{value:.{digits}%}" if percent else f"{value:,.{min(digits, 6)}f}"
