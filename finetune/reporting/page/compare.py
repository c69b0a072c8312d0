"""One page that compares runs: results side by side, curves over each other, what their settings differ in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from finetune.errors import clock, command, figure, gib
from finetune.files import read_object, write_atomic
from finetune.reporting.metrics_log import is_number
from finetune.reporting.page import tables
from finetune.reporting.page.charts import SMOOTH_FROM, Chart, Series, column, draw_all, smooth
from finetune.reporting.page.files import RunFiles, read_run
from finetune.reporting.page.tables import Table, Tile
from finetune.reporting.page.template import FOLDER, render
from finetune.reporting.terminal_text import EVAL_METRICS, averaged_loss, evaluate_command

COLORS = 6
PAGE = "compare.html"
CHARTS = (
    ("train", "loss", "Training loss", "number", False),
    ("evals", "loss", "Evaluation loss", "number", False),
    ("evals", "accuracy", "Accuracy", "share", False),
    ("evals", "f1", "F1", "share", False),
    ("evals", "exact_match", "Exact match", "share", False),
    ("train", "lr", "Learning rate", "exp", True),
    ("train", "grad_norm", "Gradient norm", "number", True),
    ("train", "tokens_per_second", "Tokens per second", "number", True),
    ("train", "host_bytes", "Host memory of a rank", "bytes", True),
    ("train", "gpu_bytes", "GPU memory of a rank", "bytes", True),
)


def build_comparison(run_dirs: list[Path], out: Path) -> Path:
    """Write one self-contained page about several runs; returns its path."""
    context = page_context([read_run(folder) for folder in run_dirs])
    return write_atomic(out, render(FOLDER / "compare.html", context))


def page_context(runs: list[RunFiles]) -> dict[str, Any]:
    """Return all variables of the template."""
    names = run_names(runs)
    # The metric that ranks runs, and the index of the best one.
    metric = tables.criterion(runs)
    best = tables.best_of([_evaluated(run).get(metric) for run in runs], metric)
    keys = [
        {"name": name, "color": color_of(i), "style": style_of(i), "path": str(run.run_dir)}
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    return {
        "title": f"{len(runs)} runs compared",
        "keys": keys,
        "tiles": tiles(runs, names, metric, best),
        "results": results(runs, names, best),
        "drawings": draw_all(charts(runs, names)),
        "settings": tables.between(names, [run.config for run in runs]),
        "environments": tables.between(names, [run.env for run in runs]),
        "groups": groups(runs, names),
        "samples": samples(runs, names),
        "commands": [] if best is None else commands(runs[best]),
    }


def run_names(runs: list[RunFiles]) -> list[str]:
    """Return short, different names: what a sweep varied, else the end of the path that differs."""
    chosen = [read_object(run.run_dir / "job.json").get("chosen") for run in runs]
    if len(runs) > 1 and all(chosen):
        varied = [
            " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in words.items())
            for words in chosen
        ]
        return [f"{run.run_dir.name}: {text}" for run, text in zip(runs, varied, strict=True)]
    paths = [str(run.run_dir) for run in runs]
    common = os.path.commonpath(paths) if len(paths) > 1 else os.path.dirname(paths[0])
    return [os.path.relpath(path, common) for path in paths]


def charts(runs: list[RunFiles], names: list[str]) -> list[Chart]:
    """Return every figure that at least one run has, a line a run."""
    shown = []
    for kind, key, title, unit, from_zero in CHARTS:
        series = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            points = column(getattr(run, kind), key)
            points = smooth(points) if len(points) >= SMOOTH_FROM else points
            if points:
                series.append(Series(name, points, color_of(i), style_of(i, kind == "evals")))
        # A GPU's memory is 0 on a machine without one.
        if any(y for s in series for _, y in s.points):
            shown.append(Chart(title, series, unit, from_zero))
    return shown


def results(runs: list[RunFiles], names: list[str], best: int | None) -> Table:
    """Return one row a run, the best evaluation marked."""
    metrics = [
        name for name in EVAL_METRICS if any(is_number(_evaluated(run).get(name)) for run in runs)
    ]
    head = ["run", "status", "steps", "loss"]
    head += [f"eval {name.replace('_', ' ')}" for name in metrics]
    head += ["tokens/s", "time", "host, peak", "GPU, peak", "ranks"]
    rows = []
    for run, name in zip(runs, names, strict=True):
        # Only the result may be left, with the last step's loss.
        averaged = averaged_loss(run.train)
        peaks = [run.peak(key) for key in ("host_bytes", "gpu_bytes")]
        rows.append(
            [
                name,
                tables.status_words(run),
                f"{run.result.get('step') or run.last('step') or 0:,}",
                figure(averaged[0] if averaged else run.result.get("loss")),
                *(figure(_evaluated(run).get(metric)) for metric in metrics),
                figure(_rate(run)),
                clock(run.result.get("seconds")),
                *(gib(peak) if peak else "-" for peak in peaks),
                str(run.result.get("world_size") or run.env.get("world_size") or "-"),
            ]
        )
    return Table(head, rows, best)


def tiles(runs: list[RunFiles], names: list[str], metric: str, best: int | None) -> list[Tile]:
    shown = []
    if best is not None:
        value = figure(_evaluated(runs[best])[metric])
        shown.append(Tile(f"best eval {metric.replace('_', ' ')}", value, names[best]))
    rates = [(rate, name) for run, name in zip(runs, names, strict=True) if (rate := _rate(run))]
    if rates:
        rate, name = max(rates)
        shown.append(Tile("fastest, tokens/s", f"{rate:,.0f}", name))
    peaks = [run.result.get("peak_host_bytes") for run in runs]
    if any(map(is_number, peaks)):
        least = min(filter(is_number, peaks))
        shown.append(Tile("least host memory", gib(least), names[peaks.index(least)]))
    return shown


def groups(runs: list[RunFiles], names: list[str]) -> Table | None:
    """Return subsets or classes by loss (or f1) at each run's last evaluation."""
    lasts = [
        next((g for record in reversed(run.evals) if (g := tables.groups_of(record))), {})
        for run in runs
    ]
    shown = dict.fromkeys(str(name) for last in lasts for name in last)
    if not shown:
        return None
    measured = {key for last in lasts for row in last.values() for key in tables.numbers_of(row)}
    key = next((key for key in ("loss", "f1", "accuracy") if key in measured), "loss")
    rows = [
        [group, *(figure((last.get(group) or {}).get(key)) for last in lasts)] for group in shown
    ]
    return Table([f"{key} by group", *names], rows)


