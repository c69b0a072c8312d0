"""Report every problem of a config at once, each with a remedy to type.

Derives nothing and imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from finetune.config import (
    GPTJ_POSITIONS,
    METRICS,
    PREFERENCE_LOSSES,
    SCHEDULES,
    ClassifyConfig,
    Config,
    FinalCheckpoint,
    FullConfig,
    InstructConfig,
    LoraConfig,
    PreferenceConfig,
    PrefixConfig,
    PromptConfig,
    QaConfig,
    Quantize,
    TaskConfig,
)
from finetune.errors import UserError, problems_error
from finetune.planning.job import accumulation, sharding_problems
from finetune.planning.shape import WHOLE_MODULES, adapted_layers
from finetune.reporting.redact import secret_problems


def check(
    cfg: Config,
    world_size: int,
    cuda: bool,
    absent: Callable[[Config, bool], Iterable[UserError]] | None = None,
) -> None:
    """Raise one UserError that lists every problem.

    Args:
        world_size: ranks of this run.
        cuda: whether it trains on GPUs.
        absent: (config, whether all else is well) -> problems with what the config names: missing
            files, and lengths beyond the positions of the model. None: nothing is looked up, and
            the model is taken to have GPT-J's own positions.
    """
    # Raised alone, as other problems may repeat the value.
    problems = list(secret_problems(asdict(cfg)))
    if problems:
        raise problems_error("the configuration", problems)
    problems = list(_problems(cfg, world_size, cuda))
    problems += absent(cfg, not problems) if absent else length_problems(cfg, GPTJ_POSITIONS)
    if problems:
        raise problems_error("the configuration", problems)


def planning_problems(cfg: Config, world_size: int, cuda: bool, positions: int) -> None:
    """Check a config like `check`, but without requiring data, as a plan needs none.

    Args:
        positions: n_positions of the model.
    """
    problems = [p for p in _problems(cfg, world_size, cuda) if p.where != "data.train"]
    problems += length_problems(cfg, positions)
    if problems:
        raise problems_error("the configuration", problems)


def length_problems(cfg: Config, positions: int) -> Iterator[UserError]:
    """Yield the problem of sequences, with virtual tokens, that exceed the model's positions."""
    return room_problems(cfg.task.max_length, getattr(cfg.adapter, "virtual_tokens", 0), positions)


def room_problems(max_length: int, virtual_tokens: int, positions: int) -> Iterator[UserError]:
    """Yield the problems of `length_problems`, given plain numbers.

    Args:
        max_length: task.max_length.
        virtual_tokens: those of a prompt or prefix adapter, else 0.
        positions: n_positions of the model.
    """
    if max_length > positions:
        yield UserError(
            f"task.max_length = {max_length} exceeds the model's {positions} positions (n_positions in its "
            "config.json)",
            remedy=f"Try task.max_length={positions - virtual_tokens}.",
        )
    elif virtual_tokens > positions - max_length:
        yield UserError(
            f"adapter.virtual_tokens = {virtual_tokens} and task.max_length = {max_length} exceed the model's "
            f"{positions} positions",
            remedy=f"Try task.max_length={positions - virtual_tokens}.",
        )


def _problems(cfg: Config, world_size: int, cuda: bool) -> Iterator[UserError]:
    yield from _data(cfg)
    yield from _length(cfg)
    yield from _batch(cfg, world_size)
    yield from _optim(cfg)
    yield from _model(cfg)
    yield from _quantize(cfg)
    yield from _adapter(cfg)
    yield from sharding_problems(cfg, cuda)
    yield from task_problems(cfg.task)
    yield from metric_problems(cfg.task, cfg.train.metric)
    yield from _rest(cfg)


def _data(cfg: Config) -> Iterator[UserError]:
    if not cfg.data.train:
        yield UserError(
            "no training data is given",
            "data.train",
            "Give a file, glob, directory or hub id: data.train='pile/*.jsonl.zst' data.eval=pile/val.jsonl.zst\n"
            'Pile format is one JSON object a line: {"text": "...", "meta": {"pile_set_name": "..."}}\n'
            "What runs right now, on data that ships with the project:\n"
            f"  deepspeed launch/train.py recipe={cfg.name} debug=tiny\n"
            "  deepspeed launch/train.py recipe=quickstart",
        )


