"""curves.png: the page's charts as one picture, for READMEs and model cards. Uses no display."""

from __future__ import annotations

import io
import math

from finetune.reporting.page.charts import Chart, Series, draw

COLORS = ("#2a78d6", "#d9622b", "#1a9a78", "#8a5cd1")
INK, FAINT = "#1c2430", "#dfe3e8"


def curves_png(charts: list[Chart], title: str) -> bytes:
    """Charts in a grid two wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(charts) / 2)
    figure = Figure(figsize=(11, 0.6 + 2.9 * rows), dpi=100, facecolor="white")
    # No pyplot: it keeps figures alive and may look for a screen.
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title), fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for panel, chart in zip(panels, charts, strict=False):
        _draw(panel, chart)
    for panel in list(figure.axes)[len(charts) :]:
        panel.set_axis_off()
    buffer = io.BytesIO()
    # A layout engine would draw everything twice.
    figure.subplots_adjust(
        left=0.07,
        right=0.985,
        bottom=0.5 / figure.get_figheight(),
        wspace=0.16,
        hspace=0.42,
        top=1 - 0.75 / figure.get_figheight(),
    )
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(panel, chart: Chart) -> None:
    shown = [series for series in chart.series if series.points]
    for series in shown:
        _line(panel, series)
    panel.set_title(chart.title, fontsize=10, loc="left", color=INK)
    panel.set_xlabel("step", fontsize=8)
    panel.grid(True, color=FAINT, linewidth=0.7)
    panel.tick_params(labelsize=8, length=0, colors="#5b6675")
    panel.spines[:].set_visible(False)
    if chart.from_zero:
        panel.set_ylim(bottom=0)
    axis = draw(chart).y
    panel.set_yticks(
        [axis.low + (axis.high - axis.low) * at / 100 for at, _ in axis.ticks],
        [text for _, text in axis.ticks],
    )
    if len(shown) > 1:
        panel.legend(fontsize=8, frameon=False)


def _line(panel, series: Series) -> None:
    xs, ys = zip(*series.points, strict=True)
    style = {
        "faint": {"alpha": 0.3, "linewidth": 0.9},
        "dashed": {"linestyle": (0, (4, 3)), "linewidth": 1.4},
        "dots": {"marker": "o", "markersize": 4, "linewidth": 1.6},
    }.get(series.style, {"linewidth": 1.8})
    if len(xs) == 1:
        style = {**style, "marker": "o"}
    panel.plot(xs, ys, color=COLORS[series.color - 1], label=series.name, **style)


def _plain(text: str) -> str:
    """matplotlib would read dollars as mathematics."""
    return text.replace("$", r"\$")
