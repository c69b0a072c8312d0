"""Exports of a run, and their verification in a fresh process.

trained model -> reference outputs on real text -> files in a staging folder ->
`finetune.export.write.verify` reopens them with plain transformers and peft in another process ->
figures to export.json -> rename. A failed verification leaves no export. The layout is Hugging
Face's: an adapter as peft writes it, a model as sharded safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.config import DataConfig, ExportConfig, InstructConfig, ModelConfig, TaskConfig
from finetune.data.columns import Store
from finetune.data.encode_instruct import chat_template_differs
from finetune.data.instruct_rows import conversation
from finetune.data.instruct_template import TRIALS, Message, Template
from finetune.data.sources import open_source
from finetune.dist import World
from finetune.errors import RunFailed, UserError
from finetune.export.hf_files import write_small_files
from finetune.export.model_card import model_card
from finetune.export.safetensors_writer import Shapes, ShardWriter, file_sha256
from finetune.files import read_json, write_json
from finetune.gptj.load import (
    DTYPES,
    base_record,
    draw,
    local_folder,
    meta_model,
    read_config,
    tokenizer_of,
)
from finetune.process import LAUNCHER_VARIABLES
from finetune.sharding.engine import Engine

REFERENCE_TOKENS = 64
"""Length of each text that trained and exported model are compared on."""
REFERENCE_TEXTS = 4
CHAT_ROWS = 64
"""Rows of the training data that are looked through for conversations."""
SHORT_TOKENS = 24
"""Length of the longest text of a padded batch; the others have a half, a third, ... of it."""
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass
class ExportInfo:
    """Information about the run that the export's files hold beside the weights."""

    name: str
    head: str
    base: str
    """Path or hub id of the model that was fine-tuned."""
    dtype: str
    """bf16, fp16 or fp32."""
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
    """Where the base lies on this machine: an adapter's export says by which weights it can be recognised."""


