"""The curves of a run, which the page and the picture share, and the planner's predictions for it."""

from __future__ import annotations

from typing import Any

from finetune.reporting.metrics_log import is_number
from finetune.reporting.page.charts import SMOOTH_FROM, Chart, Point, Series, column, smooth
from finetune.reporting.page.files import RunFiles

SUITE_SERIES = 6
"""Tasks of lm-eval that the page shows: as many as it has colours."""


def curves(run: RunFiles) -> list[Chart]:
    """Return every chart that has at least one point."""
    train, evals = run.train, run.evals
    shares = [
        Series(name.replace("_", " "), column(evals, name), color, "dots")
        for color, name in enumerate(("accuracy", "f1", "exact_match", "rougeL"), 1)
    ]
    sets = dict.fromkeys(str(name) for record in evals for name in record.get("sets") or ())
    apart = [
        Series(name, column(evals, f"{name}/loss"), 3 + i % 2, "dots")
        for i, name in enumerate(sets)
    ]
    loss = _with_average("training", column(train, "loss"))
    norm = _with_average("before clipping", column(train, "grad_norm"))
    rate = _with_average("all ranks", column(train, "tokens_per_second"))
    mfu = _with_average("of the GPU's peak", column(train, "mfu"))
    # Preferences and reward models.
    margin = _with_average("training", column(train, "margin"))
    rewards = [
        Series(f"{side} answers", column(train, f"{side}_reward"), color)
        for color, side in enumerate(("chosen", "rejected"), 1)
    ]
    suite = [
        Series(name, column(evals, name), color, "dots")
        for color, name in enumerate(suite_names(run), 1)
    ]
    charts = [
        Chart("Loss", [*loss, Series("evaluation", column(evals, "loss"), 2, "dots"), *apart]),
        Chart("Evaluation", shares, "share"),
        Chart("Perplexity", [Series("evaluation", column(evals, "perplexity"), 2, "dots")]),
        Chart("lm-eval", suite),
        Chart("Margin", [*margin, Series("evaluation", column(evals, "margin"), 2, "dots")]),
        Chart("Rewards", rewards),
        Chart("KL to the reference", [Series("training", column(train, "kl"))]),
        Chart("Learning rate", [Series("learning rate", column(train, "lr"))], "exp", True),
        Chart("Gradient norm", norm, from_zero=True),
        Chart("Tokens per second", rate, from_zero=True),
        Chart("MFU", mfu, "share", from_zero=True),
    ]
    # Memory of a rank, measured and predicted.
    memory, expected = [], predicted(run)
    for color, (name, key) in enumerate((("host", "host_bytes"), ("GPU", "gpu_bytes")), 1):
        points = [point for point in column(train, key) if point[1] > 0]
        memory.append(Series(f"{name}, measured", points, color))
        if points and key in expected:
            ends = [(x, expected[key]) for x in (points[0][0], points[-1][0])]
            memory.append(Series(f"{name}, predicted", ends, color, "dashed"))
    charts.append(Chart("Memory of a rank", memory, "bytes", from_zero=True))
    return [chart for chart in charts if any(series.points for series in chart.series)]


def suite_names(run: RunFiles) -> list[str]:
    """Return TASK/METRIC, the first metric of each of lm-eval's tasks that evaluations asked; the first few."""
    tasks = [task for record in run.evals for task in (record.get("lm_eval") or {}).items()]
    names = [f"{task}/{next(iter(metrics))}" for task, metrics in tasks if metrics]
    return list(dict.fromkeys(names))[:SUITE_SERIES]


def _with_average(name: str, points: list[Point]) -> list[Series]:
    if len(points) < SMOOTH_FROM:
        return [Series(name, points)]
    return [
        Series(f"{name}, each step", points, style="faint"),
        Series(f"{name}, averaged", smooth(points)),
    ]


def chosen_option(run: RunFiles) -> dict[str, Any]:
    """Return the option of plan.json that was chosen; {} if there is none."""
    chosen, keys = run.plan.get("chosen") or {}, ("zero", "offload_optimizer", "offload_params")
    for option in (run.plan.get("options") or []) if chosen else []:
        if all(option.get(key) == chosen.get(key) for key in keys):
            return option
    return {}


def ranks_per_node(run: RunFiles) -> int:
    gpus = (run.plan.get("machine") or {}).get("gpus_per_node")
    ranks = run.result.get("world_size") or run.env.get("world_size") or 1
    return max(1, int(run.env.get("ranks_per_node") or min(ranks, gpus or ranks)))


def predicted(run: RunFiles) -> dict[str, float]:
    """Return the predicted `host_bytes` and `gpu_bytes` of one rank, for the option that was chosen.

    plan.json counts the host per node and records measure one process, so the host's share of a rank
    is returned.
    """
    option = chosen_option(run)
    sizes = {"host_bytes": (option.get("host_bytes") or 0) / ranks_per_node(run)}
    if (run.plan.get("machine") or {}).get("gpus"):
        sizes["gpu_bytes"] = option.get("gpu_bytes") or 0
    return {key: value for key, value in sizes.items() if is_number(value) and value > 0}
