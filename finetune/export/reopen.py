"""Reopen trained models, from a run's checkpoint or from an export, without DeepSpeed.

run_dir/config.yaml -> Config ; base weights + masters of the newest valid checkpoint -> module
export/finetune.json -> description of the export ; base + adapter, or the whole model -> module
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.assets.paths import asset
from finetune.checkpointing.format import (
    StateReader,
    entry_of,
    find_resume,
    read_state,
    step_folder,
    verify,
)
from finetune.config import (
    GPTJ_POSITIONS,
    HEADS,
    KINDS,
    Config,
    Dtype,
    FullConfig,
    Init,
    ModelConfig,
    TaskConfig,
    adapter_head,
    config_head,
    read_gptj_config,
    read_yaml,
    typed,
)
from finetune.data.encode_classify import LAST_TOKEN
from finetune.data.sources import read
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import UserError
from finetune.export.kinds import KINDS as EXPORTS
from finetune.export.kinds import serving_command
from finetune.export.phi import ARCHITECTURES
from finetune.files import read_json, read_object, read_settings, refuse_pointer
from finetune.gptj import adapters
from finetune.gptj.adapter_init import FILE as ADAPTER_INIT
from finetune.gptj.adapter_init import AdapterInit, read_init
from finetune.gptj.adapters import flat
from finetune.gptj.load import (
    DTYPES,
    Weights,
    build_model,
    local_folder,
    open_shard,
    same_base,
    weights_identity,
)
from finetune.training.mfu import SLOW_BF16, emulates_bf16

ABOUT, REFERENCE = "finetune.json", "reference.json"


def typed_task(values: dict[str, Any]) -> TaskConfig:
    """Return the typed task section for values written by `plain_config`, `kind` included."""
    return typed(KINDS["task"][values["kind"]], values)


def load_config(run_dir: Path) -> Config:
    """Return the config of a finished or interrupted run.

    Raises:
        UserError: this is not a run directory.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(
            "there is no config.yaml: not a run directory",
            str(run_dir),
            "Pass run=DIR as training printed it.",
        )
    values = read_yaml(file)
    assert isinstance(values, dict)
    cfg = Config()
    for section in fields(Config):
        if section.name not in values:
            continue
        current, value = getattr(cfg, section.name), values[section.name]
        if section.name in ("task", "adapter"):
            value = typed(KINDS[section.name][value["kind"]], value)
        elif isinstance(value, dict):
            value = typed(ModelConfig if section.name == "model" else type(current), value)
        setattr(cfg, section.name, value)
    return cfg


@dataclass
class Trained:
    """A model ready to compute, and its description."""

    module: nn.Module
    head: str
    dtype: str
    base: str
    task: dict[str, Any]
    """`Task.describe()` of the training."""
    settings: dict[str, Any]
    """The task's config section."""


