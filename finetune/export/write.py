"""The files of an export: weights tensor by tensor, small files, proof, model card.

A staging folder beside the target -> weights -> tokenizer and configs -> the proof's figures in
export.json -> rename. Whatever fails on the way leaves no export. The layout is Hugging Face's: an
adapter as peft writes it, a model as sharded safetensors; other kinds: `kinds.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPTJConfig

from finetune.config import ModelConfig
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import RunFailed
from finetune.export import phi
from finetune.export.hf_files import write_small_files
from finetune.export.kinds import KINDS
from finetune.export.model_card import model_card
from finetune.export.proof import compare_chat_template, verify_export
from finetune.export.run_info import RunInfo
from finetune.export.safetensors_writer import Shapes, ShardWriter, file_sha256
from finetune.files import read_json, write_json
from finetune.gptj.adapter_init import AdapterInit
from finetune.gptj.load import (
    DTYPES,
    base_record,
    draw,
    local_folder,
    meta_model,
    read_config,
    tokenizer_of,
)
from finetune.gptj.token_rows import fixed_tensors

ADAPTER_FILE = "adapter_model.safetensors"


@contextmanager
def staged(
    target: Path, remedy: str = "Free some space there, or choose another place with out=DIR."
) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` at the end, or leaves nothing behind.

    What was there before is removed once the new is complete.

    Raises:
        RunFailed: the disk is full, or not writable; with `remedy`.
    """
    stage, old = (target.with_name(f".{word}-{target.name}") for word in ("tmp", "old"))
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield stage
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(stage, target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        # numpy tells how much of an array it wrote, not why it stopped there.
        short = isinstance(error, OSError) and error.errno is None
        reason = f"No space left on device ({error})" if short else error
        raise RunFailed(f"could not be written: {reason}", str(target), remedy) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_adapter(
    model: nn.Module, trained: dict[str, Tensor], folder: Path, init: AdapterInit | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's own layout.

    Args:
        init: what the adapter began from, if it trained on the residual of the base.

    Raises:
        SafetensorError, OSError: the disk is full.
    """
    trained = init.on_base(trained) if init else trained
    tensors = trained | fixed_tensors(model, next(iter(trained.values())).dtype)
    model.save_pretrained(  # type: ignore[operator]
        str(folder), state_dict=tensors, safe_serialization=True, save_embedding_layers=False
    )
    if init:
        file = folder / "adapter_config.json"
        write_json(file, read_json(file) | init.settings_on_base())
    (folder / "README.md").unlink(missing_ok=True)
    (folder / ADAPTER_FILE).chmod(0o644)  # safetensors creates files that only their owner can read


def write_model(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Shapes,
    dtype: str,
    folder: Path | None,
    shard_gib: float,
) -> OSError | None:
    """Write sharded safetensors with one tensor in memory at a time.

    Args:
        folder: None: this rank only takes part in the gathering.

    Returns:
        The disk's error, if any. All tensors are consumed even then, because the other ranks wait
        in their gathering.
    """
    waiting, error = iter(tensors), None
    try:
        if folder is not None:
            writer = ShardWriter(folder, shapes, DTYPES[dtype], int(shard_gib * 2**30))
            for name, tensor in waiting:
                writer.add(name, tensor)
            writer.close()
    except OSError as problem:
        error = problem
    for _ in waiting:
        pass
    return error


def write_random_base(
    cfg: ModelConfig, head: str, seed: int, folder: Path, num_labels: int | None
) -> None:
    """Write the model that `model.init=random` started from, drawn again tensor by tensor."""
    config = read_config(local_folder(cfg), cfg, num_labels)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config, head).named_parameters()}
    tensors = ((name, draw(name, shape, config, seed)) for name, shape in shapes.items())
    info = RunInfo("", head, "", cfg.dtype.value, {})
    with staged(folder, "Free some space.") as stage:
        if error := write_model(tensors, shapes, info.dtype, stage, 5.0):
            raise error
        write_small_files(stage, config, info, load_tokenizer(tokenizer_of(cfg)))


def check_adapter(folder: Path) -> dict[str, Any]:
    """Count an adapter's tensors, and reject an empty one, as ZeRO-3 writes it when misused.

    Raises:
        RunFailed: no tensors, an empty one, or one of LoRA's matrices is all zero.
    """
    tensors = load_file(folder / ADAPTER_FILE)
    empty = [name for name, t in tensors.items() if t.numel() == 0]
    updates = [name for name in tensors if "lora_A" in name or "lora_B" in name]
    zero = [name for name in updates if not tensors[name].any()]
    if not tensors or empty:
        raise RunFailed(
            f"the exported adapter is empty: {', '.join(empty[:4]) or 'no tensors'}", str(folder)
        )
    if zero:
        raise RunFailed(
            f"{len(zero)} of {len(updates)} LoRA matrices of the exported adapter are all zero, so "
            f"nothing was trained there: {', '.join(zero[:4])}",
            str(folder),
            "Check optim.lr, train.steps and the data.",
        )
    return {"adapter_tensors": len(tensors)} | (
        {"lora_tensors": len(updates), "lora_nonzero": len(updates)} if updates else {}
    )


def finish_export(
    stage: Path,
    kind: str,
    tokenizer: Any,
    config: GPTJConfig,
    info: RunInfo,
    reference: dict[str, Tensor] | None,
    figures: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an export's small files and model card beside its weights, and prove it.

    Args:
        config: the trained model's.
        reference: outputs that the reopened export must reproduce; None: it is not reopened.
        figures: results of a verification that was done already; "phi_base" of a phi_adapter.

    Returns:
        The figures of export.json.

    Raises:
        RunFailed: the export is empty, does not load, or is not equal.
    """
    spec = KINDS[kind]
    figures = {"kind": kind, "verified": False, **(figures or {})}
    about = {
        "head": info.head,
        "dtype": figures.get("dtype", info.dtype),
        "base": info.base,
        "kind": kind,
        "task": info.task,
        "settings": info.settings,
    }
    if not spec.whole:
        figures |= check_adapter(stage)

    if spec.form != "gguf":
        # With virtual tokens, peft passes embeddings on, in which transformers cannot detect
        # padding: it pools the last position.
        file = stage / "adapter_config.json"
        prompted = file.exists() and read_json(file)["peft_type"] == "PROMPT_TUNING"
        pads = not (prompted and info.head == "classify")
        with_config = spec.whole or info.head != "lm"
        figures["pads"] = write_small_files(stage, config, info, tokenizer, with_config, pads)
    if spec.form == "phi":
        phi.rewrite_files(stage, config, info.head, figures.get("phi_base"))
    if kind == "adapter":
        assert info.base_folder
        record = base_record(info.base_folder, info.head)
        about |= {"revision": info.revision, "base_weights": record}
        about |= {
            key: info.model[key] for key in ("quantize", "quantize_double") if key in info.model
        }
        write_json(file, read_json(file) | {"revision": info.revision})
    if spec.form != "gguf" and info.task.get("template_text"):
        figures["chat_template"] = compare_chat_template(stage, info.task, info.conversations)

    write_json(stage / "finetune.json", about)
    if reference is not None:
        figures |= verify_export(stage, reference)
    weights = sorted([*stage.glob("*.safetensors"), *stage.glob("*.gguf")])
    figures["files"] = {file.name: file_sha256(file) for file in weights}
    write_json(stage / "export.json", figures)
    card = model_card(kind, info, figures, getattr(config, "_name_or_path", None) or "")
    (stage / "README.md").write_text(card, encoding="utf-8")
    return figures
