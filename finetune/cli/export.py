"""`launch/export.py`: an export from a checkpoint of any stage and world size, without a GPU.

The base streams from its files and the trained weights from the checkpoint's fp32 masters, tensor
by tensor, into the export's files; a merge is done in fp32 and rounded once. This process holds one
tensor at a time, never the model. Verification by outputs takes place in two further processes, one
after the other, each of which holds the model once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.checkpointing.format import StateReader, read_state
from finetune.cli.schemas import ExportAppConfig
from finetune.compose import Composed
from finetune.config import Config, FullConfig, Init, LoraConfig, plain_config
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import EXIT_DONE, RunFailed, UserError
from finetune.export import engines, phi
from finetune.export.end_of_run import base_name
from finetune.export.gguf_file import PRECISIONS, check_dtype
from finetune.export.hub import check_hub, push
from finetune.export.merge import check_mergeable, merged_tensor
from finetune.export.reopen import (
    about_of_run,
    check_base,
    checkpoint_of,
    load_config,
    reference_texts_of,
)
from finetune.export.verify_tensors import verify_adapter, verify_model
from finetune.export.write import (
    ExportInfo,
    about_export,
    check_adapter,
    finish_export,
    fresh_process,
    fresh_stage,
    real_conversations,
    refuse_overwrite,
    replace_export,
    write_adapter,
    write_model,
    write_random_base,
)
from finetune.files import write_json
from finetune.gptj import adapters
from finetune.gptj.load import (
    DTYPES,
    Weights,
    draw,
    local_folder,
    meta_model,
    read_config,
    tokenizer_of,
)
from finetune.reporting import metrics_log
from finetune.reporting.terminal import silence_libraries, summary_table

KINDS = ("adapter", "merged", "full", *engines.KINDS)
VERIFY = {
    "true": "outputs",
    "outputs": "outputs",
    "tensors": "tensors",
    "false": "none",
    "none": "none",
}


@dataclass
class Source:
    """The source of an export: a run's config and one of its checkpoints."""

    cfg: Config
    folder: Path
    checkpoint: Path
    info: ExportInfo
    config: Any
    """The trained model's GPTJConfig."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the whole model in fp32 or the run's precision, one at a time."""
        masters = StateReader(self.checkpoint)
        names = set(masters.names())
        pretrained = self.cfg.model.init is Init.pretrained
        source = Weights(local_folder(self.cfg.model)) if pretrained else None
        for name, parameter in meta_model(self.config, self.info.head).named_parameters():
            shape = tuple(parameter.shape)
            if name in names:
                yield name, masters.read(name, "master", 0, parameter.numel()).view(shape)
                continue
            known = source is not None and name in source.files
            base = (
                source[name]
                if source is not None and known
                else draw(name, shape, self.config, self.cfg.seed)
            )
            # Training computed with the base in the run's precision: merge with exactly that.
            base = base.to(DTYPES[self.cfg.model.dtype.value])
            yield name, merged_tensor(name, base, self.cfg.adapter, masters, names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(p.shape)
            for name, p in meta_model(self.config, self.info.head).named_parameters()
        }

    def adapter_shell(self) -> nn.Module:
        """Return the model with its adapter, without memory behind its parameters."""
        model = meta_model(self.config, self.info.head)
        return adapters.attach(
            model, self.cfg.adapter, self.info.head, self.info.base, self.cfg.seed
        )


