"""Which curves a run has: the list that the page and the picture share."""

from __future__ import annotations

from typing import Any

from finetune.reporting.page.charts import (
    SMOOTH_FROM,
    Chart,
    Point,
    Series,
    column,
    is_number,
    smooth,
)
from finetune.reporting.page.files import RunFiles

SHARES = ("accuracy", "f1", "exact_match")


def curves(run: RunFiles) -> list[Chart]:
    """Every chart that has at least one point."""
    train, evals = run.train, run.evals
    charts = [
        Chart(
            "Loss",
            [
                *_averaged("training", column(train, "loss")),
                Series("evaluation", column(evals, "loss"), 2, "dots"),
            ],
        ),
        Chart(
            "Evaluation",
            [
                Series(name.replace("_", " "), column(evals, name), color, "dots")
                for color, name in enumerate(SHARES, 1)
            ],
            "share",
        ),
        Chart("Perplexity", [Series("evaluation", column(evals, "perplexity"), 2, "dots")]),
        Chart(
            "Learning rate",
            [Series("learning rate", column(train, "lr"), 1)],
            "exp",
            from_zero=True,
        ),
        Chart(
            "Gradient norm",
            _averaged("before clipping", column(train, "grad_norm")),
            from_zero=True,
        ),
        Chart(
            "Tokens per second",
            _averaged("all ranks", column(train, "tokens_per_second")),
            from_zero=True,
        ),
        Chart("MFU", _averaged("of the GPU's peak", column(train, "mfu")), "share", from_zero=True),
        _memory_chart(run),
    ]
    return [chart for chart in charts if any(series.points for series in chart.series)]


def steps_of(charts: list[Chart]) -> tuple[float, float] | None:
    """First and last step of all charts together."""
    steps = [step for chart in charts for series in chart.series for step, _ in series.points]
    return (min(steps), max(steps)) if steps else None


def predicted(run: RunFiles) -> dict[str, float]:
    """Predicted `host_bytes` and `gpu_bytes` of one rank, and `parts`, of the option that was chosen.

    plan.json counts the host per node and records measure one process, so the host's share of a rank is shown.
    """
    option, ranks = chosen_option(run), ranks_per_node(run)
    found = {"host_bytes": (option.get("host_bytes") or 0) / ranks}
    if (run.plan.get("machine") or {}).get("gpus"):
        found["gpu_bytes"] = option.get("gpu_bytes") or 0
    return {key: value for key, value in found.items() if is_number(value) and value > 0}


def chosen_option(run: RunFiles) -> dict[str, Any]:
    chosen = run.plan.get("chosen") or {}
    return next(
        (option for option in run.plan.get("options") or [] if _is_option(option, chosen)), {}
    )


def ranks_per_node(run: RunFiles) -> int:
    gpus = (run.plan.get("machine") or {}).get("gpus_per_node")
    ranks = run.result.get("world_size") or run.env.get("world_size") or 1
    return max(1, int(run.env.get("ranks_per_node") or min(ranks, gpus or ranks)))


def _is_option(option: dict[str, Any], chosen: dict[str, Any]) -> bool:
    keys = ("zero", "offload_optimizer", "offload_params")
    return bool(chosen) and all(option.get(key) == chosen.get(key) for key in keys)


def _averaged(name: str, points: list[Point]) -> list[Series]:
    if len(points) < SMOOTH_FROM:
        return [Series(name, points, 1)]
    return [
        Series(f"{name}, each step", points, 1, "faint"),
        Series(f"{name}, averaged", smooth(points), 1),
    ]


def _memory_chart(run: RunFiles) -> Chart:
    series = []
    expected = predicted(run)
    for color, (name, key) in enumerate((("host", "host_bytes"), ("GPU", "gpu_bytes")), 1):
        points = [point for point in column(run.train, key) if point[1] > 0]
        series.append(Series(f"{name}, measured", points, color))
        if points and key in expected:
            ends = [points[0][0], points[-1][0]]
            series.append(
                Series(f"{name}, predicted", [(x, expected[key]) for x in ends], color, "dashed")
            )
    return Chart("Memory of a rank", series, "bytes", from_zero=True)
