"""`launch/evaluate.py`: metrics of a run or an export on any data, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune import dist, process
from finetune.assets.paths import resolve
from finetune.check import room_problems, value_problems
from finetune.cli.schemas import EvaluateConfig
from finetune.compose import Composed, recipe_config
from finetune.config import DataConfig, Dtype, ModelConfig, TaskConfig
from finetune.data.mixture import evaluation_text, source_problems
from finetune.data.sources import data_notes
from finetune.data.tokenizer import load_tokenizer, token_limit
from finetune.dist import World
from finetune.errors import EXIT_DONE, UserError, figure
from finetune.export.reopen import (
    Trained,
    about_of_run,
    check_base,
    checkpoint_of,
    foreign_note,
    load_config,
    load_export,
    load_run,
    model_folder,
    read_about,
    readable,
    typed_task,
    virtual_tokens_of,
)
from finetune.files import dumps, read_object, write_atomic, write_json
from finetune.gptj.load import local_folder, tokenizer_of
from finetune.inference.lm_eval import ask, check_suite, judged, load_tasks
from finetune.planning.shape import load_shape
from finetune.reporting.page.build import build_report
from finetune.reporting.redact import redact_text
from finetune.reporting.terminal import summary_table
from finetune.tasks.build import build_task
from finetune.tasks.preference import PreferenceTask
from finetune.training.evaluate import EvalSet, combined, evaluate_set
from finetune.training.inputs import encode_sources, evaluation_sets
from finetune.training.references import reference_logps, reference_name

TOO_LARGE = (
    "Leave such rows out, or give the model the rows: "
    "model.resize_token_embeddings(len(tokenizer)) in transformers, "
    "and train them."
)


@dataclass
class Subject:
    """The model to evaluate and its task, before its weights are loaded."""

    folder: Path
    about: dict[str, Any]
    """As `Task.describe`."""
    settings: TaskConfig
    data: DataConfig
    model: Path
    """Folder with the config.json of the model, of an adapter that of its base."""
    tokenizer: str
    virtual_tokens: int
    """Positions that a prompt or prefix adapter takes."""
    dtype: Dtype
    base: str | None
    """Model that it was tuned from, where the subject is a whole model; an adapter can be switched off."""
    load: Callable[[], Trained]


def run(composed: Composed) -> int:
    """Evaluate, print a table, write eval.json (and predictions.jsonl if the task makes some)."""
    cfg: EvaluateConfig = composed.config
    if bool(cfg.run) == bool(cfg.export_dir):
        raise UserError(
            "give either run=RUN_DIR or model=EXPORT_DIR",
            remedy="python launch/evaluate.py run=runs/quickstart/...",
        )
    typed_keys = {word.split("=")[0].lstrip("+") for word in composed.overrides}
    if cfg.suite not in ("task", "lm_eval"):
        raise UserError(f"suite = {cfg.suite} is unknown", "suite", "Choose from task, lm_eval.")
    if cfg.suite == "lm_eval":
        check_suite(cfg.tasks, cfg.task_dir)
    if cfg.run and "task" in typed_keys:
        raise UserError(
            "a run knows its own task",
            "task",
            "Leave task out, or change its keys: task.text_field=...",
        )
    if "task.problem" in typed_keys:
        raise UserError(
            "what a head was trained for cannot change", "task.problem", "Leave it out."
        )
    if cfg.batch < 1:
        raise UserError(f"batch = {cfg.batch} must be at least 1", "batch", "Try batch=8.")
    world = dist.connect()
    try:
        build = subject_of_run if cfg.run else subject_of_export
        subject = build(cfg, typed_keys, world)
        target = Path(cfg.out).expanduser() if cfg.out else subject.folder
        evaluate = evaluate_suite if cfg.suite == "lm_eval" else evaluate_task
        evaluate(cfg, subject, target, world)
    finally:
        dist.disconnect()
    return EXIT_DONE


def subject_of_run(cfg: EvaluateConfig, typed_keys: set[str], world: World) -> Subject:
    """Build the subject from a run, with its own task and data where none were typed."""
    folder, checkpoint = checkpoint_of(Path(str(cfg.run)).expanduser().absolute())
    config = load_config(folder)
    check_base(config, checkpoint)  # fail before tokenising data for a wrong base model
    if cfg.base:
        raise UserError("a run knows its base model", "base", "Leave base out.")
    if cfg.dtype:
        config.model.dtype = cfg.dtype
    about, head = about_of_run(folder), config.task.head

    def load() -> Trained:
        labels, tokens = about.get("num_labels"), about.get("tokens", {}).values()
        module = load_run(config, checkpoint, head, labels, world.device, tokens=tokens)
        if not cfg.dtype:
            module = readable(module, config.model.dtype, world.device)
        return Trained(module, head, config.model.dtype.value, config.model.path, about, {})

    # The export's tokenizer has the chat template; before there is one, that of the training.
    export = folder / "export"
    exported = (export / "tokenizer.json").is_file()
    return Subject(
        folder,
        about,
        retyped(config.task, cfg.task, "task", typed_keys),
        cfg.data if "data" in typed_keys else retyped(config.data, cfg.data, "data", typed_keys),
        local_folder(config.model),
        str(export) if exported else tokenizer_of(config.model),
        getattr(config.adapter, "virtual_tokens", 0),
        config.model.dtype,
        None,
        load,
    )


def subject_of_export(cfg: EvaluateConfig, typed_keys: set[str], world: World) -> Subject:
    """Build the subject from an export or another GPT-J, with its own task unless one was typed."""
    folder = Path(resolve(str(cfg.export_dir))).expanduser().absolute()
    about = read_about(folder, cfg.base)
    settings = typed_task(about["settings"])
    if type(settings) is not type(cfg.task):
        # Another task was typed: keep what it shares with the trained one.
        settings = replace(cfg.task, max_length=settings.max_length)
    if settings.head != about["head"]:
        raise UserError(
            f"this export has the head '{about['head']}', the task needs '{settings.head}'",
            "task",
            "Leave task out: an export knows its own.",
        )
    if note := foreign_note(about):
        print(note)
    return Subject(
        folder,
        about["task"],
        retyped(settings, cfg.task, "task", typed_keys),
        cfg.data,
        model_folder(folder, about),
        str(folder),
        virtual_tokens_of(folder),
        cfg.dtype or Dtype(about["dtype"]),
        None if (folder / "adapter_config.json").is_file() else about.get("base"),
        lambda: load_export(folder, cfg.dtype, world.device, cfg.base),
    )


def retyped(section: Any, typed: Any, group: str, typed_keys: Iterable[str]) -> Any:
    """Return a section of a trained model's settings, with the keys that were typed replaced."""
    names = {key.removeprefix(f"{group}.") for key in typed_keys if key.startswith(f"{group}.")}
    # Evaluation data that were typed replace rows that the run held out, and the other way round.
    kept = {"eval": "eval_rows", "eval_rows": "eval"} if group == "data" else {}
    cleared = {other: None for name, other in kept.items() if name in names and other not in names}
    given = {n: getattr(typed, n) for n in names if hasattr(section, n)}
    return replace(section, **cleared, **given)


