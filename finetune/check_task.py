"""What is wrong with a task's settings, whatever the data hold: every problem, with its remedy."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config import ClassifyConfig, InstructConfig, QaConfig, TaskConfig
from finetune.errors import UserError

PROBLEMS = ("single_label", "multi_label", "regression")
TRUNCATIONS = ("head", "head_tail")


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
