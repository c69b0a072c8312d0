"""`launch/export.py`: an export from a checkpoint of any stage and world size, in one process without a GPU.

The base streams from its files, the trained weights from the checkpoint's fp32 masters; a merge is done in fp32 and
rounded once. Nothing holds the whole model, except the verification.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from finetune import adapter as adapters
from finetune.app import Composed
from finetune.assets_path import resolve
from finetune.checkpoint import read_state, saved_masters
from finetune.config import Config, Dtype, FullConfig, Init
from finetune.data.columns import Store, open_store
from finetune.data.store import build_store
from finetune.data.tokenizer import load_tokenizer
from finetune.display import silence_libraries, summary_table
from finetune.errors import EXIT_DONE, UserError
from finetune.export import (
    ExportInfo,
    finish_export,
    fresh_stage,
    reference_outputs,
    reference_texts,
    refuse_overwrite,
    write_adapter,
    write_model,
    write_random_base,
)
from finetune.gptj.load import DTYPES, Weights, draw, local_folder, meta_model, read_config
from finetune.merge import merged_tensor
from finetune.plain import plain_config
from finetune.programs import ExportAppConfig
from finetune.saved import checkpoint_of, load_config, load_run
from finetune.tasks import build_task, head_of

KINDS = ("adapter", "merged", "full")


def run(composed: Composed) -> int:
    """Write and verify one export; prints its figures."""
    app: ExportAppConfig = composed.config
    silence_libraries(app.verbose, 0)
    if not app.run or not app.kind:
        raise UserError("run=RUN_DIR and kind=adapter|merged|full are both needed",
                        remedy="python launch/export.py run=runs/quickstart/... kind=merged")
    folder, checkpoint = checkpoint_of(Path(app.run).expanduser().absolute())
    cfg = load_config(folder)
    _check_kind(app.kind, cfg)
    target = Path(app.out).expanduser().absolute() if app.out else folder / f"export-{app.kind}"
    refuse_overwrite(target)
    if cfg.model.init is Init.random and not (folder / "base").exists() and app.kind == "adapter":
        write_random_base(cfg.model, head_of(cfg.task), cfg.seed, folder / "base", _num_labels(folder))
    stage = fresh_stage(target)
    info = _info(cfg, app, folder, checkpoint)
    if app.kind == "adapter":
        _write_adapter(cfg, info, checkpoint, stage, _num_labels(folder))
    else:
        config = read_config(local_folder(cfg.model), cfg.model, _num_labels(folder))
        write_model(_tensors(cfg, info, config, checkpoint, app.dtype), config, info, stage, app.max_shard_gib)
    reference = _reference(cfg, app, checkpoint, folder) if app.verify else None
    figures = finish_export(stage, target, load_tokenizer(_tokenizer(cfg)), info, app.kind, reference)
    summary_table(f"export {app.kind}", [("folder", str(target)), *((k, str(v)) for k, v in figures.items())])
    return EXIT_DONE


def _check_kind(kind: str, cfg: Config) -> None:
    full = isinstance(cfg.adapter, FullConfig)
    if kind not in KINDS:
        raise UserError(f"kind = {kind} is unknown", "kind", f"Choose from {', '.join(KINDS)}.")
    if full and kind != "full":
        raise UserError(f"this run trained every weight: there is no adapter to export as {kind}", "kind", "Use kind=full.")
    if not full and kind == "full":
        raise UserError("this run trained an adapter", "kind", "Use kind=merged for a whole model, or kind=adapter.")


def _num_labels(folder: Path) -> int | None:
    file = folder / "task.json"
    return json.loads(file.read_text(encoding="utf-8")).get("num_labels") if file.is_file() else None


def _tokenizer(cfg: Config) -> str | None:
    path = Path(resolve(cfg.model.tokenizer or cfg.model.path)).expanduser()
    return str(path) if path.is_dir() else cfg.model.tokenizer


def _base_name(cfg: Config, folder: Path) -> str:
    if cfg.model.init is Init.random:
        return str(folder / "base")
    path = Path(resolve(cfg.model.path)).expanduser()
    return str(path.absolute()) if path.is_dir() else cfg.model.path


def _info(cfg: Config, app: ExportAppConfig, folder: Path, checkpoint: Path) -> ExportInfo:
    about = folder / "task.json"
    task = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    state = read_state(checkpoint)["state"]
    card = {"recipe": cfg.name, "data": cfg.data.train, "steps": state["step"], "tokens": state["tokens"]}
    dtype = (app.dtype or cfg.model.dtype).value
    return ExportInfo(cfg.name, head_of(cfg.task), _base_name(cfg, folder), dtype, task, plain_config(cfg)["task"], card)


def _write_adapter(cfg: Config, info: ExportInfo, checkpoint: Path, stage: Path, num_labels: int | None) -> None:
    masters = saved_masters(checkpoint)
    config = read_config(local_folder(cfg.model), cfg.model, num_labels)
    shell = adapters.attach(meta_model(config, info.head), cfg.adapter, info.head, info.base, cfg.seed)
    trained = {name: masters.read(name, "master", 0, p.numel()).view(p.shape).to(DTYPES[info.dtype])
               for name, p in shell.named_parameters() if p.requires_grad}
    write_adapter(shell, trained, stage)


def _tensors(cfg: Config, info: ExportInfo, config, checkpoint: Path, dtype: Dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the exported model, one at a time."""
    masters = saved_masters(checkpoint)
    names = set(masters.names())
    source = Weights(local_folder(cfg.model)) if cfg.model.init is Init.pretrained else None
    for name, parameter in meta_model(config, info.head).named_parameters():
        shape = tuple(parameter.shape)
        if name in names:
            value = masters.read(name, "master", 0, parameter.numel()).view(shape)
        else:
            base = source[name] if source is not None and name in source.files else draw(name, shape, config, cfg.seed)
            # What computed during training was the base in the run's precision: merge with exactly that.
            value = merged_tensor(name, base.to(DTYPES[cfg.model.dtype.value]).float(), cfg.adapter, masters, names)
        yield name, value.to(DTYPES[info.dtype])


def _reference(cfg: Config, app: ExportAppConfig, checkpoint: Path, folder: Path) -> dict[str, Tensor]:
    """Outputs of the model as it was trained, in the export's precision."""
    if app.dtype:
        cfg.model.dtype = app.dtype
    device = torch.device("cpu")
    module = load_run(cfg, checkpoint, head_of(cfg.task), _num_labels(folder), device)
    return reference_outputs(module, reference_texts(_store(cfg)), device)


def _store(cfg: Config) -> Store:
    task = build_task(cfg.task, load_tokenizer(_tokenizer(cfg)), cfg.train.packing)
    assert cfg.data.train
    store = build_store(resolve(cfg.data.train), cfg.data.split, task.encoder(), on_bad_row=cfg.data.on_bad_row.value,
                        max_bad_rows=cfg.data.max_bad_rows,
                        cache_dir=Path(cfg.data.cache_dir).expanduser() if cfg.data.cache_dir else None)
    return open_store(store.path)
