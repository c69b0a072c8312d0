"""`launch/evaluate.py`: metrics of a run or an export on any data, over any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune import dist, metrics_log
from finetune.app import Composed
from finetune.assets_path import resolve
from finetune.config import DataConfig
from finetune.data.columns import open_store
from finetune.data.store import build_store
from finetune.data.tokenizer import load_tokenizer
from finetune.display import silence_libraries, summary_table
from finetune.dist import World
from finetune.errors import EXIT_DONE, UserError
from finetune.evaluate import evaluate_with
from finetune.programs import EvaluateConfig
from finetune.saved import Trained, checkpoint_of, load_config, load_export, load_run, read_about, typed_task
from finetune.tasks import build_task, head_of


def run(composed: Composed) -> int:
    """Evaluate, print a table, write eval.json (and predictions.jsonl where the task makes some)."""
    cfg: EvaluateConfig = composed.config
    if bool(cfg.run) == bool(cfg.export_dir):
        raise UserError("give either run=RUN_DIR or model=EXPORT_DIR", remedy="python launch/evaluate.py run=runs/quickstart/...")
    world = dist.connect()
    silence_libraries(cfg.verbose, world.rank)
    typed_keys = {word.split("=")[0].lstrip("+") for word in composed.overrides}
    folder, trained, settings, data = _subject(cfg, typed_keys, world)
    task = build_task(settings, load_tokenizer(_tokenizer(folder)), cfg.packing)
    task.prepare(None, trained.task)
    if not data.eval:
        raise UserError("no evaluation data is given", "data.eval", "Pass data.eval=FILE.")
    spec = data.eval
    path = world.on_main(lambda: build_store(
        resolve(spec), data.eval_split, task.encoder(), on_bad_row=data.on_bad_row.value, max_bad_rows=data.max_bad_rows,
        cache_dir=Path(data.cache_dir).expanduser() if data.cache_dir else None).path)
    metrics, predictions = evaluate_with(trained.module, task, open_store(path), world, cfg.batch)
    if world.main:
        _report(metrics, predictions, Path(cfg.out).expanduser() if cfg.out else folder, spec)
    dist.disconnect()
    return EXIT_DONE


def _subject(cfg: EvaluateConfig, typed_keys: set[str], world: World) -> tuple[Path, Trained, Any, DataConfig]:
    """What is evaluated: its folder, the model, the task's settings and the data."""
    if cfg.run:
        folder, checkpoint = checkpoint_of(Path(cfg.run).expanduser().absolute())
        config = load_config(folder)
        settings, data = config.task, config.data
        about = _about_of_run(folder)
        if cfg.dtype:
            config.model.dtype = cfg.dtype
        module = load_run(config, checkpoint, head_of(settings), about.get("num_labels"), world.device)
        trained = Trained(module, head_of(settings), config.model.dtype.value, config.model.path, about, {})
        _override(data, cfg.data, typed_keys)
        return folder, trained, _override_task(settings, cfg.task, typed_keys), data
    assert cfg.export_dir
    folder = Path(resolve(cfg.export_dir)).expanduser().absolute()
    about = read_about(folder) if folder.is_dir() else {}
    settings = cfg.task if "task" in typed_keys or not about.get("settings") else typed_task(about["settings"])
    if about and head_of(settings) != about["head"]:
        raise UserError(f"this export has the head '{about['head']}', the task needs '{head_of(settings)}'", "task",
                        "Leave task out: an export knows its own.")
    trained = load_export(folder, cfg.dtype, world.device)
    return folder, trained, _override_task(settings, cfg.task, typed_keys), cfg.data


def _about_of_run(folder: Path) -> dict[str, Any]:
    """What the head learned from the training data (label names), as the run wrote it down."""
    file = folder / "task.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


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


def _tokenizer(folder: Path) -> str | None:
    for candidate in (folder, folder / "export"):
        if (candidate / "tokenizer.json").is_file():
            return str(candidate)
    return None


def _report(metrics: dict[str, Any], predictions: list[dict] | None, folder: Path, spec: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metrics_log.write_json(folder / "eval.json", {"data": spec, **metrics})
    if predictions is not None:
        with (folder / "predictions.jsonl").open("w", encoding="utf-8") as f:
            f.writelines(metrics_log.dumps(row) + "\n" for row in predictions)
    rows = [(key, _figure(value)) for key, value in metrics.items() if not isinstance(value, (dict, list))]
    for group in ("subsets", "per_class"):
        rows += [(f"  {name}", ", ".join(f"{k} {_figure(v)}" for k, v in values.items()))
                 for name, values in (metrics.get(group) or {}).items()]
    summary_table(f"evaluation of {spec}", rows)
    print(f"written to {folder / 'eval.json'}")


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
