"""One page that compares runs: results side by side, curves over each other, what their settings differ in."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from finetune.config import DIRECTIONS
from finetune.errors import command, gib, setting
from finetune.files import read_object, write_atomic
from finetune.reporting.page import tables
from finetune.reporting.page.charts import (
    SMOOTH_FROM,
    Chart,
    Drawing,
    Point,
    Series,
    column,
    draw,
    is_number,
    smooth,
)
from finetune.reporting.page.curves import steps_of
from finetune.reporting.page.differences import between
from finetune.reporting.page.files import RunFiles, read_run
from finetune.reporting.page.tables import Table, Tile
from finetune.reporting.page.template import render
from finetune.reporting.terminal_text import EVAL_METRICS, averaged_loss, clock, figure

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
    return write_atomic(
        out, render("compare.html", page_context([read_run(folder) for folder in run_dirs]))
    )


def page_context(runs: list[RunFiles]) -> dict[str, Any]:
    """Everything that the template names."""
    names = run_names(runs)
    drawings = charts(runs, names)
    return {
        "title": f"{len(runs)} runs compared",
        "updated": time.strftime("%Y-%m-%d %H:%M:%S"),
        "keys": [
            {
                "name": name,
                "color": color_of(i),
                "style": style_of(i),
                "path": str(run.run_dir),
                "status": tables.status_words(run),
            }
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
        "tiles": tiles(runs, names),
        "results": results(runs, names),
        "drawings": drawings,
        "wide": {0, len(drawings) - 1} if len(drawings) % 2 == 0 else {0},
        "settings": between(names, [run.config for run in runs]),
        "environments": between(names, [run.env for run in runs]),
        "groups": groups(runs, names),
        "samples": samples(runs, names),
        "commands": commands(runs, names),
    }


def run_names(runs: list[RunFiles]) -> list[str]:
    """Short and different: what a sweep varied, else the end of the path that sets the runs apart."""
    chosen = [read_object(run.run_dir / "job.json").get("chosen") for run in runs]
    if len(runs) > 1 and all(chosen):
        told = [
            " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in words.items())
            for words in chosen
        ]
        return [f"{run.run_dir.name}: {text}" for run, text in zip(runs, told, strict=True)]
    paths = [str(run.run_dir) for run in runs]
    common = os.path.commonpath(paths) if len(paths) > 1 else os.path.dirname(paths[0])
    return [os.path.relpath(path, common) for path in paths]


def charts(runs: list[RunFiles], names: list[str]) -> list[Drawing]:
    """Every figure that at least one run has, a line a run."""
    found = []
    for kind, key, title, unit, from_zero in CHARTS:
        series = [
            Series(
                name,
                _averaged(column(getattr(run, kind), key)),
                color_of(i),
                style_of(i, kind == "evals"),
            )
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        # A GPU's memory is 0 on a machine without one.
        if any(y for s in series for _, y in s.points):
            found.append(Chart(title, [s for s in series if s.points], unit, from_zero))
    return [draw(chart, steps_of(found)) for chart in found]


def results(runs: list[RunFiles], names: list[str]) -> Table:
    """One row a run, the best evaluation marked."""
    metrics = [
        name for name in EVAL_METRICS if any(is_number(_evaluated(run).get(name)) for run in runs)
    ]
    rows = [
        [
            name,
            tables.status_words(run),
            _step(run),
            figure(_loss(run)),
            *(figure(_evaluated(run).get(metric)) for metric in metrics),
            figure(_rate(run)),
            clock(run.result.get("seconds")),
            _bytes(run, "host"),
            _bytes(run, "gpu"),
            str(run.result.get("world_size") or run.env.get("world_size") or "-"),
        ]
        for run, name in zip(runs, names, strict=True)
    ]
    evaluated = [f"eval {name.replace('_', ' ')}" for name in metrics]
    head = [
        "run",
        "status",
        "steps",
        "loss",
        *evaluated,
        "tokens/s",
        "time",
        "host, peak",
        "GPU, peak",
        "ranks",
    ]
    return Table(head, rows, _best(runs))


def tiles(runs: list[RunFiles], names: list[str]) -> list[Tile]:
    found = []
    best = _best(runs)
    if best is not None:
        key = tables.criterion(runs)
        found.append(
            Tile(
                f"best eval {key.replace('_', ' ')}",
                figure(_evaluated(runs[best])[key]),
                names[best],
            )
        )
    rates = [(rate, i) for i, run in enumerate(runs) if is_number(rate := _rate(run))]
    if rates:
        rate, i = max(rates)
        found.append(Tile("fastest, tokens/s", f"{rate:,.0f}", names[i]))
    peaks = [
        (peak, i)
        for i, run in enumerate(runs)
        if is_number(peak := run.result.get("peak_host_bytes"))
    ]
    if peaks:
        peak, i = min(peaks)
        found.append(Tile("least host memory", gib(peak), names[i]))
    return found


def groups(runs: list[RunFiles], names: list[str]) -> Table | None:
    """Subsets or classes by loss (or f1) at each run's last evaluation."""
    lasts = [
        next(
            (
                r.get("subsets") or r.get("per_class")
                for r in reversed(run.evals)
                if r.get("subsets") or r.get("per_class")
            ),
            {},
        )
        for run in runs
    ]
    found = dict.fromkeys(str(name) for last in lasts for name in last)
    if not found:
        return None
    figures = [row for last in lasts for row in last.values() if isinstance(row, dict)]
    key = next(
        (k for k in ("loss", "f1", "accuracy") if any(is_number(row.get(k)) for row in figures)),
        "loss",
    )
    rows = [
        [group, *(figure((last.get(group) or {}).get(key)) for last in lasts)] for group in found
    ]
    return Table([f"{key} by group", *names], rows)


