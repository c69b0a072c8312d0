"""`launch/evaluate.py`: metrics of a run or an export on any data, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import dist, process
from finetune.assets.paths import resolve
from finetune.check import room_problems
from finetune.cli.schemas import EvaluateConfig
from finetune.compose import Composed, recipe_config
from finetune.config import DataConfig
from finetune.data.cache import build_store
from finetune.data.columns import open_store
from finetune.data.sources import data_notes, file_options
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
from finetune.files import dumps, read_json, write_json
from finetune.gptj.load import local_folder, tokenizer_of
from finetune.inference.lm_eval import check_suite, run_suite
from finetune.planning.shape import load_shape
from finetune.reporting.page.build import build_report
from finetune.reporting.redact import redact_text
from finetune.reporting.terminal import silence_libraries, summary_table
from finetune.tasks.build import build_task
from finetune.training.evaluate import evaluate_with

TOO_LARGE = (
    "Leave such rows out, or give the model the rows: model.resize_token_embeddings(len(tokenizer)) in transformers, "
    "and train them."
)


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
        raise UserError(f"batch = {cfg.batch} evaluates nothing", "batch", "Try batch=8.")
    world = dist.connect()
    try:
        return _run(cfg, typed_keys, world)
    finally:
        dist.disconnect()


def _run(cfg: EvaluateConfig, typed_keys: set[str], world: World) -> int:
    silence_libraries(cfg.verbose, world.rank)
    subject = _subject(cfg, typed_keys, world)
    folder, settings, data = subject.folder, subject.settings, subject.data
    if cfg.suite == "lm_eval":
        _lm_eval(cfg, folder, subject.load(), world)
        return EXIT_DONE

    # Report every problem of the arguments and the data before the weights are loaded.
    shape = load_shape(str(subject.model))
    for problem in room_problems(settings.max_length, subject.virtual_tokens, shape.n_positions):
        raise problem
    tokenizer = load_tokenizer(_tokenizer(cfg, folder))
    task = build_task(settings, tokenizer, cfg.packing)
    task.prepare(None, subject.about)
    if not data.eval:
        raise UserError("no evaluation data is given", "data.eval", "Pass data.eval=FILE.")
    spec = data.eval
    limit = token_limit(tokenizer, shape.vocab_size, TOO_LARGE)
    path = world.on_main(
        lambda: (
            build_store(
                resolve(spec),
                data.eval_split,
                task.encoder(),
                on_bad_row=data.on_bad_row.value,
                max_bad_rows=data.max_bad_rows,
                config=data.config,
                options=file_options(data),
                limit=limit,
                cache_dir=Path(data.cache_dir).expanduser() if data.cache_dir else None,
            ).path
        )
    )
    store = open_store(path)

    trained = subject.load()
    if world.device.type == "cpu":
        process.keep_freed_memory()
    metrics, predictions = evaluate_with(trained.module, task, store, world, cfg.batch)
    if store.stats["bad_rows"]:
        metrics |= {
            "bad_rows": store.stats["bad_rows"],
            "bad_row_messages": store.stats["bad_row_messages"],
        }
    if notes := world.on_main(lambda: data_notes(data)["eval"]):
        metrics |= {"data_notes": notes}
    if world.main:
        for note in notes:
            print(f"eval data: {note}")
        _report(metrics, predictions, Path(cfg.out).expanduser() if cfg.out else folder, spec)
    return EXIT_DONE


def _lm_eval(cfg: EvaluateConfig, folder: Path, trained: Trained, world: World) -> None:
    """Write lm-eval's metrics to eval.json, beside those of the model's own task."""
    if trained.head != "lm":
        raise UserError(
            f"lm-eval asks language models; this one has the head '{trained.head}'",
            "suite",
            "Leave suite out: the model's own task has metrics.",
        )
    if world.size > 1:
        raise UserError("suite=lm_eval runs in one process", "suite", "Start it with plain python.")
    found = run_suite(
        trained.module,
        load_tokenizer(_tokenizer(cfg, folder)),
        list(cfg.tasks),
        cfg.task_dir,
        fewshot=cfg.fewshot,
        limit=cfg.limit,
        batch=cfg.batch,
        seed=cfg.seed,
        chat=cfg.chat,
    )
    target = Path(cfg.out).expanduser() if cfg.out else folder
    target.mkdir(parents=True, exist_ok=True)
    before = _before(target)
    kept = before.get("lm_eval") or {}
    merged = {part: (kept.get(part) or {}) | found[part] for part in ("tasks", "settings")}
    write_json(target / "eval.json", {**before, "lm_eval": merged})
    summary_table(
        "lm-eval",
        [
            (task, ", ".join(f"{k} {figure(v)}" for k, v in row.items()))
            for task, row in found["tasks"].items()
        ],
    )
    _tell(target)


def _before(folder: Path) -> dict[str, Any]:
    """Return the present contents of eval.json."""
    try:
        return read_json(folder / "eval.json")
    except (OSError, ValueError):
        return {}


@dataclass
class Subject:
    """The model to evaluate and its task, before its weights are loaded."""

    folder: Path
    about: dict[str, Any]
    """As `Task.describe`."""
    settings: Any
    """The task's section."""
    data: DataConfig
    model: Path
    """Folder with the config.json of the model, of an adapter that of its base."""
    virtual_tokens: int
    """Positions that a prompt or prefix adapter takes."""
    load: Callable[[], Trained]