def _length(cfg: Config) -> Iterator[UserError]:
    if cfg.task.max_length < 8:
        yield UserError(
            f"task.max_length = {cfg.task.max_length} is too short to train on",
            remedy="Try 128 or more.",
        )
    if cfg.train.steps is None and cfg.train.epochs is None:
        yield UserError(
            "neither train.steps nor train.epochs is given", remedy="Try train.epochs=1."
        )
    for key in ("steps", "epochs"):
        value = getattr(cfg.train, key)
        if value is not None and value <= 0:
            yield UserError(f"train.{key} = {value} trains nothing", remedy=f"Try train.{key}=1.")
    if isinstance(cfg.task, QaConfig) and cfg.task.stride >= cfg.task.max_length // 2:
        yield UserError(
            f"task.stride = {cfg.task.stride} must be less than half of task.max_length = "
            f"{cfg.task.max_length}",
            remedy=f"Try task.stride={cfg.task.max_length // 4}.",
        )


def _batch(cfg: Config, world_size: int) -> Iterator[UserError]:
    micro = cfg.train.micro_batch
    if isinstance(micro, str) and micro != "auto":
        yield UserError(
            f"train.micro_batch = {micro} is neither a number nor auto",
            remedy="Try train.micro_batch=1.",
        )
        return
    if cfg.train.global_batch < 1 or (micro != "auto" and int(micro) < 1):
        yield UserError(
            "train.micro_batch and train.global_batch must be at least 1",
            remedy="Try train.micro_batch=1.",
        )
        return
    try:
        accumulation(1 if micro == "auto" else int(micro), cfg.train.global_batch, world_size)
    except UserError as error:
        yield error


def _optim(cfg: Config) -> Iterator[UserError]:
    optim = cfg.optim
    if optim.schedule not in SCHEDULES:
        yield UserError(
            f"optim.schedule = {optim.schedule} is unknown",
            remedy=f"Choose from {', '.join(SCHEDULES)}.",
        )
    if not 0 < optim.lr < math.inf:
        yield UserError(
            f"optim.lr = {optim.lr} is not a positive number", remedy="Try optim.lr=1e-4."
        )
    if optim.cycles < 1:
        yield UserError(
            f"optim.cycles = {optim.cycles} must be at least 1", remedy="Try optim.cycles=3."
        )
    if not 0 < optim.eps < math.inf:
        yield UserError(
            f"optim.eps = {optim.eps} is not a positive number", remedy="Try optim.eps=1e-8."
        )
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        yield UserError(
            f"optim.betas = {optim.betas} must be two numbers in [0, 1)",
            remedy="Try optim.betas=[0.9,0.999].",
        )
    if not 0 <= optim.min_lr <= 1:
        yield UserError(
            f"optim.min_lr = {optim.min_lr} is a share of the peak, 0 to 1",
            remedy="Try optim.min_lr=0.1.",
        )
    for key in ("warmup", "decay", "weight_decay", "grad_clip"):
        if not 0 <= getattr(optim, key) < math.inf:
            yield UserError(
                f"optim.{key} = {getattr(optim, key)} is negative, or no number",
                remedy=f"Try optim.{key}=0.",
            )


def _model(cfg: Config) -> Iterator[UserError]:
    for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        value = getattr(cfg.model, key)
        if value is not None and not 0 <= value < 1:
            yield UserError(
                f"model.{key} = {value} is not a probability below 1",
                remedy=f"Try model.{key}=0.1.",
            )


def _quantize(cfg: Config) -> Iterator[UserError]:
    if cfg.model.quantize is not Quantize.none and isinstance(cfg.adapter, FullConfig):
        yield UserError(
            f"model.quantize = {cfg.model.quantize.value} freezes the weights that adapter=full "
            "trains",
            "adapter=full",
            "Try adapter=lora, or model.quantize=none with optim.name=adamw8bit.",
        )


