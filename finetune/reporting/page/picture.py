"""curves.png: the page's charts as one picture, for READMEs and model cards. Uses no display."""

from __future__ import annotations

import io
import math

from finetune.reporting.page.charts import Chart, draw

COLORS = ("#2a78d6", "#d9622b", "#1a9a78", "#8a5cd1")
INK, SOFT, FAINT = "#1c2430", "#5b6675", "#dfe3e8"
STYLES = {
    "line": {"linewidth": 1.8},
    "faint": {"alpha": 0.3, "linewidth": 0.9},
    "dashed": {"linestyle": (0, (4, 3)), "linewidth": 1.4},
    "dots": {"marker": "o", "markersize": 4, "linewidth": 1.6},
}


def curves_png(charts: list[Chart], title: str) -> bytes:
    """Draw charts in a grid two wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(charts) / 2)
    figure = Figure(figsize=(11, 0.6 + 2.9 * rows), dpi=100, facecolor="white")
    # No pyplot: it keeps figures alive and may look for a screen.
    FigureCanvasAgg(figure)
    # matplotlib would read dollars as mathematics.
    title = title.replace("$", r"\$")
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for panel, chart in zip(panels, charts, strict=False):
        shown = [series for series in chart.series if series.points]
        for series in shown:
            xs, ys = zip(*series.points, strict=True)
            mark = {"marker": "o"} if len(xs) == 1 else {}
            style = {"color": COLORS[series.color - 1], **STYLES[series.style], **mark}
            panel.plot(xs, ys, label=series.name, **style)
        panel.set_title(chart.title, fontsize=10, loc="left", color=INK)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(True, color=FAINT, linewidth=0.7)
        panel.tick_params(labelsize=8, length=0, colors=SOFT)
        panel.spines[:].set_visible(False)
        if chart.from_zero:
            panel.set_ylim(bottom=0)
        axis = draw(chart).y
        places = [axis.low + (axis.high - axis.low) * at / 100 for at, _ in axis.ticks]
        panel.set_yticks(places, [text for _, text in axis.ticks])
        if len(shown) > 1:
            panel.legend(fontsize=8, frameon=False)
    for panel in list(figure.axes)[len(charts) :]:
        panel.set_axis_off()
    # A layout engine would draw everything twice.
    height = figure.get_figheight()
    sides = {"left": 0.07, "right": 0.985, "bottom": 0.5 / height, "top": 1 - 0.75 / height}
    figure.subplots_adjust(**sides, wspace=0.16, hspace=0.42)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
