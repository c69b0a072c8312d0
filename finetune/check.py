"""Report every problem of a config at once, each with a remedy to type.

The bounds and choices of a single setting stand beside its field in config.py; the rules that take
more than one setting, or more than a comparison, are listed here. Derives nothing and imports no
torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from finetune.config import (
    GENERATED,
    GPTJ_POSITIONS,
    ClassifyConfig,
    Config,
    FinalCheckpoint,
    FullConfig,
    LoraConfig,
    PreferenceConfig,
    QaConfig,
    Quantize,
    TaskConfig,
    asks_lm_eval,
    kind_of,
    metrics_of,
    own_tokens,
    template_tokens,
)
from finetune.data.mixture import source_problems
from finetune.errors import Rule, UserError, broken, problems_error
from finetune.planning.job import accumulation, sharding_problems
from finetune.planning.shape import WHOLE_MODULES, adapted_layers, target_modules

DATA_REMEDY = """\
Give a file, glob, directory or hub id: data.train='pile/*.jsonl.zst' data.eval=pile/val.jsonl.zst
Pile format is one JSON object a line: {"text": "...", "meta": {"pile_set_name": "..."}}
What runs right now, on data that ships with the project:
  deepspeed launch/train.py recipe=RECIPE debug=tiny
  deepspeed launch/train.py recipe=quickstart"""


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
    problems = list(_config_problems(cfg, world_size, cuda))
    problems += absent(cfg, not problems) if absent else length_problems(cfg, GPTJ_POSITIONS)
    if problems:
        raise problems_error("the configuration", problems)


def planning_problems(cfg: Config, world_size: int, cuda: bool, positions: int) -> None:
    """Check a config like `check`, but without requiring data, as a plan needs none.

    Args:
        positions: n_positions of the model.
    """
    problems = [p for p in _config_problems(cfg, world_size, cuda) if p.where != "data.train"]
    problems += length_problems(cfg, positions)
    if problems:
        raise problems_error("the configuration", problems)


def value_problems(section: Any, prefix: str = "") -> Iterator[UserError]:
    """Yield a problem for each value outside the bounds or choices that its field states.

    Args:
        section: a dataclass of the schema; the sections in it are checked too.
        prefix: of its keys, such as `task.`.
    """
    for item in fields(section):
        key, value = f"{prefix}{item.name}", getattr(section, item.name)
        limits = item.metadata.get("limits")
        if is_dataclass(value):
            yield from value_problems(value, f"{key}.")
        elif limits is None or value is None or limits.allow(value):
            continue
        elif limits.suggest is None:
            choices = ", ".join(str(one).lower() for one in limits.choices)
            yield UserError(f"{key} = {value} is unknown", remedy=f"Choose from {choices}.")
        else:
            finite = "" if isinstance(value, str) or math.isfinite(value) else " and finite"
            besides = "".join(f", or {word}" for word in limits.choices)
            yield UserError(
                f"{key} = {value} must be {limits}{finite}{besides}",
                remedy=f"Try {key}={limits.suggest}.",
            )


def length_problems(cfg: Config, positions: int) -> Iterator[UserError]:
    """Yield the problem of sequences, with virtual tokens, that exceed the model's positions."""
    return room_problems(cfg.task.max_length, getattr(cfg.adapter, "virtual_tokens", 0), positions)


def room_problems(max_length: int, virtual_tokens: int, positions: int) -> Iterator[UserError]:
    """Yield the problem of `length_problems`, given plain numbers.

    Args:
        max_length: task.max_length.
        virtual_tokens: those of a prompt or prefix adapter, else 0.
        positions: n_positions of the model.
    """
    if max_length + virtual_tokens <= positions:
        return
    length = f"task.max_length = {max_length}"
    if max_length > positions:
        problem = (
            f"{length} exceeds the model's {positions} positions (n_positions in its config.json)"
        )
    else:
        problem = (
            f"adapter.virtual_tokens = {virtual_tokens} and {length} exceed the model's "
            f"{positions} positions"
        )
    yield UserError(problem, remedy=f"Try task.max_length={positions - virtual_tokens}.")


def task_problems(task: TaskConfig, metric: str | None = None) -> Iterator[UserError]:
    """Yield the problems of one task section.

    Args:
        metric: train.metric, METRIC or SET/METRIC, which evaluations of the task must have.
    """
    yield from value_problems(task, "task.")
    yield from broken(_task_rules(task, metric))


def refuse_task(task: TaskConfig) -> None:
    """Raise the first of the problems of a task section."""
    for problem in task_problems(task):
        raise problem