def _adapter(cfg: Config) -> Iterator[UserError]:
    adapter = cfg.adapter
    if isinstance(adapter, LoraConfig):
        if adapter.rank < 1:
            yield UserError(
                f"adapter.rank = {adapter.rank} must be at least 1", remedy="Try adapter.rank=8."
            )
        if not 0 < adapter.alpha < math.inf:
            yield UserError(
                f"adapter.alpha = {adapter.alpha} would leave the adapter without effect",
                remedy="Try adapter.alpha=16.",
            )
        if not 0 < adapter.lr_ratio < math.inf:
            yield UserError(
                f"adapter.lr_ratio = {adapter.lr_ratio} must be above 0",
                remedy="Try adapter.lr_ratio=16.",
            )
        allowed = WHOLE_MODULES if cfg.task.head == "lm" else WHOLE_MODULES[:2]
        if unknown := [name for name in adapter.modules_to_save if name not in allowed]:
            yield UserError(
                f"adapter.modules_to_save = {adapter.modules_to_save}: {', '.join(unknown)} cannot be "
                "trained whole with this task",
                remedy=f"Choose from {', '.join(allowed)}.",
            )
        try:
            adapted_layers(adapter.layers)
        except UserError as error:
            yield error
        if not 0 <= adapter.dropout < 1:
            yield UserError(
                f"adapter.dropout = {adapter.dropout} is not a probability below 1",
                remedy="Try adapter.dropout=0.05.",
            )
    if hasattr(adapter, "targets"):
        from finetune.planning.shape import target_modules

        try:
            target_modules(adapter.targets)
        except UserError as error:
            yield error
    if isinstance(adapter, (PromptConfig, PrefixConfig)) and adapter.virtual_tokens < 1:
        yield UserError(
            "adapter.virtual_tokens must be at least 1", remedy="Try adapter.virtual_tokens=20."
        )