def reference_texts(store: Store) -> list[list[int]]:
    """Return the beginnings of some training examples, to compare trained and exported model on."""
    ids, offsets = store.column("ids"), store.offsets
    chosen = list(range(0, len(store), max(1, len(store) // REFERENCE_TEXTS)))[:REFERENCE_TEXTS]
    return [
        ids[offsets[i] : min(offsets[i + 1], offsets[i] + REFERENCE_TOKENS)].tolist()
        for i in chosen
    ]


def real_conversations(task: TaskConfig, data: DataConfig) -> list[list[Message]]:
    """Return the first conversations of the training data; none if it can no longer be read."""
    found: list[list[Message]] = []
    if not isinstance(task, InstructConfig) or not isinstance(data.train, str):
        return found
    try:
        for row in islice(open_source(data.train, data.split, data.config).rows(), CHAT_ROWS):
            try:
                read = None if isinstance(row, UserError) else conversation(row[1], row[0], task)
            except UserError:  # left out of training too
                continue
            found += [read[0]] if read else []
    except UserError:
        pass
    return found[:REFERENCE_TEXTS]


def compare_chat_template(folder: Path, info: ExportInfo) -> str:
    """Compare how the exported tokenizer renders conversations with what training read."""
    from finetune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    eos, bos = str(tokenizer.eos_token), str(tokenizer.bos_token or "")
    template = Template(info.task["template"], info.task["template_text"], eos, bos)
    answered = [
        messages
        for messages in TRIALS
        if any(message["role"] == "assistant" for message in messages)
    ]
    count, differences = 0, []
    for messages in [*info.conversations, *answered]:
        if any(template.eos in message["content"] for message in messages):  # refused by training
            continue
        try:
            difference = chat_template_differs(tokenizer, template, messages)
        except UserError:  # a template without system messages, or for one turn
            continue
        count += 1
        differences += [difference] if difference else []
    if not differences:
        return f"training's ids on {count} conversations"
    return f"other ids than training's in {len(differences)} of {count} conversations: {differences[0]}"


def short_texts(texts: list[list[int]], head: str, eos: int) -> list[list[int]]:
    """Return beginnings of the reference texts with unequal lengths, for a padded batch.

    They end with the eos that the heads of classification and question answering read.
    """
    lengths = [max(1, SHORT_TOKENS // (i + 1)) for i in range(len(texts))]
    cut = [
        [token for token in ids if token != eos][:length]
        for ids, length in zip(texts, lengths, strict=True)
    ]
    return [[*ids, eos] if head != "lm" or not ids else ids for ids in cut]


def reference_outputs(
    module: nn.Module, texts: list[list[int]], head: str, eos: int, device: torch.device
) -> dict[str, Tensor]:
    """Compute the trained model's outputs on each text alone. Collective at stage 3.

    Returns:
        {"ids.0": (T,), "outputs.0": (T, V)}, and for the `short_texts` "short_ids.0" and
        "short_outputs.0".
    """
    was_training = module.training
    module.eval()
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for prefix, rows in (("", texts), ("short_", short_texts(texts, head, eos))):
            for i, ids in enumerate(rows):
                batch = torch.tensor([ids], device=device)
                out = module(input_ids=batch)
                found[f"{prefix}ids.{i}"] = batch[0].cpu()
                found[f"{prefix}outputs.{i}"] = out[0].float().cpu().contiguous()
    module.train(was_training)
    return found


def export_run(
    engine: Engine,
    tokenizer,
    info: ExportInfo,
    cfg: ExportConfig,
    texts: list[list[int]],
    target: Path,
    world: World,
) -> dict[str, Any]:
    """Write and verify the adapter or model that `engine` trained. Collective.

    Returns:
        The figures of export.json.

    Raises:
        RunFailed: the export is empty or not equal to the trained model; nothing is left at
            `target`.
    """
    reference = (
        reference_outputs(engine.module, texts, info.head, tokenizer.eos_token_id, world.device)
        if cfg.verify
        else None
    )
    adapter = hasattr(engine.module, "peft_config")
    stage = world.on_main(lambda: fresh_stage(target))
    tensors = engine.full_parameters(trained_only=adapter)
    if adapter:
        kept = {name: t.to("cpu", copy=True) for name, t in tensors if world.main or t is None}
        world.on_main(lambda: write_adapter(engine.module, kept, stage))
    else:
        shapes = {
            name: tuple(getattr(p, "ds_shape", p.shape))
            for name, p in engine.module.named_parameters()
        }
        error = write_model(tensors, shapes, info.dtype, stage, cfg.max_shard_gib, write=world.main)
        _raise_any(world, error)
    kind = "adapter" if adapter else "full"
    config = engine.module.config
    return world.on_main(
        lambda: finish_export(stage, target, tokenizer, config, info, kind, reference)
    )


def _raise_any(world: World, error: Exception | None) -> None:
    errors = [e for e in world.gather(str(error) if error else None) if e]
    if errors:
        raise RunFailed(
            f"the export could not be written: {errors[0]}",
            remedy="Free some space and export again: python launch/export.py run=RUN kind=full",
        )


def fresh_stage(target: Path) -> Path:
    """Create an empty folder beside `target` for the export until it is verified."""
    stage = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def write_adapter(model: nn.Module, trained: dict[str, Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's own layout.

    Raises:
        RunFailed: writing to the disk failed; nothing of the adapter is left.
    """
    try:
        model.save_pretrained(str(folder), state_dict=trained, safe_serialization=True)  # type: ignore[operator]
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise RunFailed(
            f"the export could not be written: {error}",
            str(folder.parent),
            "Free some space and export again: python launch/export.py run=RUN kind=adapter",
        ) from None
    (folder / "README.md").unlink(missing_ok=True)
    (folder / ADAPTER_FILE).chmod(0o644)  # safetensors creates files that only their owner can read


def write_model(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Shapes,
    dtype: str,
    folder: Path,
    shard_gib: float,
    write: bool = True,
) -> OSError | None:
    """Write sharded safetensors with one tensor in memory at a time.

    With `write=False` the rank only takes part in the gathering.

    Returns:
        The disk's error, if any. All tensors are consumed even then, because the other ranks wait
        in their gathering.
    """
    error: OSError | None = None
    try:
        writer = (
            ShardWriter(folder, shapes, DTYPES[dtype], int(shard_gib * 2**30)) if write else None
        )
    except OSError as problem:
        writer, error = None, problem
    for name, tensor in tensors:
        if writer is not None and error is None:
            try:
                writer.add(name, tensor)
            except OSError as problem:
                error = problem
    try:
        if writer is not None and error is None:
            writer.close()
    except OSError as problem:
        error = problem
    return error


def write_random_base(
    cfg: ModelConfig, head: str, seed: int, folder: Path, num_labels: int | None
) -> None:
    """Write the model that `model.init=random` started from, drawn again tensor by tensor."""
    target, folder = folder, fresh_stage(folder)
    config = read_config(local_folder(cfg), cfg, num_labels)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config, head).named_parameters()}
    tensors = ((name, draw(name, shape, config, seed)) for name, shape in shapes.items())
    error = write_model(tensors, shapes, cfg.dtype.value, folder, 5.0)
    if error is not None:
        raise RunFailed(f"the base model could not be written: {error}", str(folder))
    from finetune.data.tokenizer import load_tokenizer

    write_small_files(
        folder,
        config,
        head,
        "",
        cfg.dtype.value,
        {},
        load_tokenizer(tokenizer_of(cfg)),
        with_config=True,
    )
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)


def about_export(info: ExportInfo, kind: str, dtype: str) -> dict[str, Any]:
    """Return finetune.json: what this project needs to know to open the export."""
    return {
        "head": info.head,
        "dtype": dtype,
        "base": info.base,
        "kind": kind,
        "task": info.task,
        "settings": info.settings,
    }


def finish_export(
    stage: Path,
    target: Path,
    tokenizer,
    config,
    info: ExportInfo,
    kind: str,
    reference: dict[str, Tensor] | None,
    figures: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write small files and model card, verify, and rename the staging folder to `target`.

    Args:
        config: the trained model's GPTJConfig.
        reference: outputs that the reopened export must reproduce; None: it is not reopened.
        figures: results of a verification that was done already.

    Returns:
        The figures of export.json.

    Raises:
        RunFailed: the export is empty, does not load, or is not equal; `target` is as it was
            before.
    """
    try:
        prompted = (
            kind == "adapter"
            and info.head == "classify"
            and read_json(stage / "adapter_config.json")["peft_type"] == "PROMPT_TUNING"
        )
        # With virtual tokens, peft passes embeddings on, in which transformers cannot detect
        # padding: it pools the last position.
        pads = write_small_files(
            stage,
            config,
            info.head,
            info.base,
            info.dtype,
            info.task,
            tokenizer,
            with_config=kind != "adapter" or info.head != "lm",
            pads=not prompted,
        )
        found: dict[str, Any] = {"kind": kind, "verified": False, "pads": pads, **(figures or {})}
        about = about_export(info, kind, info.dtype)
        if kind == "adapter":
            found |= check_adapter(stage)
            assert info.base_folder
            about |= {
                key: info.model[key] for key in ("quantize", "quantize_double") if key in info.model
            }
            about |= {
                "revision": info.revision,
                "base_weights": base_record(info.base_folder, info.head),
            }
            file = stage / "adapter_config.json"
            write_json(file, read_json(file) | {"revision": info.revision})
        if info.task.get("template_text"):
            found["chat_template"] = compare_chat_template(stage, info)
        write_json(stage / "finetune.json", about)
        if reference is not None:
            found |= verify_export(stage, reference)
        found["files"] = {
            file.name: file_sha256(file) for file in sorted(stage.glob("*.safetensors"))
        }
        write_json(stage / "export.json", found)
        chat = bool(info.task.get("template_text"))
        card = model_card(
            info.name,
            info.head,
            kind,
            info.base,
            info.dtype,
            info.facts,
            info.metrics,
            found,
            found["files"],
            chat,
            getattr(config, "_name_or_path", None) or "",
            info.revision,
        )
        (stage / "README.md").write_text(card, encoding="utf-8")
        replace_export(stage, target)
        return found
    except OSError as error:
        raise RunFailed(f"the export could not be written: {error}", str(target)) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def replace_export(stage: Path, target: Path) -> None:
    """Replace the old export; it is removed only once the new one is complete."""
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(stage, target)
    shutil.rmtree(old, ignore_errors=True)


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
            f"{len(zero)} of {len(updates)} LoRA matrices of the exported adapter are all zero, so nothing was "
            f"trained there: {', '.join(zero[:4])}",
            str(folder),
            "Check optim.lr, train.steps and the data.",
        )
    return {"adapter_tensors": len(tensors)} | (
        {"lora_tensors": len(updates), "lora_nonzero": len(updates)} if updates else {}
    )


def verify_export(folder: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Reopen `folder` with plain transformers and peft in a fresh process and compare outputs.

    Raises:
        RunFailed: it does not load, or its outputs differ from the trained model's.
    """
    file = folder.with_name(f"{folder.name}.reference.safetensors")
    save_file(reference, file)
    try:
        figures = json.loads(
            fresh_process("finetune.export.verify", [str(folder), str(file)], str(folder))
        )
    finally:
        file.unlink(missing_ok=True)
    if not figures["equal"]:
        raise RunFailed(f"the export is not equal to the trained model: {figures}", str(folder))
    return {"verified": True, **figures}


def fresh_process(module: str, words: list[str], where: str) -> str:
    """Run one of the package's modules in a new process without GPUs; return its last line.

    Raises:
        RunFailed: the process failed; the message is its last line.
    """
    # Without the launcher's variables, and without the GPUs, which the trained model still occupies.
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        killed = " (killed: not enough memory?)" if done.returncode < 0 else ""
        raise RunFailed(f"{module} could not open it{killed}: {reason}", where)
    return lines[-1]


def refuse_overwrite(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError("this is a file", str(target), "Choose another with out=DIR.")
    if target.exists() and any(target.iterdir()) and not (target / "export.json").exists():
        raise UserError(
            "the directory is not empty and not an export",
            str(target),
            "Choose another with out=DIR.",
        )
