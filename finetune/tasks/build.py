"""One file per head; `build_task` is the only place that chooses."""

from __future__ import annotations

from finetune.config import (
    ClassifyConfig,
    ClmConfig,
    InstructConfig,
    PreferenceConfig,
    QaConfig,
    RewardConfig,
    TaskConfig,
)
from finetune.tasks.base import Task


def build_task(cfg: TaskConfig, tokenizer, packing: bool) -> Task:
    """The task of a config section."""
    match cfg:
        case ClmConfig():
            from finetune.tasks.clm import ClmTask

            return ClmTask(cfg, tokenizer, packing)
        case InstructConfig():
            from finetune.tasks.instruct import InstructTask

            return InstructTask(cfg, tokenizer, packing)
        case ClassifyConfig():
            from finetune.tasks.classify import ClassifyTask

            return ClassifyTask(cfg, tokenizer)
        case QaConfig():
            from finetune.tasks.qa import QaTask

            return QaTask(cfg, tokenizer)
        case PreferenceConfig():
            from finetune.tasks.preference import PreferenceTask

            return PreferenceTask(cfg, tokenizer, packing)
        case RewardConfig():
            from finetune.tasks.reward import AnswersTask, RewardTask

            return (AnswersTask if cfg.answers_field else RewardTask)(cfg, tokenizer, packing)
        case _:
            raise AssertionError(type(cfg))