def _rest(cfg: Config) -> Iterator[UserError]:
    if cfg.zero.bucket_elements < 1:
        yield UserError(
            f"zero.bucket_elements = {cfg.zero.bucket_elements} must be at least 1",
            remedy="Try zero.bucket_elements=50000000.",
        )
    if not re.fullmatch(r"[\w][\w.-]*", cfg.name):
        yield UserError(
            f"name = {cfg.name} is part of a path and may only hold letters, digits, '.', '_' and '-'",
            remedy="Try name=my-run, and run_dir=DIR for another place.",
        )
    if cfg.data.max_bad_rows < 0:
        yield UserError(
            f"data.max_bad_rows = {cfg.data.max_bad_rows} is negative",
            remedy="Try data.max_bad_rows=100.",
        )
    try:
        "".encode(cfg.data.encoding)
    except LookupError:
        yield UserError(
            f"data.encoding = {cfg.data.encoding} is no encoding of text that Python knows",
            remedy="Try data.encoding=cp1252 (Western Windows), or leave it out for UTF-8.",
        )
    if cfg.checkpoint.keep < 2:
        yield UserError(
            f"checkpoint.keep = {cfg.checkpoint.keep}: the newest may be damaged by what ended the run",
            remedy="Try checkpoint.keep=2.",
        )
    if cfg.checkpoint.final is FinalCheckpoint.none and not cfg.export.enabled:
        yield UserError(
            "checkpoint.final=none and export.enabled=false leave nothing of the trained model",
            remedy="Try checkpoint.final=weights.",
        )
    for section, key in (
        ("train", "eval_every"),
        ("train", "log_every"),
        ("train", "sample_every"),
        ("checkpoint", "every"),
    ):
        value = getattr(getattr(cfg, section), key)
        if value < 0:
            yield UserError(
                f"{section}.{key} = {value} is negative", remedy=f"Try {section}.{key}=0."
            )
    for key in ("max_skipped", "hang_timeout", "max_time"):
        value = getattr(cfg.train, key)
        if value < 0:
            yield UserError(
                f"train.{key} = {value} is negative", remedy=f"Try train.{key}=0 for never."
            )
    if not 0 <= cfg.train.neftune_alpha < math.inf:
        yield UserError(
            f"train.neftune_alpha = {cfg.train.neftune_alpha} is negative, or no number",
            remedy="Try train.neftune_alpha=5, or 0 for no noise.",
        )
    if cfg.train.eval_batch < 1:
        yield UserError(
            f"train.eval_batch = {cfg.train.eval_batch} evaluates nothing",
            remedy="Try train.eval_batch=8.",
        )
    if cfg.train.early_stopping < 0:
        yield UserError(
            f"train.early_stopping = {cfg.train.early_stopping} is negative",
            remedy="Try train.early_stopping=0 for never.",
        )
    if cfg.train.sample_every and not cfg.train.sample_prompts:
        yield UserError(
            "train.sample_every needs prompts",
            "train.sample_prompts",
            "Try train.sample_prompts=[The].",
        )
    if cfg.train.sample_every and cfg.train.sample_tokens < 1:
        yield UserError(
            f"train.sample_tokens = {cfg.train.sample_tokens} samples nothing",
            remedy="Try train.sample_tokens=40.",
        )
    if cfg.tracker.wandb.mode not in ("online", "offline", "disabled"):
        yield UserError(
            f"tracker.wandb.mode = {cfg.tracker.wandb.mode} is none of online, offline, disabled",
            remedy="Try tracker.wandb.mode=offline.",
        )
    if cfg.train.activation_checkpointing not in (True, False, "selective", "offload"):
        yield UserError(
            f"train.activation_checkpointing = {cfg.train.activation_checkpointing} is none of true, false, "
            "selective, offload",
            remedy="Try train.activation_checkpointing=true.",
        )
    if cfg.checkpoint.background not in ("auto", True, False):
        yield UserError(
            f"checkpoint.background = {cfg.checkpoint.background} is none of auto, true, false",
            remedy="Try checkpoint.background=auto.",
        )
    if cfg.train.early_stopping and not (cfg.data.eval and cfg.train.eval_every):
        yield UserError(
            "train.early_stopping needs data.eval and train.eval_every",
            remedy="Try train.eval_every=100 data.eval=FILE.",
        )
    if cfg.checkpoint.best and not (cfg.data.eval and cfg.train.eval_every):
        yield UserError(
            "checkpoint.best needs data.eval and train.eval_every",
            remedy="Try train.eval_every=100 data.eval=FILE.",
        )
    if cfg.resume not in ("auto", "never") and not Path(cfg.resume).expanduser().is_dir():
        yield UserError(
            f"resume = {cfg.resume} is neither auto, never, nor a directory",
            "resume",
            "Give a run directory or one of its checkpoints/step-N.",
        )


# Checks of a task's settings without its data, each with a remedy, and the metrics of a task.
PROBLEMS = ("single_label", "multi_label", "regression")
TRUNCATIONS = ("head", "head_tail")


def metrics_of(cfg: TaskConfig) -> dict[str, str]:
    """Return metric -> "min" or "max", the task's own metric first."""
    kind = (
        cfg.problem
        if isinstance(cfg, ClassifyConfig)
        else type(cfg).__name__.removesuffix("Config").lower()
    )
    return METRICS[kind]


def best_metric(cfg: TaskConfig, name: str | None) -> tuple[str, str]:
    """Return (metric, "min" or "max") by which the best evaluation is chosen.

    `name` is train.metric.
    """
    metrics = metrics_of(cfg)
    name = name or next(iter(metrics))
    return name, metrics[name]


def metric_problems(cfg: TaskConfig, name: str | None) -> Iterator[UserError]:
    """Yield a problem if evaluations of this task do not have train.metric."""
    if isinstance(cfg, ClassifyConfig) and cfg.problem not in METRICS:
        return  # reported by `task_problems`
    metrics = metrics_of(cfg)
    if name and name not in metrics:
        what = f"task.problem={cfg.problem}" if isinstance(cfg, ClassifyConfig) else "this task"
        yield UserError(
            f"train.metric = {name} is no metric of {what}",
            remedy=f"Choose from {', '.join(metrics)}; train.metric=null is {next(iter(metrics))}.",
        )


