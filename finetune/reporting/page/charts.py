"""Geometry of charts: series in, paths and ticks out.

All functions are pure; the HTML template and the PNG draw the same geometry. A chart is drawn on a
stretched canvas of WIDTH x HEIGHT units: lines stay thin (non-scaling strokes) and labels are HTML
beside it, so that the same page is crisp on a phone and on a wide screen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeGuard

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
    """1 to 4: the page's palette."""
    style: str = "line"
    """line, faint (raw behind its average), dots (a line with a mark at each point) or dashed (predicted)."""


@dataclass
class Chart:
    title: str
    series: list[Series]
    unit: str = "number"
    """number, exp, bytes or share: how values are written."""
    from_zero: bool = False
    note: str = ""


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


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def smooth(points: list[Point]) -> list[Point]:
    """Average over a window centred on each point, so that the curve does not lag behind.

    The window narrows to one point at the start, where losses fall fast, and is cut off at the end,
    where they are noise.
    """
    sums = [0.0, *accumulate(y for _, y in points)]
    reach = max(1, min(50, len(points) // 40))
    out = []
    for i, (x, _) in enumerate(points):
        half = min(reach, i)
        end = min(i + half + 1, len(points))
        out.append((x, (sums[end] - sums[i - half]) / (end - i + half)))
    return out


def thin(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Reduce a curve to about `limit` points.

    The lowest and highest point of each stretch are kept, so that no spike disappears.
    """
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit / 2))
    kept: list[Point] = []
    for begin in range(0, len(points), size):
        chunk = points[begin : begin + size]
        kept += sorted({min(chunk, key=lambda p: p[1]), max(chunk, key=lambda p: p[1])})
    return sorted({points[0], *kept, points[-1]})


def draw(chart: Chart, steps: tuple[float, float] | None = None) -> Drawing:
    """Compute the geometry of a chart; its series must not all be empty.

    Args:
        steps: first and last step to include, so that charts beside each other share an axis.
    """
    series = [Series(s.name, thin(s.points), s.color, s.style) for s in chart.series if s.points]
    xs = [*(steps or ()), *(x for s in series for x, _ in s.points)]
    ys = [y for s in series for _, y in s.points] + ([0.0] if chart.from_zero else [])
    x_axis, y_axis = _axis(min(xs), max(xs), "step", pad=False), _axis(min(ys), max(ys), chart.unit)
    paths = [
        {
            "name": s.name,
            "color": s.color,
            "style": s.style,
            "d": _path(s, x_axis, y_axis),
            "dots": _dots(s, x_axis, y_axis),
        }
        for s in series
    ]
    hover = {
        "unit": chart.unit,
        "x": [x_axis.low, x_axis.high],
        "y": [y_axis.low, y_axis.high],
        "series": [
            {
                "name": s.name,
                "color": s.color,
                "points": [[x, float(f"{y:.6g}")] for x, y in s.points],
            }
            for s in series
        ],
    }
    return Drawing(chart, x_axis, y_axis, paths, hover)


def label(value: float, unit: str, step: float = 0.0) -> str:
    """Format a tick's label: `1,200`, `2.5`, `1.0e-04`, `3 GiB`, `40%`, `49.6%`."""
    if unit == "bytes":
        return bytes_label(value)
    if unit == "share":
        return f"{value:.{max(0, -math.floor(math.log10(100 * step) + 1e-9)) if step else 0}%}"
    if unit == "exp":
        return "0" if value == 0 else f"{value:.1e}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if 0 < step < 1 else 0
    return f"{value:,.{min(digits, 6)}f}"


def bytes_label(value: float) -> str:
    for name, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:.0f} B"


def linear_axis(low: float, high: float, unit: str = "number") -> Axis:
    """Return an axis with about four round ticks that spans at least `low` to `high`."""
    return _axis(low, high, unit)


def _axis(low: float, high: float, unit: str, pad: bool = True) -> Axis:
    if low == high:
        spread = abs(low) * 0.1 or 1.0
        low, high = (low - spread, high + spread) if pad else (low - 1, high + 1)
    step = _nice_step(high - low, unit)
    if pad:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    elif unit == "step":
        step = max(1.0, step)
    axis = Axis(low, high)
    first = math.ceil(low / step - 1e-9)
    values = [(first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1)]
    axis.ticks = [(100 * axis.at(value), label(value, unit, step)) for value in values]
    return axis


def _nice_step(spread: float, unit: str) -> float:
    """Return a round distance for about four ticks; bytes are round in the unit of their labels."""
    scale = (
        next((s for s in (2.0**40, 2.0**30, 2.0**20, 2.0**10) if spread >= s), 1.0)
        if unit == "bytes"
        else 1.0
    )
    rough = spread / scale / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return scale * power * next(m for m in (1, 2, 5, 10) if rough <= m * power * (1 + 1e-9))


def _path(series: Series, x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{_x(x, p)} {_y(y, p)}" for p in series.points)


def _dots(series: Series, x: Axis, y: Axis) -> str:
    """Draw marks as zero-length lines with round caps, which stay round on the stretched canvas."""
    if series.style != "dots" and len(series.points) > 1:
        return ""
    return "".join(f"M{_x(x, p)} {_y(y, p)}h.01" for p in series.points)


def _x(axis: Axis, point: Point) -> str:
    return f"{WIDTH * axis.at(point[0]):.1f}"


def _y(axis: Axis, point: Point) -> str:
    return f"{HEIGHT * (1 - axis.at(point[1])):.1f}"