def _config_problems(cfg: Config, world_size: int, cuda: bool) -> Iterator[UserError]:
    yield from value_problems(cfg)
    own_metric = None if asks_lm_eval(cfg.eval, cfg.train.metric) else cfg.train.metric
    yield from broken(
        [
            *_task_rules(cfg.task, own_metric),
            *_run_rules(cfg),
            *_evaluation_rules(cfg),
            *_lm_eval_rules(cfg),
            *_token_rules(cfg),
        ]
    )
    yield from sharding_problems(cfg, cuda)
    yield from source_problems(cfg.data)
    try:
        "".encode(cfg.data.encoding)
    except LookupError:
        yield UserError(
            f"data.encoding = {cfg.data.encoding} is no encoding of text that Python knows",
            remedy="Try data.encoding=cp1252 (Western Windows), or leave it out for UTF-8.",
        )

    # Rules that are written down where they are needed, and raise their problem.
    train, adapter, task = cfg.train, cfg.adapter, cfg.task
    attempts: list[Callable[[], object]] = []
    micro_batch = 1 if train.micro_batch == "auto" else train.micro_batch
    if isinstance(micro_batch, int) and min(micro_batch, train.global_batch) > 0:
        attempts.append(lambda: accumulation(micro_batch, train.global_batch, world_size))
    if hasattr(adapter, "targets"):
        attempts.append(lambda: target_modules(adapter.targets))
    if hasattr(adapter, "layers"):
        attempts.append(lambda: adapted_layers(adapter.layers))
    if hasattr(task, "template"):
        # Here, as only these tasks have to wait for jinja2's import.
        from finetune.data.instruct_template import load_template

        attempts.append(lambda: load_template(task.template, "<|endoftext|>"))
    for attempt in attempts:
        try:
            attempt()
        except UserError as error:
            yield error


def _run_rules(cfg: Config) -> list[Rule]:
    """Rules of a run as a whole: its data, adapter, length and results."""
    train, betas = cfg.train, cfg.optim.betas
    allowed = [name for name in WHOLE_MODULES if name != "lm_head" or cfg.task.head == "lm"]
    whole = getattr(cfg.adapter, "modules_to_save", [])
    unknown = ", ".join(name for name in whole if name not in allowed)
    init, quantize = getattr(cfg.adapter, "init", "default"), cfg.model.quantize
    beside_init = {
        f"model.quantize={quantize.value}": quantize is not Quantize.none,
        "adapter.dora=true": getattr(cfg.adapter, "dora", False),
        "adapter.start": getattr(cfg.adapter, "start", None),
    }
    clashes = ", ".join(word for word, used in beside_init.items() if used)
    return [
        (
            init in ("pissa", "olora") and clashes,
            f"adapter.init = {init} changes the weights of the base, and cannot be combined with "
            f"{clashes}",
            "",
            "Try adapter.init=default.",
        ),
        (
            bool(getattr(cfg.task, "answers_field", None)),
            "a reward model is trained on pairs, not on lists of answers",
            "task.answers_field",
            "Leave it out; launch/evaluate.py takes it.",
        ),
        (
            not cfg.data.train,
            "no training data is given",
            "data.train",
            DATA_REMEDY.replace("RECIPE", cfg.name),
        ),
        (
            not re.fullmatch(r"[\w][\w.-]*", cfg.name),
            f"name = {cfg.name} is part of a path and may only hold letters, digits, '.', '_' and "
            "'-'",
            "",
            "Try name=my-run, and run_dir=DIR for another place.",
        ),
        (
            cfg.resume not in ("auto", "never") and not Path(cfg.resume).expanduser().is_dir(),
            f"resume = {cfg.resume} is neither auto, never, nor a directory",
            "resume",
            "Give a run directory or one of its checkpoints/step-N.",
        ),
        (
            cfg.task.max_length < 8,
            f"task.max_length = {cfg.task.max_length} is too short to train on",
            "",
            "Try 128 or more.",
        ),
        (
            cfg.model.quantize is not Quantize.none and isinstance(cfg.adapter, FullConfig),
            f"model.quantize = {cfg.model.quantize.value} freezes the weights that adapter=full "
            "trains",
            "adapter=full",
            "Try adapter=lora, or model.quantize=none with optim.name=adamw8bit.",
        ),
        (
            unknown,
            f"adapter.modules_to_save = {whole}: {unknown} cannot be trained whole with this task",
            "",
            f"Choose from {', '.join(allowed)}.",
        ),
        (
            len(betas) != 2 or not all(0 <= beta < 1 for beta in betas),
            f"optim.betas = {betas} must be two numbers in [0, 1)",
            "",
            "Try optim.betas=[0.9,0.999].",
        ),
        (
            train.steps is None and train.epochs is None,
            "neither train.steps nor train.epochs is given",
            "",
            "Try train.epochs=1.",
        ),
        (
            train.sample_every and not train.sample_prompts,
            "train.sample_every needs prompts",
            "train.sample_prompts",
            "Try train.sample_prompts=[The].",
        ),
        (
            cfg.checkpoint.final is FinalCheckpoint.none and not cfg.export.enabled,
            "checkpoint.final=none and export.enabled=false leave nothing of the trained model",
            "",
            "Try checkpoint.final=weights.",
        ),
    ]