def task_problems(cfg: TaskConfig) -> Iterator[UserError]:
    """Yield the problems of one task section."""
    if isinstance(cfg, ClassifyConfig):
        yield from _classify(cfg)
    elif isinstance(cfg, QaConfig):
        yield from _qa(cfg)
    elif isinstance(cfg, InstructConfig):
        yield from _instruct(cfg)
    elif isinstance(cfg, PreferenceConfig):
        yield from _preference(cfg)


def refuse_task(cfg: TaskConfig) -> None:
    """Raise the first of the problems of a task section."""
    for problem in task_problems(cfg):
        raise problem


def _classify(cfg: ClassifyConfig) -> Iterator[UserError]:
    if cfg.problem not in PROBLEMS:
        yield UserError(
            f"task.problem = {cfg.problem} is unknown", remedy=f"Choose from {', '.join(PROBLEMS)}."
        )
    if cfg.truncation not in TRUNCATIONS:
        yield UserError(
            f"task.truncation = {cfg.truncation} is unknown",
            remedy=f"Choose from {', '.join(TRUNCATIONS)}.",
        )
    if cfg.problem == "regression" and (cfg.labels or cfg.class_weights):
        key = "labels" if cfg.labels else "class_weights"
        yield UserError(
            f"task.{key} has no meaning for a regression", remedy=f"Try task.{key}=null."
        )
    if cfg.label_separator is not None and cfg.problem != "multi_label":
        yield UserError(
            f"task.label_separator has no meaning for task.problem={cfg.problem}",
            remedy="Try task.problem=multi_label, or task.label_separator=null.",
        )
    if cfg.label_separator == "":
        yield UserError("task.label_separator is empty", remedy="Try task.label_separator=comma.")
    weights = cfg.class_weights
    if weights == "balanced" and cfg.problem == "multi_label":
        yield UserError(
            "task.class_weights=balanced is for texts with one label each",
            remedy="Try task.class_weights=[1,3], one weight per label.",
        )
    elif weights and weights != "balanced":
        if not isinstance(weights, list) or not all(isinstance(w, (int, float)) for w in weights):
            yield UserError(
                f"task.class_weights = {weights} is neither balanced nor a list of numbers",
                remedy="Try task.class_weights=balanced or task.class_weights=[1,3].",
            )
        elif not (all(w >= 0 for w in weights) and any(weights)):
            yield UserError(
                f"task.class_weights = {weights} must not be negative, nor all zero",
                remedy=f"Try task.class_weights={[1.0] * len(weights)}.",
            )


def _qa(cfg: QaConfig) -> Iterator[UserError]:
    for key in ("n_best", "max_answer_tokens"):
        if getattr(cfg, key) < 1:
            yield UserError(
                f"task.{key} = {getattr(cfg, key)} must be at least 1", remedy=f"Try task.{key}=20."
            )
    if cfg.stride < 0:
        yield UserError(f"task.stride = {cfg.stride} is negative", remedy="Try task.stride=128.")


def _preference(cfg: PreferenceConfig) -> Iterator[UserError]:
    if cfg.loss not in PREFERENCE_LOSSES:
        choices = ", ".join(PREFERENCE_LOSSES)
        yield UserError(f"task.loss = {cfg.loss} is unknown", remedy=f"Choose from {choices}.")
    if not 0 < cfg.beta < math.inf:
        yield UserError(
            f"task.beta = {cfg.beta} is not a positive number", remedy="Try task.beta=0.1."
        )
    if not 0 <= cfg.label_smoothing < 0.5:
        yield UserError(
            f"task.label_smoothing = {cfg.label_smoothing} must be at least 0 and below 0.5",
            remedy="Try task.label_smoothing=0.1.",
        )
    if cfg.label_smoothing and cfg.loss not in ("dpo", "simpo"):
        yield UserError(
            f"task.label_smoothing has no meaning for task.loss={cfg.loss}",
            remedy="Try task.label_smoothing=0.",
        )


def _instruct(cfg: InstructConfig) -> Iterator[UserError]:
    from finetune.data.instruct_rows import check_format
    from finetune.data.instruct_template import load_template

    for look in (
        lambda: check_format(cfg.format),
        lambda: load_template(cfg.template, "<|endoftext|>"),
    ):
        try:
            look()
        except UserError as error:
            yield error
