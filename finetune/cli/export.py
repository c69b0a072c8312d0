"""`launch/export.py`: an export from a checkpoint of any stage and world size, without a GPU.

The base streams from its files and the trained weights from the checkpoint's fp32 masters, tensor
by tensor, into the export's files; a merge is done in fp32 and rounded once. This process holds one
tensor at a time, never the model. Verification by outputs takes place in two further processes, one
after the other, each of which holds the model once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from finetune.checkpointing.format import read_state
from finetune.cli.schemas import ExportAppConfig
from finetune.compose import Composed
from finetune.config import Init, own_tokens
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import EXIT_DONE, UserError
from finetune.export import gguf_file, phi
from finetune.export.hf_files import tokenizer_for
from finetune.export.hub import check_hub, push
from finetune.export.kinds import KINDS, Kind, check_kind
from finetune.export.merge import RunWeights
from finetune.export.proof import fresh_process
from finetune.export.reopen import about_of_run, check_base, checkpoint_of, load_config
from finetune.export.run_info import RunInfo, describe_run
from finetune.export.verify_tensors import verify_adapter, verify_model
from finetune.export.write import (
    finish_export,
    staged,
    write_adapter,
    write_model,
    write_random_base,
)
from finetune.gptj import adapters
from finetune.gptj.load import DTYPES, local_folder, meta_model, read_config, tokenizer_of
from finetune.reporting import metrics_log
from finetune.reporting.terminal import summary_table

VERIFY = {
    "true": "outputs",
    "outputs": "outputs",
    "tensors": "tensors",
    "false": "none",
    "none": "none",
}


def run(composed: Composed) -> int:
    """Write and verify one export, and print its statistics."""
    app: ExportAppConfig = composed.config
    verify = check_words(app)
    assert app.run and app.kind
    run_dir, checkpoint = checkpoint_of(Path(app.run).expanduser().absolute())
    cfg = load_config(run_dir)
    kind = check_kind(app.kind, cfg.adapter, own_tokens(cfg.task))
    if kind.form != "gptj" and verify == "tensors":
        raise UserError(
            f"kind={app.kind} is proven by outputs",
            "verify",
            "Use verify=outputs, or verify=none.",
        )
    gguf_file.check_dtype(app.dtype, app.kind, f"kind={app.kind}")
    target = Path(app.out).expanduser().absolute() if app.out else run_dir / f"export-{app.kind}"
    refuse_overwrite(target)

    # The run, its base and its step.
    about = about_of_run(run_dir)
    if cfg.model.init is Init.random and not (run_dir / "base").exists() and not kind.whole:
        labels = about.get("num_labels")
        write_random_base(cfg.model, cfg.task.head, cfg.seed, run_dir / "base", labels)
    check_base(cfg, checkpoint)
    config = read_config(local_folder(cfg.model), cfg.model, about.get("num_labels"))
    if kind.form == "phi":
        phi.check_form(config, cfg.task.head)
    elif kind.form == "gguf":
        gguf_file.check_form(config, cfg.task.head, proven=verify == "outputs")
    saved = read_state(checkpoint)
    state = saved["state"]
    facts = {
        "training data's fingerprint": saved["identity"].get("data"),
        "steps": state["step"],
        "tokens": state["tokens"],
        "checkpoint": checkpoint.name,
    }
    _, metrics = metrics_log.newest(run_dir, state["step"])
    info = describe_run(cfg, run_dir, about, metrics, facts)
    info.dtype = gguf_file.PRECISIONS.get(app.dtype or "", info.dtype)
    figures: dict[str, Any] = {}
    if app.kind == "phi_adapter":
        assert info.base_folder
        figures["phi_base"] = str(phi.check_base(app.base, info.base_folder, config))

    with staged(target) as stage:
        weights = RunWeights(cfg, config, checkpoint, about.get("tokens", {}).values())
        tokenizer = load_tokenizer(tokenizer_of(cfg.model), cfg.task)
        figures |= write_weights(app, kind, weights, info, tokenizer, stage, verify)
        reference = None
        if verify == "outputs":
            # llama.cpp multiplies what it reads in fp32.
            dtype = "fp32" if kind.form == "gguf" else info.dtype
            reference = reference_of(checkpoint, app.kind, dtype, stage)
        figures = finish_export(stage, app.kind, tokenizer, config, info, reference, figures)
    rows = [(key, str(value)) for key, value in figures.items() if key != "files"]
    summary_table(f"export {app.kind}", [("folder", str(target)), *rows])
    if app.push_to_hub:
        print(f"pushed to {push(target, app.push_to_hub, app.hub_private, app.hub_base)}")
    return EXIT_DONE


def check_words(app: ExportAppConfig) -> str:
    """Return the kind of verification: outputs, tensors or none.

    Raises:
        UserError: a problem that can be seen without the run.
    """
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
    if app.push_to_hub:
        if verify == "none":
            raise UserError(
                "only a verified export is uploaded", "verify", "Leave verify out, or push_to_hub."
            )
        check_hub(app.push_to_hub)
    return verify


def refuse_overwrite(target: Path) -> None:
    """Check that `target` is free, or an earlier export.

    Raises:
        UserError: it holds something else.
    """
    if target.exists() and not target.is_dir():
        raise UserError("this is a file", str(target), "Choose another with out=DIR.")
    if target.exists() and any(target.iterdir()) and not (target / "export.json").exists():
        raise UserError(
            "the directory is not empty and not an export",
            str(target),
            "Choose another with out=DIR.",
        )


def write_weights(
    app: ExportAppConfig,
    kind: Kind,
    weights: RunWeights,
    info: RunInfo,
    tokenizer: Any,
    stage: Path,
    verify: str,
) -> dict[str, Any]:
    """Write the adapter or model into `stage`, and verify it where that is done by tensors.

    Returns:
        Figures for export.json.
    """
    config, tensors, shapes = weights.config, weights.tensors(), weights.shapes
    if not kind.whole:
        # A model without memory behind its parameters gives names and shapes.
        shell = adapters.attach(
            meta_model(config, info.head),
            weights.cfg.adapter,
            info.head,
            info.base,
            weights.cfg.seed,
            weights.tokens,
        )
        trained = {
            name: weights.master(name, tuple(p.shape)).to(DTYPES[info.dtype])
            for name, p in shell.named_parameters()
            if p.requires_grad
        }
        write_adapter(shell, trained, stage, weights.init)
        by_tensors = verify == "tensors"
        return verify_adapter(stage, shell, weights, info.dtype) if by_tensors else {}

    if kind.form == "gguf":
        dtype = "q8_0" if app.dtype == "q8_0" else info.dtype.replace("fp", "f")
        ready = tokenizer_for(tokenizer, info.head, info.task, config.vocab_size)
        file = stage / gguf_file.MODEL_FILE
        gguf_file.write_gguf(tensors, shapes, config, ready, file, dtype, info.name)
        gguf_file.write_modelfile(stage, ready, config)
        return {"dtype": dtype}

    if kind.form == "phi":
        tensors, shapes = phi.convert_all(tensors, config), phi.shapes(shapes, config)
    if error := write_model(tensors, shapes, info.dtype, stage, app.max_shard_gib):
        raise error
    return verify_model(stage, weights, info.dtype) if verify == "tensors" else {}


def reference_of(checkpoint: Path, kind: str, dtype: str, stage: Path) -> dict[str, Tensor]:
    """Return outputs of the model as it was trained, computed in a separate process that ends."""
    out = stage.with_name(f"{stage.name}.outputs.safetensors")
    words = [str(checkpoint), kind, dtype, str(out)]
    try:
        fresh_process("finetune.export.reference_process", words, str(checkpoint))
        return load_file(out)
    finally:
        out.unlink(missing_ok=True)
