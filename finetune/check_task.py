"""A task's settings without its data: the problems in them, each with its remedy, and the metrics it is judged by."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config import ClassifyConfig, InstructConfig, QaConfig, TaskConfig
from finetune.errors import UserError

PROBLEMS = ("single_label", "multi_label", "regression")
TRUNCATIONS = ("head", "head_tail")

METRICS = {
    "clm": {"loss": "min", "perplexity": "min"},
    "instruct": {"loss": "min", "perplexity": "min"},
    "single_label": {"accuracy": "max", "f1": "max", "loss": "min"},
    "multi_label": {"f1": "max", "micro_f1": "max", "accuracy": "max", "loss": "min"},
    "regression": {"mse": "min", "pearson": "max", "loss": "min"},
    "qa": {"f1": "max", "exact_match": "max", "loss": "min"},
}
"""Task, or problem of a classification -> metrics that rank its evaluations, and the better end of each. The first
one counts where train.metric is null."""
DIRECTIONS = {name: better for metrics in METRICS.values() for name, better in metrics.items()}
"""Metric -> "min" or "max"."""


def metrics_of(cfg: TaskConfig) -> dict[str, str]:
    """Metric -> "min" or "max", the task's own metric first."""
    kind = cfg.problem if isinstance(cfg, ClassifyConfig) else type(cfg).__name__.removesuffix("Config").lower()
    return METRICS[kind]


def best_metric(cfg: TaskConfig, name: str | None) -> tuple[str, str]:
    """(metric, "min" or "max") by which the best evaluation is chosen; `name` is train.metric."""
    metrics = metrics_of(cfg)
    name = name or next(iter(metrics))
    return name, metrics[name]


def metric_problems(cfg: TaskConfig, name: str | None) -> Iterator[UserError]:
    """A train.metric that evaluations of this task do not have."""
    if isinstance(cfg, ClassifyConfig) and cfg.problem not in METRICS:
        return  # told by `task_problems`
    metrics = metrics_of(cfg)
    if name and name not in metrics:
        what = f"task.problem={cfg.problem}" if isinstance(cfg, ClassifyConfig) else "this task"
        yield UserError(f"train.metric = {name} is no metric of {what}",
                        remedy=f"Choose from {', '.join(metrics)}; train.metric=null is {next(iter(metrics))}.")


def task_problems(cfg: TaskConfig) -> Iterator[UserError]:
    """The problems of one task section; none for a sound one."""
    if isinstance(cfg, ClassifyConfig):
        yield from _classify(cfg)
    elif isinstance(cfg, QaConfig):
        yield from _qa(cfg)
    elif isinstance(cfg, InstructConfig):
        yield from _instruct(cfg)


def refuse_task(cfg: TaskConfig) -> None:
    """Raise the first of the problems."""
    for problem in task_problems(cfg):
        raise problem


def _classify(cfg: ClassifyConfig) -> Iterator[UserError]:
    if cfg.problem not in PROBLEMS:
        yield UserError(f"task.problem = {cfg.problem} is unknown", remedy=f"Choose from {', '.join(PROBLEMS)}.")
    if cfg.truncation not in TRUNCATIONS:
        yield UserError(f"task.truncation = {cfg.truncation} is unknown", remedy=f"Choose from {', '.join(TRUNCATIONS)}.")
    if cfg.problem == "regression" and (cfg.labels or cfg.class_weights):
        key = "labels" if cfg.labels else "class_weights"
        yield UserError(f"task.{key} has no meaning for a regression", remedy=f"Try task.{key}=null.")
    if cfg.label_separator is not None and cfg.problem != "multi_label":
        yield UserError(f"task.label_separator has no meaning for task.problem={cfg.problem}",
                        remedy="Try task.problem=multi_label, or task.label_separator=null.")
    if cfg.label_separator == "":
        yield UserError("task.label_separator is empty", remedy="Try task.label_separator=comma.")
    weights = cfg.class_weights
    if weights and not (all(w >= 0 for w in weights) and any(weights)):
        yield UserError(f"task.class_weights = {weights} must not be negative, nor all zero",
                        remedy=f"Try task.class_weights={[1.0] * len(weights)}.")


def _qa(cfg: QaConfig) -> Iterator[UserError]:
    for key in ("n_best", "max_answer_tokens"):
        if getattr(cfg, key) < 1:
            yield UserError(f"task.{key} = {getattr(cfg, key)} must be at least 1", remedy=f"Try task.{key}=20.")
    if cfg.stride < 0:
        yield UserError(f"task.stride = {cfg.stride} is negative", remedy="Try task.stride=128.")


def _instruct(cfg: InstructConfig) -> Iterator[UserError]:
    from finetune.data.conversations import check_format
    from finetune.data.template import load_template

    for look in (lambda: check_format(cfg.format), lambda: load_template(cfg.template, "<|endoftext|>")):
        try:
            look()
        except UserError as error:
            yield error