def samples(runs: list[RunFiles], names: list[str]) -> list[dict[str, Any]]:
    """Return each prompt with the newest text of every run."""
    texts: dict[str, dict[int, dict[str, Any]]] = {}
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        for record in run.samples:
            prompt, text = str(record.get("prompt", "")), str(record.get("text", ""))
            newest = {"name": name, "color": color_of(i), "step": record.get("step", "?")}
            texts.setdefault(prompt, {})[i] = newest | {"text": text}
    return [{"prompt": prompt, "texts": list(of.values())} for prompt, of in texts.items()]


def commands(best: RunFiles) -> list[tuple[str, str]]:
    page = command([best.run_dir / "report.html"])
    return [("evaluate the best", evaluate_command(best.run_dir)), ("its page", page)]


def color_of(i: int) -> int:
    return i % COLORS + 1


def style_of(i: int, few: bool = False) -> str:
    """Solid, and dashed from the seventh run on; marked where points are few."""
    return "dashed" if i >= COLORS else "dots" if few else "line"


def _evaluated(run: RunFiles) -> dict[str, Any]:
    return run.result.get("eval") or (run.evals[-1] if run.evals else {})


def _rate(run: RunFiles) -> float | None:
    return run.result.get("tokens_per_second") or run.last("tokens_per_second")