def _evaluation_rules(cfg: Config) -> list[Rule]:
    """Rules of what evaluations need, and of what depends on their metrics."""
    train = cfg.train
    evaluates = bool(cfg.data.evaluates and train.eval_every)
    eval_set, _, own_metric = (train.metric or "").rpartition("/")
    generates = GENERATED.keys() <= metrics_of(cfg.task).keys()
    sets = [*_eval_sets(cfg), *cfg.eval.lm_eval]
    return [
        (
            eval_set and eval_set not in sets,
            f"train.metric = {train.metric}, and there is no evaluation set {eval_set}, nor such a "
            "task in eval.lm_eval",
            "",
            f"Choose from {', '.join(sets) or 'names, as in data.eval={web: a.jsonl}'}"
            f"; a task of lm-eval is named in eval.lm_eval=[{eval_set}].",
        ),
        (
            generates
            and own_metric in GENERATED
            and not cfg.eval.generate
            and not asks_lm_eval(cfg.eval, train.metric),
            f"train.metric = {train.metric} is a metric of generated answers",
            "",
            "Try eval.generate=32.",
        ),
        (
            cfg.eval.generate and not generates,
            f"eval.generate = {cfg.eval.generate}: only task=clm and task=instruct generate text",
            "",
            "Try eval.generate=0.",
        ),
        (
            cfg.eval.generate and not cfg.data.evaluates,
            f"eval.generate = {cfg.eval.generate} needs evaluation data",
            "data.eval",
            "Try data.eval=FILE, or data.eval=0.02.",
        ),
        (
            cfg.eval.generate and cfg.eval.generate_tokens >= cfg.task.max_length,
            f"eval.generate_tokens = {cfg.eval.generate_tokens} leaves task.max_length = "
            f"{cfg.task.max_length} no room for a prompt",
            "",
            f"Try eval.generate_tokens={max(1, cfg.task.max_length // 2)}.",
        ),
        (
            train.early_stopping and not evaluates,
            "train.early_stopping needs data.eval and train.eval_every",
            "",
            "Try train.eval_every=100 data.eval=FILE.",
        ),
        (
            cfg.checkpoint.best and not evaluates,
            "checkpoint.best needs data.eval and train.eval_every",
            "",
            "Try train.eval_every=100 data.eval=FILE.",
        ),
    ]


def _lm_eval_rules(cfg: Config) -> list[Rule]:
    """Rules of lm-eval's tasks, which are asked beside the evaluation data."""
    metric, twice = cfg.train.metric, sorted({*_eval_sets(cfg)} & {*cfg.eval.lm_eval})
    return [
        (
            cfg.eval.lm_eval and cfg.task.head != "lm",
            f"eval.lm_eval = {cfg.eval.lm_eval}: lm-eval asks language models, which "
            f"{kind_of(cfg.task)} does not train",
            "",
            "Try eval.lm_eval=[].",
        ),
        (
            cfg.eval.lm_eval and not cfg.data.evaluates,
            f"eval.lm_eval = {cfg.eval.lm_eval} is asked beside evaluation data, and there are "
            "none",
            "data.eval",
            "Try data.eval=FILE, or data.eval=0.02.",
        ),
        (
            twice,
            f"an evaluation set and a task of eval.lm_eval are both named {', '.join(twice)}",
            "",
            "Give the set another name in data.eval.",
        ),
        (
            asks_lm_eval(cfg.eval, metric) and cfg.eval.lm_eval_every > 1,
            f"train.metric = {metric} needs a figure at every evaluation, and "
            f"eval.lm_eval_every = {cfg.eval.lm_eval_every}",
            "",
            "Try eval.lm_eval_every=1 with a larger train.eval_every.",
        ),
    ]