def run(composed: Composed) -> int:
    """Write and verify one export, and print its statistics."""
    app: ExportAppConfig = composed.config
    silence_libraries(app.verbose, 0)
    verify = _check(app)
    assert app.run and app.kind
    folder, checkpoint = checkpoint_of(Path(app.run).expanduser().absolute())
    cfg = load_config(folder)
    _check_kind(app.kind, cfg)
    check_dtype(app.dtype, app.kind, f"kind={app.kind}")
    target = Path(app.out).expanduser().absolute() if app.out else folder / f"export-{app.kind}"
    refuse_overwrite(target)
    if cfg.model.init is Init.random and not (folder / "base").exists() and app.kind == "adapter":
        labels = about_of_run(folder).get("num_labels")
        write_random_base(cfg.model, cfg.task.head, cfg.seed, folder / "base", labels)
    source = _source(cfg, app, folder, checkpoint)
    stage = fresh_stage(target)
    try:
        figures = _export(source, app, verify, stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    rows = [(key, str(value)) for key, value in figures.items() if key != "files"]
    summary_table(f"export {app.kind}", [("folder", str(target)), *rows])
    if app.push_to_hub:
        print(f"pushed to {push(target, app.push_to_hub, app.hub_private, app.hub_base)}")
    return EXIT_DONE


def _export(
    source: Source, app: ExportAppConfig, verify: str, stage: Path, target: Path
) -> dict[str, Any]:
    info, figures = source.info, None
    if app.kind in engines.KINDS:
        return _export_for_engine(source, app, verify, stage, target)
    if app.kind == "adapter":
        _write_adapter(source, stage)
        if verify == "tensors":
            masters = StateReader(source.checkpoint)
            figures = verify_adapter(stage, source.adapter_shell(), masters, DTYPES[info.dtype])
    else:
        error = write_model(source.tensors(), source.shapes(), info.dtype, stage, app.max_shard_gib)
        if error is not None:
            raise RunFailed(
                f"the export could not be written: {error}",
                str(stage),
                "Free space, or choose out=DIR.",
            )
        if verify == "tensors":
            figures = verify_model(stage, source.cfg, source.config, info, source.checkpoint)
    assert app.kind
    reference = _reference(source, app.kind, stage) if verify == "outputs" else None
    tokenizer = load_tokenizer(tokenizer_of(source.cfg.model))
    return finish_export(
        stage, target, tokenizer, source.config, info, app.kind, reference, figures
    )


def _export_for_engine(
    source: Source, app: ExportAppConfig, verify: str, stage: Path, target: Path
) -> dict[str, Any]:
    """Write and prove an export in Phi's form or as a GGUF file."""
    try:
        return _write_for_engine(source, app, verify, stage, target)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"the export could not be written: {error}", str(target), "Free space, or use out=DIR."
        ) from None


def _write_for_engine(
    source: Source, app: ExportAppConfig, verify: str, stage: Path, target: Path
) -> dict[str, Any]:
    kind, info, config = str(app.kind), source.info, source.config
    tokenizer = load_tokenizer(tokenizer_of(source.cfg.model))
    figures: dict[str, Any] = {}
    dtype, reference_dtype = info.dtype, info.dtype
    if kind == "phi_adapter":
        assert info.base_folder
        base = engines.check_phi_base(app.base, info.base_folder)
        _write_adapter(source, stage)
        figures = check_adapter(stage) | {"phi_base": str(base)}
        engines.write_phi_adapter(stage, config, info, tokenizer, base)
    elif kind == "phi":
        engines.write_phi(
            stage, source.tensors(), source.shapes(), config, info, tokenizer, app.max_shard_gib
        )
    else:
        dtype = "q8_0" if app.dtype == "q8_0" else info.dtype.replace("fp", "f")
        engines.write_gguf(stage, source.tensors(), source.shapes(), config, info, tokenizer, dtype)
        reference_dtype = "fp32"  # llama.cpp multiplies what it reads in fp32
    write_json(stage / "finetune.json", about_export(info, kind, dtype))
    if verify == "outputs":
        reference = _reference(source, kind, stage, reference_dtype)
        figures |= engines.verify_engine(kind, stage, reference, dtype)
    figures = engines.finish_engine_export(kind, stage, info, figures, dtype)
    replace_export(stage, target)
    return figures


def _check(app: ExportAppConfig) -> str:
    """Raise for problems that can be seen without the run, and return the kind of verification."""
    if not app.run or not app.kind:
        raise UserError(
            f"run=RUN_DIR and kind={'|'.join(KINDS)} are both needed",
            remedy="python launch/export.py run=runs/quickstart/... kind=merged",
        )
    if app.max_shard_gib <= 0:
        raise UserError(
            f"max_shard_gib = {app.max_shard_gib} holds nothing", remedy="Try max_shard_gib=5."
        )
    verify = VERIFY.get(str(app.verify).lower())
    if verify is None:
        raise UserError(
            f"verify = {app.verify} is unknown", "verify", "Choose from outputs, tensors, none."
        )
    if app.kind in engines.KINDS and verify == "tensors":
        raise UserError(
            f"kind={app.kind} is proven by outputs",
            "verify",
            "Use verify=outputs, or verify=none.",
        )
    if app.push_to_hub:
        if verify == "none":
            raise UserError(
                "only a verified export is uploaded", "verify", "Leave verify out, or push_to_hub."
            )
        check_hub(app.push_to_hub)
    return verify