def checkpoint_of(path: Path) -> tuple[Path, Path]:
    """Return (run_dir, checkpoint) for a run directory or for one of its checkpoints.

    For a run directory, the checkpoint is the best one if the run keeps it, else the newest.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if path.parent.name == "checkpoints":
        reason = verify(path)
        if reason:
            raise UserError(
                f"the checkpoint is damaged: {reason}",
                "run",
                "Name another step, or the run directory.",
            )
        return path.parent.parent, path
    newest = find_resume(str(path), path, lambda text: None)
    assert newest is not None
    if (path / "config.yaml").is_file() and load_config(path).checkpoint.best:
        best = step_folder(path / "checkpoints", read_state(newest)["state"]["best_step"])
        if best.is_dir() and verify(best) is None:
            return path, best
    return path, newest


def about_of_run(run_dir: Path) -> dict[str, Any]:
    """Return what the head learned from the training data (label names, template).

    Read from the run's task.json; empty if the run wrote none.
    """
    file = run_dir / "task.json"
    return read_json(file) if file.is_file() else {}


def reference_texts_of(run_dir: Path) -> list[list[int]]:
    """Return token ids of the texts that exports are compared on.

    These are the run's own, or else speeches that ship with the project.
    """
    file = run_dir / REFERENCE
    if file.is_file():
        return read_json(file)
    rows = islice(read(str(asset("data") / "pile_sample/eval.jsonl.zst"), "train"), 4)
    return [load_tokenizer(None)(row["text"][:400])["input_ids"][:64] for _, row in rows]


def check_base(cfg: Config, checkpoint: Path) -> None:
    """Check that the base model still has the weights that a run's adapter was trained on.

    An adapter is meaningless on any other weights.

    Raises:
        UserError: the base has changed.
    """
    trained_on = read_state(checkpoint)["identity"].get("weights")
    if (
        cfg.model.init is not Init.pretrained
        or isinstance(cfg.adapter, FullConfig)
        or not trained_on
    ):
        return
    folder = local_folder(cfg.model)
    if weights_identity(folder) != trained_on:
        raise UserError(
            "these are not the weights that this adapter was trained on",
            str(folder),
            "Put the base back as it was when the run began.",
        )


def init_of(cfg: Config, checkpoint: Path) -> AdapterInit | None:
    """Return what the adapter of a run's checkpoint began from, if it trained on the residual of the base.

    Raises:
        UserError: the run's file of it is missing, or is another.
    """
    run_dir = checkpoint.parent.parent
    init, file = read_init(cfg, run_dir), run_dir / ADAPTER_INIT
    if init and entry_of(file)["hash"] != read_state(checkpoint)["identity"]["adapter_init"]:
        raise UserError(
            "these are not the matrices that the adapter of this checkpoint began from",
            str(file),
            "Put back the file that was there when the checkpoint was written.",
        )
    return init


def load_run(
    cfg: Config,
    checkpoint: Path,
    head: str,
    num_labels: int | None,
    device: torch.device,
    dtype: Dtype | None = None,
    tokens: Iterable[int] = (),
) -> nn.Module:
    """Return the module of a run as it was at `checkpoint`, in evaluation mode.

    Args:
        dtype: precision of the arithmetic. None: `cfg.model.dtype`, to which frozen weights are
            rounded in any case.
        tokens: ids of the task's own tokens.
    """
    check_base(cfg, checkpoint)
    init = init_of(cfg, checkpoint)
    model = build_model(
        cfg.model,
        head,
        device=device,
        seed=cfg.seed,
        num_labels=num_labels,
        change=init.residual if init else None,
    )
    module = adapters.attach(model, cfg.adapter, head, cfg.model.path, cfg.seed, list(tokens))
    if dtype is not None:
        module = module.to(DTYPES[dtype.value])
    masters = StateReader(checkpoint)
    with torch.no_grad():  # the trained weights, rounded once
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.view(-1).copy_(masters.read(name, "master", 0, parameter.numel()))
    return module.to(device).eval()


def read_about(folder: Path, base: str | None = None) -> dict[str, Any]:
    """Return the contents of an export's finetune.json.

    For any other checkpoint or adapter of a GPT-J, return the same description as far as its own
    files give it.

    Args:
        base: an adapter's base model, needed if the adapter does not name it or names a place that
            does not exist here.

    Returns:
        The description. For an adapter, `base` is a folder on this machine, with the weights that
        the adapter was trained on.

    Raises:
        UserError: no directory; neither an export nor a GPT-J; an export for other engines; an adapter
            whose base is unknown, missing or changed.
    """
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}", "model", "Pass model=RUN_DIR/export.")
    adapter_file = folder / "adapter_config.json"
    is_adapter = adapter_file.is_file()
    if base and not is_adapter:
        raise UserError(
            "base names an adapter's base model, and this is no adapter",
            str(folder),
            "Leave base out.",
        )
    for name in (ABOUT, "adapter_model.safetensors", "adapter_model.bin"):
        refuse_pointer(folder / name)
    about = read_settings(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    adapter = read_settings(adapter_file) if is_adapter else {}
    refuse_other_engines(folder, about, adapter)
    if about and is_adapter:
        # Trained elsewhere: the adapter may have been told where its base lies here.
        recorded = Path(about["base"])
        moved = recorded.is_absolute() and not recorded.is_dir()
        name = base or (moved and adapter.get("base_model_name_or_path")) or about["base"]
        about["base"] = str(base_folder(name, about.get("revision"), folder))
        check_same_base(Path(about["base"]), about["head"], about.get("base_weights"))
    if about:
        return about

    # An adapter that plain peft wrote.
    if is_adapter:
        head = adapter_head(adapter, str(adapter_file)).name
        name = base or adapter.get("base_model_name_or_path")
        home = base_folder(name, adapter.get("revision"), folder)
        model = read_gptj_config(home)
        # A head that was saved with the adapter is described next to it, if anywhere.
        own = read_settings(folder / "config.json") if (folder / "config.json").is_file() else {}
        described = ("id2label", "problem_type", "pad_token_id")
        model |= {key: own[key] for key in described if own.get(key) is not None}
        outputs = head_outputs(folder, home, head) if head != "lm" else 0
        if head == "classify" and len(model.get("id2label") or {}) != outputs:
            model["id2label"] = {str(i): f"LABEL_{i}" for i in range(outputs)}
        return {"base": str(home), "kind": "adapter", **describe_foreign(model, head)}

    # A checkpoint of transformers.
    if (folder / "config.json").is_file():
        values = read_gptj_config(folder)
        described = describe_foreign(values, config_head(values).name)
        return {"base": str(folder), "kind": "full", **described}
    raise UserError(
        "neither an export nor a GPT-J checkpoint", str(folder), "Pass model=RUN_DIR/export."
    )


def refuse_other_engines(folder: Path, about: dict[str, Any], adapter: dict[str, Any]) -> None:
    """Check that a model is in GPT-J's layout, which this project runs.

    Args:
        about: of its finetune.json; {} where there is none.
        adapter: of its adapter_config.json; {} where it is none.

    Raises:
        UserError: it is a GGUF file or in Phi's form; the message has the command that serves it.
    """
    kind, head = about.get("kind"), about.get("head", "lm")
    if not about and not adapter:
        config = read_object(folder / "config.json")
        if any(folder.glob("*.gguf")):
            kind = "gguf"
        elif config.get("model_type") == "phi":
            named = {architecture: head for head, architecture in ARCHITECTURES.items()}
            kind, head = "phi", named.get((config.get("architectures") or [""])[0], "lm")
    if kind in EXPORTS and EXPORTS[kind].form != "gptj":
        form = "a GGUF file" if kind == "gguf" else "in Phi's form"
        base = str(adapter.get("base_model_name_or_path"))
        raise UserError(
            f"this is {form}, which other engines run; here GPT-J's own layout is needed",
            str(folder),
            f"Serve it with: {serving_command(kind, head, str(folder), base)}\n"
            "  Or name an export of kind adapter, merged or full.",
        )


def base_folder(name: str | None, revision: str | None, adapter: Path) -> Path:
    """Return the folder with the base model of the adapter in the folder `adapter`.

    Args:
        name: path or hub id, as the adapter or the user names it.

    Raises:
        UserError: no name, or nothing there.
    """
    file = str(adapter / "adapter_config.json")
    if not name:
        raise UserError(
            "the adapter does not name its base model (base_model_name_or_path is null)",
            file,
            "Say which it is: base=DIR, or base=EleutherAI/gpt-j-6b.",
        )
    try:
        return local_folder(ModelConfig(path=name, revision=revision, init=Init.pretrained))
    except UserError as error:
        raise UserError(
            f"the adapter's base model, {name}, is not at hand: {error.problem}",
            file,
            "Say where it lies: base=DIR, with its config.json and weights.",
        ) from None


def check_same_base(folder: Path, head: str, record: dict[str, str] | None) -> None:
    """Check that `folder` holds the weights that an adapter was trained on.

    An adapter is meaningless on any other weights.

    Args:
        folder: of the base model.
        record: `base_record` of the training; None: an adapter from elsewhere, or of an earlier
            version.

    Raises:
        UserError: the weights in `folder` are others.
    """
    if record and not same_base(folder, head, record):
        raise UserError(
            "these are not the weights that this adapter was trained on",
            str(folder),
            "Put the base back as it was when the run began, or say where it lies: base=DIR.",
        )


def head_outputs(folder: Path, home: Path, head: str) -> int:
    """Return the number of outputs of the head that an adapter, or else its base, holds.

    Raises:
        UserError: neither has a head, so that its answers would be random.
    """
    name = HEADS[head].module
    stored = re.compile(rf"(^|\.){name}\.(modules_to_save\.(default\.)?)?weight$")
    files = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    for file in [file for file in files if file.is_file()][:1]:
        tensors = open_shard(file)
        for key in tensors.keys():  # noqa: SIM118 - not always a dict
            if stored.search(key):
                tensor = tensors[key] if isinstance(tensors, dict) else tensors.get_tensor(key)
                return tensor.shape[0]
    weights = Weights(home)
    if f"{name}.weight" in weights.files:
        return weights.shape(f"{name}.weight")[0]
    raise UserError(
        f"the adapter was trained with the head '{name}', and neither its file nor its base holds "
        "that head",
        str(folder),
        f"Save it with the adapter: modules_to_save=[{name}] in its LoraConfig.",
    )


def describe_foreign(values: dict[str, Any], head: str) -> dict[str, Any]:
    """Return head, precision, task and settings of a model that was not trained here.

    Args:
        values: of its config.json.
    """
    stored = values.get("dtype") or values.get("torch_dtype")
    dtype = next((d.value for d in Dtype if d.torch_name == stored), "bf16")
    positions = min(GPTJ_POSITIONS, values.get("n_positions") or GPTJ_POSITIONS)
    settings = {"kind": HEADS[head].task, "max_length": positions}
    about = {"head": head, "dtype": dtype, "task": {}, "settings": settings}
    if head != "classify":
        return about

    # As ClassifyTask.describe does, from what transformers saved of a classifier.
    labels = sorted((values.get("id2label") or {}).items(), key=lambda item: int(item[0]))
    names = [name for _, name in labels]
    names = names or [f"LABEL_{i}" for i in range(values.get("num_labels") or 2)]
    if values.get("problem_type") == "regression" or len(names) == 1:
        settings["problem"], task = "regression", {"num_labels": 1}
    else:
        several = values.get("problem_type") == "multi_label_classification"
        settings["problem"] = "multi_label" if several else "single_label"
        task = {"problem": settings["problem"], "labels": names, "labels_by_index": True}
        task["num_labels"] = len(names)
    about["task"] = {**task, "pooling": LAST_TOKEN, "pad_token_id": values.get("pad_token_id")}
    return about


def foreign_note(about: dict[str, Any]) -> str | None:
    """Return a note for users on a model that was not trained here; None if nothing is guessed."""
    if about["head"] != "qa" or about["task"]:
        return None
    return (
        "note: this question answerer was not trained here, and its files do not tell how it "
        "reads: it gets question, "
        "newline, context, eos, with 'no answer' at the eos, as in this project's training"
    )


def model_folder(folder: Path, about: dict[str, Any]) -> Path:
    """Return the folder with the config.json of an export's model.

    For an adapter this is the folder of its base, which `read_about` has resolved.
    """
    return Path(about["base"]) if (folder / "adapter_config.json").is_file() else folder


def virtual_tokens_of(folder: Path) -> int:
    """Return the number of positions that an export's prompt or prefix takes; 0 for any other."""
    file = folder / "adapter_config.json"
    return int(read_object(file).get("num_virtual_tokens") or 0)