def evaluate_task(cfg: EvaluateConfig, subject: Subject, target: Path, world: World) -> None:
    """Evaluate with the metrics of the model's own task."""
    # Report every problem of the arguments and the data before the weights are loaded.
    settings, data = subject.settings, subject.data
    shape = load_shape(str(subject.model))
    for problem in room_problems(settings.max_length, subject.virtual_tokens, shape.n_positions):
        raise problem
    tokenizer = load_tokenizer(subject.tokenizer, settings)
    task = build_task(settings, tokenizer, cfg.packing)
    task.prepare(None, subject.about)
    if not data.evaluates:
        raise UserError("no evaluation data is given", "data.eval", "Pass data.eval=FILE.")
    for problem in (*value_problems(data, "data."), *source_problems(data)):
        raise problem
    limit = token_limit(tokenizer, shape.vocab_size, TOO_LARGE)
    encoded = partial(encode_sources, data=data, task=task, limit=limit, world=world)
    sets = evaluation_sets(data, task, None, encoded)

    reference = task.reference or subject.base
    if task.needs_reference and reference:
        folder = local_folder(ModelConfig(path=reference))
        add_reference(folder, cfg, subject, task, sets.values(), world)
    trained = subject.load()
    if world.device.type == "cpu":
        process.keep_freed_memory()
    results = {
        name: evaluate_set(trained.module, task, part, world, cfg.batch)
        for name, part in sets.items()
    }
    metrics = combined({name: values for name, (values, _) in results.items()})
    stats = [part.store.stats for part in sets.values()]
    if bad_rows := sum(part["bad_rows"] for part in stats):
        metrics["bad_rows"] = bad_rows
        metrics["bad_row_messages"] = [m for part in stats for m in part["bad_row_messages"]]
    notes = world.on_main(lambda: data_notes(data)["eval"])
    if notes:
        metrics["data_notes"] = notes
    if not world.main:
        return

    for note in notes:
        print(f"eval data: {note}")
    shown = redact_text(evaluation_text(data) or "", "data.eval")
    suite = {k: v for k, v in read_object(target / "eval.json").items() if k == "lm_eval"}
    write_json(target / "eval.json", {"data": shown, **metrics, **suite})
    if all(predictions is not None for _, predictions in results.values()):
        rows = [
            dumps(({"set": name} if name else {}) | row) + "\n"
            for name, (_, predictions) in results.items()
            for row in predictions or ()
        ]
        write_atomic(target / "predictions.jsonl", "".join(rows))
    # The figures of each set stand in a row of their own.
    plain = {k: v for k, v in metrics.items() if not isinstance(v, (dict, list)) and "/" not in k}
    groups = [metrics.get(group) or {} for group in ("sets", "subsets", "per_class")]
    print_metrics(
        f"evaluation of {shown}",
        [(name, figure(value)) for name, value in plain.items()]
        + [(f"  {name}", figures(row)) for group in groups for name, row in group.items()],
        target,
    )