def _check_kind(kind: str, cfg: Config) -> None:
    full = isinstance(cfg.adapter, FullConfig)
    if kind not in KINDS:
        raise UserError(f"kind = {kind} is unknown", "kind", f"Choose from {', '.join(KINDS)}.")
    if full and kind in ("adapter", "merged", "phi_adapter"):
        raise UserError(
            f"this run trained every weight: there is no adapter to export as {kind}",
            "kind",
            "Use kind=full.",
        )
    if not full and kind == "full":
        raise UserError(
            "this run trained an adapter",
            "kind",
            "Use kind=merged for a whole model, or kind=adapter.",
        )
    if kind == "phi_adapter" and (not isinstance(cfg.adapter, LoraConfig) or cfg.adapter.dora):
        dora = isinstance(cfg.adapter, LoraConfig)
        raise phi.no_counterpart("dora" if dora else plain_config(cfg)["adapter"]["kind"])
    if not full and kind in ("merged", "phi", "gguf"):
        check_mergeable(cfg.adapter)


def _source(cfg: Config, app: ExportAppConfig, folder: Path, checkpoint: Path) -> Source:
    check_base(cfg, checkpoint)
    about, saved = about_of_run(folder), read_state(checkpoint)
    state, step = saved["state"], saved["state"]["step"]
    _, metrics = metrics_log.newest(folder, step)
    facts = {
        "recipe": cfg.name,
        "training data": cfg.data.train,
        "training data's fingerprint": saved["identity"].get("data"),
        "evaluation data": cfg.data.eval,
        "steps": step,
        "tokens": state["tokens"],
        "seed": cfg.seed,
        "checkpoint": checkpoint.name,
    }
    dtype = PRECISIONS.get(app.dtype or "", cfg.model.dtype.value)
    base = (
        folder / "base"
        if cfg.model.init is Init.random
        else local_folder(cfg.model, download=False)
    )
    info = ExportInfo(
        cfg.name,
        cfg.task.head,
        base_name(cfg.model, folder),
        dtype,
        about,
        plain_config(cfg)["task"],
        facts,
        metrics,
        real_conversations(cfg.task, cfg.data),
        cfg.model.revision,
        plain_config(cfg)["model"],
        base,
    )
    config = read_config(local_folder(cfg.model), cfg.model, about.get("num_labels"))
    if app.kind in engines.KINDS:
        engines.check_engine(app.kind, config, info.head, VERIFY[str(app.verify).lower()])
    return Source(cfg, folder, checkpoint, info, config)


def _write_adapter(source: Source, stage: Path) -> None:
    masters = StateReader(source.checkpoint)
    shell = source.adapter_shell()
    trained = {
        name: masters.read(name, "master", 0, p.numel()).view(p.shape).to(DTYPES[source.info.dtype])
        for name, p in shell.named_parameters()
        if p.requires_grad
    }
    write_adapter(shell, trained, stage)


def _reference(
    source: Source, kind: str, stage: Path, dtype: str | None = None
) -> dict[str, Tensor]:
    """Return outputs of the model as it was trained, in the export's precision or in `dtype`.

    They are computed in a separate process that ends afterwards.
    """
    texts, out = (
        stage.with_name(f"{stage.name}.{end}") for end in ("texts.json", "outputs.safetensors")
    )
    try:
        texts.write_text(json.dumps(reference_texts_of(source.folder)), encoding="utf-8")
        fresh_process(
            "finetune.export.reference_process",
            [str(source.checkpoint), kind, dtype or source.info.dtype, str(texts), str(out)],
            str(source.checkpoint),
        )
        return load_file(out)
    finally:
        texts.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