def load_export(
    folder: Path, dtype: Dtype | None, device: torch.device, base: str | None = None
) -> Trained:
    """Open an adapter on its base, or a whole model, in evaluation mode on the training GPT-J.

    Args:
        dtype: precision of weights and arithmetic. None: the export's own, but fp32 arithmetic on a
            CPU that emulates bf16.
        base: as for `read_about`.
    """
    about = read_about(folder, base)
    precision = dtype or Dtype(about["dtype"])
    is_adapter = (folder / "adapter_config.json").is_file()
    config = ModelConfig(
        path=about["base"] if is_adapter else str(folder), dtype=precision, init=Init.pretrained
    )
    module: Any = build_model(
        config, about["head"], device=device, seed=0, num_labels=about["task"].get("num_labels")
    )
    if is_adapter:
        from peft import PeftModel

        module = flat(PeftModel.from_pretrained(module, str(folder), autocast_adapter_dtype=False))
        module = module.to(
            device=device, dtype=next(module.get_base_model().transformer.h.parameters()).dtype
        )
    if dtype is None:
        module = readable(module, precision, device)
    return Trained(
        module.eval(),
        about["head"],
        precision.value,
        about["base"],
        about["task"],
        about["settings"],
    )


def readable(module: nn.Module, dtype: Dtype, device: torch.device) -> nn.Module:
    """Convert a module to fp32 if the CPU only emulates bf16.

    This is lossless, as every bf16 number is an fp32 number.
    """
    if dtype is not Dtype.bf16 or not emulates_bf16(device):
        return module
    print(
        f"{SLOW_BF16}; this model is read in fp32 (dtype=bf16 keeps it in bf16)",
        file=sys.stderr,
        flush=True,
    )
    return module.float()