def _eval_sets(cfg: Config) -> list[str]:
    """Return the names of the evaluation sets, if they have any."""
    return list(map(str, cfg.data.eval)) if isinstance(cfg.data.eval, dict) else []


def _token_rules(cfg: Config) -> list[Rule]:
    """Rules of the task's own tokens, as far as they need no tokenizer."""
    tokens, adapter = cfg.task.tokens, cfg.adapter
    repeated = sorted({name for name in tokens if tokens.count(name) > 1})
    wrong = [name for name in tokens if not name.strip() or name != name.strip()]
    kind = type(adapter).__name__.removesuffix("Config").lower()
    trained = bool(own_tokens(cfg.task))
    rows_of_head = cfg.task.head == "lm" and "lm_head" not in getattr(
        adapter, "modules_to_save", ()
    )
    key, other = "task.tokens", "task.tokens=[]"
    if template_tokens(cfg.task):
        key, other = "task.template=chatml", "another task.template, such as chat"
    return [
        (
            repeated,
            f"task.tokens has {', '.join(repeated)} more than once",
            "",
            "Name each token once.",
        ),
        (
            wrong,
            f"task.tokens: {next(iter(wrong), '')!r} is empty, or begins or ends with a space",
            "",
            "Try task.tokens=['<|tool|>'].",
        ),
        (
            trained and not isinstance(adapter, (FullConfig, LoraConfig)),
            "tokens of your own have rows to train, which peft combines with LoRA and not with "
            f"{kind}",
            key,
            f"Try adapter=lora, adapter=full, or {other}.",
        ),
        (
            trained and getattr(adapter, "dora", False) and rows_of_head,
            "tokens of your own train rows of the head, and DoRA would rescale all of them",
            key,
            f"Try adapter.dora=false, adapter.modules_to_save=[lm_head], or {other}.",
        ),
    ]


def _task_rules(task: TaskConfig, metric: str | None) -> list[Rule]:
    # An unknown task.problem has no metrics, and is a problem of its own.
    metrics = metrics_of(task)
    own_metric = (metric or "").rpartition("/")[2]
    problem = getattr(task, "problem", "")
    rules: list[Rule] = [
        (
            own_metric and metrics and own_metric not in metrics,
            f"train.metric = {metric} is no metric of "
            + (f"task.problem={problem}" if problem else "this task"),
            "",
            f"Choose from {', '.join(metrics)}; train.metric=null is {next(iter(metrics), '')}.",
        ),
    ]
    if isinstance(task, QaConfig):
        rules.append(
            (
                task.stride >= task.max_length // 2,
                f"task.stride = {task.stride} must be less than half of task.max_length = "
                f"{task.max_length}",
                "",
                f"Try task.stride={task.max_length // 4}.",
            )
        )
    if isinstance(task, PreferenceConfig):
        rules.append(
            (
                task.label_smoothing and task.loss not in ("dpo", "simpo"),
                f"task.label_smoothing has no meaning for task.loss={task.loss}",
                "",
                "Try task.label_smoothing=0.",
            )
        )
    if isinstance(task, ClassifyConfig):
        rules += _classify_rules(task)
    return rules


def _classify_rules(task: ClassifyConfig) -> list[Rule]:
    regression, weights = task.problem == "regression", task.class_weights
    numbers: list[float] = []
    if isinstance(weights, list) and all(isinstance(w, (int, float)) for w in weights):
        numbers = weights
    return [
        *(
            (
                regression and getattr(task, key),
                f"task.{key} has no meaning for a regression",
                "",
                f"Try task.{key}=null.",
            )
            for key in ("labels", "class_weights")
        ),
        (
            task.label_separator is not None and task.problem != "multi_label",
            f"task.label_separator has no meaning for task.problem={task.problem}",
            "",
            "Try task.problem=multi_label, or task.label_separator=null.",
        ),
        (
            task.label_separator == "",
            "task.label_separator is empty",
            "",
            "Try task.label_separator=comma.",
        ),
        (
            weights == "balanced" and task.problem == "multi_label",
            "task.class_weights=balanced is for texts with one label each",
            "",
            "Try task.class_weights=[1,3], one weight per label.",
        ),
        (
            weights and weights != "balanced" and not numbers,
            f"task.class_weights = {weights} is neither balanced nor a list of numbers",
            "",
            "Try task.class_weights=balanced or task.class_weights=[1,3].",
        ),
        (
            numbers and (min(numbers) < 0 or not any(numbers)),
            f"task.class_weights = {weights} must not be negative, nor all zero",
            "",
            f"Try task.class_weights={[1.0] * len(numbers)}.",
        ),
    ]