def _subject(cfg: EvaluateConfig, typed_keys: set[str], world: World) -> Subject:
    """Build the subject from the run or export that was named and the other words typed."""
    if cfg.run:
        folder, checkpoint = checkpoint_of(Path(cfg.run).expanduser().absolute())
        config = load_config(folder)
        check_base(config, checkpoint)  # fail before tokenising data for a wrong base model
        settings, data = config.task, config.data
        about, head = about_of_run(folder), settings.head
        if cfg.base:
            raise UserError("a run knows its base model", "base", "Leave base out.")
        if cfg.dtype:
            config.model.dtype = cfg.dtype
        if "data" in typed_keys:
            data = cfg.data
        else:
            _override(data, cfg.data, typed_keys)

        def load() -> Trained:
            module = load_run(config, checkpoint, head, about.get("num_labels"), world.device)
            if not cfg.dtype:
                module = readable(module, config.model.dtype, world.device)
            return Trained(module, head, config.model.dtype.value, config.model.path, about, {})

        return Subject(
            folder,
            about,
            _override_task(settings, cfg.task, typed_keys),
            data,
            local_folder(config.model),
            getattr(config.adapter, "virtual_tokens", 0),
            load,
        )
    assert cfg.export_dir
    folder = Path(resolve(cfg.export_dir)).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}", "model", "Pass model=RUN_DIR/export.")
    about = read_about(folder, cfg.base)
    settings = typed_task(about["settings"])
    if type(settings) is not type(
        cfg.task
    ):  # another task was typed: keep what it shares with the trained one
        settings = replace(cfg.task, max_length=settings.max_length)
    if settings.head != about["head"]:
        raise UserError(
            f"this export has the head '{about['head']}', the task needs '{settings.head}'",
            "task",
            "Leave task out: an export knows its own.",
        )
    if note := foreign_note(about):
        print(note)
    model, virtual_tokens = model_folder(folder, about), virtual_tokens_of(folder)
    return Subject(
        folder,
        about["task"],
        _override_task(settings, cfg.task, typed_keys),
        cfg.data,
        model,
        virtual_tokens,
        lambda: load_export(folder, cfg.dtype, world.device, cfg.base),
    )


def _override(data: DataConfig, given: DataConfig, typed_keys: set[str]) -> None:
    for key in typed_keys:
        if key.startswith("data."):
            setattr(data, key.removeprefix("data."), getattr(given, key.removeprefix("data.")))


def _override_task(settings: Any, given: Any, typed_keys: set[str]) -> Any:
    for key in typed_keys:
        name = key.removeprefix("task.")
        if key.startswith("task.") and hasattr(settings, name):
            setattr(settings, name, getattr(given, name))
    return settings


def _tokenizer(cfg: EvaluateConfig, folder: Path) -> str | None:
    """Return the tokenizer to load: that of the export, also for a run that has one.

    An export's tokenizer has the chat template. Before a run has an export, return the tokenizer
    that it trains with.
    """
    if not cfg.run:
        return str(folder)
    export = folder / "export"
    return (
        str(export)
        if (export / "tokenizer.json").is_file()
        else tokenizer_of(load_config(folder).model)
    )


def _report(
    metrics: dict[str, Any], predictions: list[dict] | None, folder: Path, spec: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec = redact_text(spec, "data.eval")
    kept = {"lm_eval": before["lm_eval"]} if "lm_eval" in (before := _before(folder)) else {}
    write_json(folder / "eval.json", {"data": spec, **metrics, **kept})
    if predictions is not None:
        with (folder / "predictions.jsonl").open("w", encoding="utf-8") as f:
            f.writelines(dumps(row) + "\n" for row in predictions)
    rows = [
        (key, figure(value))
        for key, value in metrics.items()
        if not isinstance(value, (dict, list))
    ]
    for group in ("subsets", "per_class"):
        rows += [
            (f"  {name}", ", ".join(f"{k} {figure(v)}" for k, v in values.items()))
            for name, values in (metrics.get(group) or {}).items()
        ]
    summary_table(f"evaluation of {spec}", rows)
    _tell(folder)


def _tell(folder: Path) -> None:
    """Print where the metrics are, and update a run's report page."""
    print(f"written to {folder / 'eval.json'}")
    if (folder / "metrics.jsonl").is_file():
        build_report(folder, picture=False, recipe_of=recipe_config)
