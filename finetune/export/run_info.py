"""Facts about a run that the files of its export hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finetune.assets.paths import resolve
from finetune.config import (
    Config,
    DataConfig,
    Init,
    InstructConfig,
    ModelConfig,
    TaskConfig,
    plain_config,
)
from finetune.data.instruct_rows import conversation
from finetune.data.instruct_template import Message
from finetune.data.mixture import evaluation_text, train_sources, training_text
from finetune.data.sources import open_source
from finetune.errors import UserError
from finetune.gptj.load import local_folder

CHAT_ROWS = 64
"""Rows of the training data that are looked through for conversations."""
CONVERSATIONS = 4


@dataclass
class RunInfo:
    """Information about a run that its exports hold beside the weights."""

    name: str
    head: str
    base: str
    """Path or hub id of the model that was fine-tuned."""
    dtype: str
    """Precision of the export: bf16, fp16 or fp32."""
    task: dict[str, Any]
    """`Task.describe()`: label names, template, ..."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The task's config section, so that evaluation and generation use the same."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Lines of the model card: recipe, data, steps."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The evaluation at the exported step."""
    conversations: list[list[Message]] = field(default_factory=list)
    """Some of the training data, on which the exported chat template is compared with training."""
    revision: str | None = None
    """Branch, tag or commit of a base that is a hub id."""
    model: dict[str, Any] = field(default_factory=dict)
    """The run's model section: it names the format that an adapter's base had in training."""
    base_folder: Path | None = None
    """Where the base lies on this machine, by whose weights an adapter's export recognises it."""


def describe_run(
    cfg: Config,
    run_dir: Path,
    task: dict[str, Any],
    metrics: dict[str, Any],
    facts: dict[str, Any],
) -> RunInfo:
    """Return what an export of a run says about it.

    Args:
        task: `Task.describe()`.
        metrics: the evaluation at the exported step.
        facts: the exported step's own lines of the model card.
    """
    base = base_name(cfg.model, run_dir)
    drawn = cfg.model.init is Init.random
    data = {
        "training data": training_text(cfg.data),
        "evaluation data": evaluation_text(cfg.data),
    }
    start = {"began from the adapter": getattr(cfg.adapter, "start", None)}
    return RunInfo(
        name=cfg.name,
        head=cfg.task.head,
        base=base,
        dtype=cfg.model.dtype.value,
        task=task,
        settings=plain_config(cfg)["task"],
        facts={"recipe": cfg.name, **data, **start, "seed": cfg.seed, **facts},
        metrics=metrics,
        conversations=real_conversations(cfg.task, cfg.data),
        revision=cfg.model.revision,
        model=plain_config(cfg)["model"],
        base_folder=Path(base) if drawn else local_folder(cfg.model, download=False),
    )


def base_name(cfg: ModelConfig, run_dir: Path) -> str:
    """Return how others find the base model: an absolute path, or the hub id.

    A random base is written beside the export.
    """
    if cfg.init is Init.random:
        return str(run_dir / "base")
    path = Path(resolve(cfg.path)).expanduser()
    return str(path.absolute()) if path.is_dir() else cfg.path


def real_conversations(task: TaskConfig, data: DataConfig) -> list[list[Message]]:
    """Return the first conversations of the training data; none if it can no longer be read."""
    conversations: list[list[Message]] = []
    if not isinstance(task, InstructConfig):
        return conversations
    try:
        sources = [open_source(s.path, s.split, s.config) for s in train_sources(data)]
        each = -(-CHAT_ROWS // max(1, len(sources)))
        for row in chain.from_iterable(islice(source.rows(), each) for source in sources):
            try:
                read = None if isinstance(row, UserError) else conversation(row[1], row[0], task)
            except UserError:  # left out of training too
                continue
            conversations += [read[0]] if read else []
    except UserError:
        pass
    return conversations[:CONVERSATIONS]