def samples(runs: list[RunFiles], names: list[str]) -> list[dict[str, Any]]:
    """Each prompt with the newest text of every run."""
    prompts = dict.fromkeys(str(record.get("prompt", "")) for run in runs for record in run.samples)
    found = []
    for prompt in prompts:
        texts = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            last = next(
                (r for r in reversed(run.samples) if str(r.get("prompt", "")) == prompt), None
            )
            if last:
                texts.append(
                    {
                        "name": name,
                        "color": color_of(i),
                        "step": last.get("step", "?"),
                        "text": str(last.get("text", "")),
                    }
                )
        found.append({"prompt": prompt, "texts": texts})
    return found


def commands(runs: list[RunFiles], names: list[str]) -> list[tuple[str, str]]:
    best = _best(runs)
    if best is None:
        return []
    folder = runs[best].run_dir
    return [
        ("evaluate the best", command(["deepspeed", "launch/evaluate.py", setting("run", folder)])),
        ("its page", command([folder / "report.html"])),
    ]


def color_of(i: int) -> int:
    return i % COLORS + 1


def style_of(i: int, few: bool = False) -> str:
    """Solid, and dashed from the seventh run on; marked where points are few."""
    return "dashed" if i >= COLORS else "dots" if few else "line"


def _averaged(points: list[Point]) -> list[Point]:
    return smooth(points) if len(points) >= SMOOTH_FROM else points


def _evaluated(run: RunFiles) -> dict[str, Any]:
    return run.result.get("eval") or (run.evals[-1] if run.evals else {})


def _loss(run: RunFiles) -> float | None:
    """Training loss at the end: averaged, or the last one where only the result is left."""
    averaged = averaged_loss(run.train)
    return averaged[0] if averaged else run.result.get("loss")


def _step(run: RunFiles) -> str:
    return f"{run.result.get('step') or (run.train[-1]['step'] if run.train else 0):,}"


def _rate(run: RunFiles) -> float | None:
    return run.result.get("tokens_per_second") or (
        run.train[-1].get("tokens_per_second") if run.train else None
    )


def _bytes(run: RunFiles, kind: str) -> str:
    peak = run.result.get(f"peak_{kind}_bytes") or max(
        (r.get(f"{kind}_bytes") or 0 for r in run.train), default=0
    )
    return gib(peak) if peak else "-"


def _best(runs: list[RunFiles]) -> int | None:
    key = tables.criterion(runs)
    scored = [
        (_evaluated(run)[key], i)
        for i, run in enumerate(runs)
        if is_number(_evaluated(run).get(key))
    ]
    if not scored:
        return None
    return (max if DIRECTIONS.get(key) == "max" else min)(scored)[1]
