"""Exports of a run, and their verification in a fresh process.

trained model -> reference logits on real text -> files in a staging folder -> `finetune.verify` reopens them with
plain transformers and peft in another process -> figures to export.json -> rename. A failed verification leaves no
export. Layout is Hugging Face's: an adapter as peft writes it, a model as sharded safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.config import ExportConfig, ModelConfig
from finetune.data.columns import Store
from finetune.dist import World
from finetune.dist_environment import LAUNCHER_VARIABLES
from finetune.engine import Engine
from finetune.errors import RunFailed, UserError
from finetune.gptj.load import DTYPES, draw, local_folder, meta_model, read_config
from finetune.gptj.model import ARCHITECTURES

REFERENCE_TOKENS = 64
"""Length of each text that trained and exported model are compared on."""
REFERENCE_TEXTS = 4


@dataclass
class ExportInfo:
    """What the files say about the run beside the weights."""

    name: str
    head: str
    base: str
    """Path or hub id of the model that was fine-tuned."""
    dtype: str
    task: dict[str, Any]
    """`Task.describe()`: label names, template, ..."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The task's config section, so that evaluation and generation use the same."""
    card: dict[str, Any] = field(default_factory=dict)
    """Figures for the model card: data, loss, steps."""


def reference_texts(store: Store) -> list[list[int]]:
    """The beginnings of some training examples: real text to compare trained and exported model on."""
    ids, offsets = store.column("ids"), store.offsets
    chosen = list(range(0, len(store), max(1, len(store) // REFERENCE_TEXTS)))[:REFERENCE_TEXTS]
    return [ids[offsets[i] : min(offsets[i + 1], offsets[i] + REFERENCE_TOKENS)].tolist() for i in chosen]


def reference_outputs(module: nn.Module, texts: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Trained model's outputs on each text alone, {"ids.0": (T,), "outputs.0": (T, V)}. Collective at stage 3."""
    was_training = module.training
    module.eval()
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for i, ids in enumerate(texts):
            batch = torch.tensor([ids], device=device)
            out = module(input_ids=batch)
            out = out.logits if hasattr(out, "logits") else out
            found[f"ids.{i}"] = batch[0].cpu()
            found[f"outputs.{i}"] = out[0].float().cpu().contiguous()
    module.train(was_training)
    return found


def export_run(engine: Engine, tokenizer, info: ExportInfo, cfg: ExportConfig, texts: list[list[int]], target: Path,
               world: World) -> dict[str, Any]:
    """Write and verify the adapter (or the whole model) that `engine` trained; the figures of export.json. Collective.

    Raises:
        RunFailed: the export is empty or not equal to the trained model; nothing is left at `target`.
    """
    reference = reference_outputs(engine.module, texts, world.device) if cfg.verify else None
    adapter = hasattr(engine.module, "peft_config")
    stage = world.on_main(lambda: fresh_stage(target))
    tensors = engine.full_parameters(trained_only=adapter)
    if adapter:
        kept = {name: t.to("cpu", copy=True) for name, t in tensors if world.main or t is None}
        world.on_main(lambda: write_adapter(engine.module, kept, stage))
    else:
        error = None
        try:
            write_model(tensors, engine.module.config, info, stage, cfg.max_shard_gib, write=world.main)
        except OSError as problem:
            error = problem
        _raise_any(world, error)
    kind = "adapter" if adapter else "full"
    return world.on_main(lambda: finish_export(stage, target, tokenizer, info, kind, reference))


def _raise_any(world: World, error: Exception | None) -> None:
    errors = [e for e in world.gather(str(error) if error else None) if e]
    if errors:
        raise RunFailed(f"the export could not be written: {errors[0]}", remedy="Free some space and export again: "
                        "python launch/export.py run=RUN kind=full")


def fresh_stage(target: Path) -> Path:
    """An empty folder beside `target`, in which the export grows until it is proven."""
    stage = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def write_adapter(model: nn.Module, trained: dict[str, Tensor], folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors in peft's own layout."""
    model.save_pretrained(str(folder), state_dict=trained, safe_serialization=True)  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)


def write_model(tensors: Iterable[tuple[str, Tensor]], config, info: ExportInfo, folder: Path, shard_gib: float,
                write: bool = True) -> None:
    """Sharded safetensors, one shard in memory at a time; `write` False only takes part in the gathering."""
    writer = ShardWriter(folder, int(shard_gib * 2**30)) if write else None
    for name, tensor in tensors:
        if writer is not None:
            writer.add(name, tensor)
    if writer is None:
        return
    writer.close()
    values = config.to_dict()
    values |= {"architectures": [ARCHITECTURES[info.head]], "dtype": _dtype_name(info.dtype), "use_cache": True,
               "_name_or_path": info.base}
    names = info.task.get("labels")
    if names:
        values |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    values.pop("transformers_version", None)
    _write_json(folder / "config.json", values)
    _write_json(folder / "generation_config.json", {"bos_token_id": config.bos_token_id,
                                                    "eos_token_id": config.eos_token_id})


def write_random_base(cfg: ModelConfig, head: str, seed: int, folder: Path, num_labels: int | None) -> None:
    """The model that `model.init=random` started from, drawn again tensor by tensor."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = read_config(local_folder(cfg), cfg, num_labels)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config, head).named_parameters()}
    tensors = ((name, draw(name, shape, config, seed).to(DTYPES[cfg.dtype.value])) for name, shape in shapes.items())
    write_model(tensors, config, ExportInfo("base", head, "", cfg.dtype.value, {}), folder, 5.0)


def _dtype_name(short: str) -> str:
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[short]


class ShardWriter:
    """model-00001-of-0000N.safetensors and their index; tensors are copied as they come."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.size = self.total = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.size + size > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor.to("cpu", copy=True).contiguous()
        self.size += size
        self.total += size

    def _flush(self) -> None:
        self.shards.append(list(self.pending))
        part = self.folder / f"part-{len(self.shards)}"
        save_file(self.pending, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        self.pending, self.size = {}, 0

    def close(self) -> None:
        if self.pending:
            self._flush()
        count = len(self.shards)
        if count == 1:
            os.replace(self.folder / "part-1", self.folder / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self.shards, 1):
            file = f"model-{i:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"part-{i}", self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        _write_json(self.folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": self.total}, "weight_map": weight_map})


def finish_export(stage: Path, target: Path, tokenizer, info: ExportInfo, kind: str,
                  reference: dict[str, Tensor] | None) -> dict[str, Any]:
    """Tokenizer, card and proof; then the staging folder becomes `target`. Returns export.json's figures.

    Raises:
        RunFailed: the export is empty, does not load, or is not equal; `target` is as it was before.
    """
    try:
        tokenizer.save_pretrained(str(stage))
        if kind == "adapter":
            check_adapter(stage)
        _write_json(stage / "finetune.json", {"head": info.head, "dtype": info.dtype, "base": info.base,
                                              "kind": kind, "task": info.task, "settings": info.settings})
        figures: dict[str, Any] = {"kind": kind, "verified": False}
        if reference is not None:
            figures |= verify_export(stage, reference)
        _write_json(stage / "export.json", figures)
        (stage / "README.md").write_text(model_card(info, kind, figures), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(stage, target)
        return figures
    except OSError as error:
        raise RunFailed(f"the export could not be written: {error}", str(target)) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that holds nothing: ZeRO-3 run wrongly writes such files without a word.

    Raises:
        RunFailed: no tensors, an empty one, or LoRA's B matrices are all zero.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    empty = [name for name, t in tensors.items() if t.numel() == 0]
    updates = [name for name in tensors if "lora_B" in name]
    if not tensors or empty:
        raise RunFailed(f"the exported adapter is empty: {', '.join(empty[:4]) or 'no tensors'}", str(folder))
    if updates and all(not tensors[name].any() for name in updates):
        raise RunFailed("every lora_B of the exported adapter is zero: nothing was trained", str(folder),
                        "Check optim.lr and train.steps.")


def verify_export(folder: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Reopen `folder` with plain transformers and peft in a fresh process and compare outputs.

    Raises:
        RunFailed: it does not load, or its outputs differ from the trained model's.
    """
    file = folder.with_name(f"{folder.name}.reference.safetensors")
    save_file(reference, file)
    command = [sys.executable, "-m", "finetune.verify", str(folder), str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_fresh_environment(), check=False)
    finally:
        file.unlink(missing_ok=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise RunFailed("the export does not load in plain transformers and peft: " +
                        (done.stderr.strip().splitlines() or ["no output"])[-1], str(folder))
    figures = json.loads(lines[-1])
    if not figures["equal"]:
        raise RunFailed(f"the export is not equal to the trained model: {figures}", str(folder))
    return {"verified": True, **figures}


def _fresh_environment() -> dict[str, str]:
    """The environment without the launcher's variables and without GPUs: the trained model still holds those."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    root = str(Path(__file__).resolve().parents[1])
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))}


def model_card(info: ExportInfo, kind: str, figures: dict[str, Any]) -> str:
    """README.md with valid Hub metadata and the command that loads it."""
    head = ["---", "library_name: " + ("peft" if kind == "adapter" else "transformers"), "license: apache-2.0",
            "pipeline_tag: " + {"lm": "text-generation", "classify": "text-classification", "qa": "question-answering"}[info.head],
            "tags:", "- gptj", "- deepspeed"]
    if not Path(info.base).is_absolute():
        head.append(f"base_model: {info.base}")
    lines = [*head, "---", "", f"# {info.name}", "", f"A {kind} fine-tuned from `{info.base}` ({info.dtype}).", ""]
    lines += [f"- {key}: {value}" for key, value in info.card.items()]
    if figures.get("verified"):
        lines += ["", f"Reopened with plain transformers and peft: largest output difference {figures['max_difference']:.3g}, "
                      f"the same most likely token at {100 * figures['argmax_agreement']:.2f}% of {figures['positions']} positions."]
    load = (f"from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n"
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({info.base!r}), 'THIS_FOLDER')"
            if kind == "adapter" else
            "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained('THIS_FOLDER')")
    auto = {"lm": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification",
            "qa": "AutoModelForQuestionAnswering"}[info.head]
    return "\n".join([*lines, "", "```python", load.replace("AutoModelForCausalLM", auto), "```", ""])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_overwrite(target: Path) -> None:
    if target.exists() and any(target.iterdir()) and not (target / "export.json").exists():
        raise UserError("the directory is not empty and not an export", str(target), "Choose another with out=DIR.")