def add_reference(
    folder: Path,
    cfg: EvaluateConfig,
    subject: Subject,
    task: PreferenceTask,
    sets: Iterable[EvalSet],
    world: World,
) -> None:
    """Compute the log-probabilities of the reference model in `folder`. Collective."""
    reference = load_export(folder, subject.dtype, world.device)
    if not cfg.dtype:
        reference.module = readable(reference.module, subject.dtype, world.device)
    name = world.on_main(lambda: reference_name(folder, reference.dtype))
    for part in sets:
        task.references[part.store.fingerprint] = reference_logps(
            reference.module, task, part.store, world, cfg.batch, name
        )


def evaluate_suite(cfg: EvaluateConfig, subject: Subject, target: Path, world: World) -> None:
    """Evaluate with lm-eval; its metrics stand in eval.json beside those of the model's own task."""
    if world.size > 1:
        raise UserError("suite=lm_eval runs in one process", "suite", "Start it with plain python.")
    tasks = load_tasks(list(cfg.tasks), cfg.task_dir, cfg.fewshot, seed=cfg.seed)
    tokenizer = load_tokenizer(subject.tokenizer, subject.settings)
    if cfg.chat and not tokenizer.chat_template:
        raise UserError(
            "this model's tokenizer has no chat template",
            "chat",
            "Exports of task=instruct have one.",
        )
    trained = subject.load()
    if trained.head != "lm":
        raise UserError(
            f"lm-eval asks language models; this one has the head '{trained.head}'",
            "suite",
            "Leave suite out: the model's own task has metrics.",
        )
    results = ask(
        judged(trained.module, tokenizer, cfg.batch),
        tasks,
        limit=cfg.limit,
        seed=cfg.seed,
        chat=cfg.chat,
        resamples=1000,
    )
    how = {
        "version": version("lm_eval"),
        "fewshot": cfg.fewshot,
        "limit": cfg.limit,
        "chat": cfg.chat,
    }
    settings = {task: how | {"samples": results["samples"].get(task)} for task in results["tasks"]}
    # The results of earlier calls, on other tasks, are kept.
    before = read_object(target / "eval.json")
    suite = before.get("lm_eval") or {}
    merged = {
        "tasks": (suite.get("tasks") or {}) | results["tasks"],
        "settings": (suite.get("settings") or {}) | settings,
    }
    write_json(target / "eval.json", {**before, "lm_eval": merged})
    rows = [(task, figures(metrics)) for task, metrics in results["tasks"].items()]
    print_metrics("lm-eval", rows, target)


def figures(metrics: dict[str, Any]) -> str:
    plain = {name: value for name, value in metrics.items() if not isinstance(value, (dict, list))}
    return ", ".join(f"{name} {figure(value)}" for name, value in plain.items())


def print_metrics(title: str, rows: list[tuple[str, str]], target: Path) -> None:
    """Print a table and where its figures are, and update a run's report page."""
    summary_table(title, rows)
    print(f"written to {target / 'eval.json'}")
    if (target / "metrics.jsonl").is_file():
        build_report(target, picture=False, recipe_of=recipe_config)
