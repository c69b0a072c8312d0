"""Going on from an adapter that was trained before (`adapter.start`): find it, compare it, load it.

The adapter is an export of this project, the one of a finished run, or a folder that plain peft
wrote. Its kind and sizes must be those of the config, and its base the model of the config. Its
weights replace the freshly drawn ones; optimizer states and steps begin anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config import (
    AdapterConfig,
    Config,
    Ia3Config,
    Init,
    LoraConfig,
    PeftConfig,
    adapter_head,
    own_tokens,
)
from finetune.errors import UserError, command, setting
from finetune.files import read_object
from finetune.gptj.load import Place, local_folder, open_shard, same_base
from finetune.planning.shape import LINEARS, WHOLE_MODULES, adapted_layers, target_modules

ADAPTER_JSON, ABOUT = "adapter_config.json", "finetune.json"
KINDS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
"""peft's name of a kind -> ours."""
UNSUPPORTED = ("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices")
"""Settings of peft's LoRA that training here does not have."""
SAVED_NAMES = (
    (r"^prompt_encoder\.default\.embedding\.weight$", "prompt_embeddings"),
    (r"\.lora_magnitude_vector\.default\.weight$", ".lora_magnitude_vector"),
    (r"\.modules_to_save\.default\.", "."),
    (r"\.default(?=\.|$)", ""),
)
"""Parameter names of a peft model -> names in its files, as patterns."""


def start_folder(start: str) -> Path:
    """Return the folder with the adapter that `adapter.start` names.

    Raises:
        UserError: there is no adapter.
    """
    path = Path(start).expanduser()
    for folder in (path, path / "export"):
        if (folder / ADAPTER_JSON).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        words = ["python", "launch/export.py", setting("run", path), "kind=adapter"]
        remedy = f"Export the run first: {command(words)}"
    elif any((folder / "config.json").is_file() for folder in (path, path / "export")):
        remedy = f"To train a whole model further: {setting('model.path', path)}"
    else:
        remedy = "Give a run, its export, or a folder that peft's save_pretrained wrote."
    raise UserError(
        f"{start} holds no adapter: there is no {ADAPTER_JSON}", "adapter.start", remedy
    )


def start_task(adapter: AdapterConfig) -> dict[str, Any] | None:
    """Return `Task.describe()` of the adapter to go on from; None if there is none, or it is peft's."""
    if not isinstance(adapter, PeftConfig) or not adapter.start:
        return None
    return read_object(start_folder(adapter.start) / ABOUT).get("task")


def start_problems(cfg: Config) -> Iterator[UserError]:
    """Yield why the adapter of `adapter.start` cannot be trained on by this config."""
    if not isinstance(cfg.adapter, PeftConfig) or not cfg.adapter.start:
        return
    try:
        folder = start_folder(cfg.adapter.start)
        values = read_object(folder / ADAPTER_JSON)
        head = adapter_head(values, str(folder / ADAPTER_JSON)).name
    except UserError as error:
        yield error
        return
    if head != cfg.task.head:
        yield UserError(
            f"the adapter in {folder} was trained with the head '{head}', this task trains "
            f"'{cfg.task.head}'",
            "adapter.start",
            "Choose the task that it was trained for.",
        )
    tokens = own_tokens(cfg.task) if isinstance(cfg.adapter, LoraConfig) else []
    theirs = list((read_object(folder / ABOUT).get("task") or {}).get("tokens") or {})
    if theirs != tokens:
        listed = ", ".join(theirs) or "none"
        yield UserError(
            f"the adapter in {folder} has trained the tokens {listed} (here "
            f"{', '.join(tokens) or 'none'})",
            "adapter.start",
            f"Add {setting('task.tokens', '[' + ','.join(theirs) + ']')}, and the task.template "
            "that it was trained with.",
        )
    elif tokens:
        values = without_tokens(values)
    yield from _different_kind(cfg.adapter, values, folder)
    yield from _different_base(cfg, head, folder)


def _different_kind(cfg: PeftConfig, values: dict[str, Any], folder: Path) -> Iterator[UserError]:
    """Compare kind, rank, scale and targets with the values of adapter_config.json."""
    kind, ours = KINDS.get(str(values.get("peft_type"))), _settings(cfg)
    if kind != ours["kind"]:
        yield UserError(
            f"the adapter in {folder} is of kind {kind or values.get('peft_type')}, this run "
            f"trains {ours['kind']}",
            "adapter.start",
            f"Try adapter={kind}." if kind else f"Choose from {', '.join(KINDS.values())}.",
        )
        return
    unsupported = [key for key in UNSUPPORTED if values.get(key)]
    if values.get("bias", "none") != "none" or values.get("lora_bias"):
        unsupported.append("bias")
    if unsupported or not isinstance(values.get("target_modules") or [], list):
        yield UserError(
            f"the adapter in {folder} was made with "
            f"{', '.join(unsupported) or 'a pattern of target_modules'}, "
            "which training here does not have",
            "adapter.start",
            "Merge it into its base and train the result: peft's merge_and_unload(), then "
            "model.path=DIR.",
        )
        return
    theirs = _saved_settings(kind, values)
    words = [f"adapter.{key}={_word(theirs[key])}" for key in theirs if theirs[key] != ours[key]]
    if words:
        listed = ", ".join(
            f"{key} {_word(theirs[key])} (here {_word(ours[key])})"
            for key in theirs
            if theirs[key] != ours[key]
        )
        yield UserError(
            f"the adapter in {folder} has {listed}", "adapter.start", f"Add {command(words)}"
        )


def without_tokens(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an adapter_config.json without those of the trained tokens' rows."""
    targets = [name for name in values.get("target_modules") or () if name != "lm_head"]
    rows = ("rank_pattern", "alpha_pattern", "trainable_token_indices")
    return values | {"target_modules": targets} | dict.fromkeys(rows)


def _settings(cfg: PeftConfig) -> dict[str, Any]:
    """Return kind, sizes and targets of an adapter section, with comparable values."""
    names = {"rank", "alpha", "rslora", "dora", "virtual_tokens"}
    found = {key: value for key, value in vars(cfg).items() if key in names}
    if isinstance(cfg, (LoraConfig, Ia3Config)):
        found["targets"] = sorted(target_modules(cfg.targets), key=LINEARS.index)
    if isinstance(cfg, LoraConfig):
        found["layers"] = adapted_layers(cfg.layers)
        found["modules_to_save"] = sorted(cfg.modules_to_save)
    return {"kind": type(cfg).__name__.removesuffix("Config").lower(), **found}


def _saved_settings(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an adapter_config.json under the names of `_settings`."""
    if kind in ("prompt", "prefix"):
        return {"virtual_tokens": values.get("num_virtual_tokens")}
    targets = values.get("target_modules") or []
    known = sorted(targets, key=lambda name: LINEARS.index(name) if name in LINEARS else len(name))
    if kind == "ia3":
        return {"targets": known}
    layers = values.get("layers_to_transform")
    return {
        "rank": values.get("r"),
        "alpha": float(values.get("lora_alpha") or 0),
        "rslora": bool(values.get("use_rslora")),
        "dora": bool(values.get("use_dora")),
        "targets": known,
        "layers": sorted([layers] if isinstance(layers, int) else layers) if layers else None,
        "modules_to_save": sorted(set(values.get("modules_to_save") or ()) & set(WHOLE_MODULES)),
    }


def _word(value: Any) -> str:
    """Return a value as it is typed on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if value is None:
        return "null"
    short = f"{value:g}" if isinstance(value, float) else str(value).lower()
    return repr(value) if isinstance(value, float) and float(short) != value else short


def _different_base(cfg: Config, head: str, folder: Path) -> Iterator[UserError]:
    """Compare the model with the weights that the adapter was trained on, where it records them."""
    about = read_object(folder / ABOUT)
    record = about.get("base_weights")
    if not record:
        return
    random = cfg.model.init is Init.random
    try:
        same = not random and same_base(local_folder(cfg.model, download=False), head, record)
    except UserError:
        return  # the model is missing, which is reported by itself
    if not same:
        drawn = "model.init=random draws other weights than" if random else "these are not"
        yield UserError(
            f"{drawn} the weights that the adapter in {folder} was trained on",
            "model.path",
            f"Try {setting('model.path', about.get('base'))} model.init=pretrained",
        )


def load_start(model: nn.Module, folder: Path, place: Place) -> None:
    """Replace the fresh weights of a peft model by those of the adapter in `folder`.

    Args:
        place: writes a tensor into a parameter that ZeRO-3 has partitioned (collective).

    Raises:
        UserError: a tensor is missing in the file, or has another shape.
    """
    files = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    file = next((file for file in files if file.is_file()), files[0])
    tensors = open_shard(file)
    stored = set(tensors.keys())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        saved = saved_name(name)
        if saved not in stored:
            raise UserError(f"the tensor {saved} is missing", str(file), "Export it again.")
        value = tensors[saved] if isinstance(tensors, dict) else tensors.get_tensor(saved)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(value.shape) != shape:
            raise UserError(
                f"{saved} is {tuple(value.shape)}, this run trains {shape}",
                str(file),
                "Train it with the settings and the labels that it was made with.",
            )
        write_parameter(parameter, value, place)


def write_parameter(parameter: nn.Parameter, value: Tensor, place: Place) -> None:
    """Write a host tensor into a parameter, by `place` if ZeRO-3 has partitioned it (collective)."""
    value = value.to(parameter.dtype)
    if hasattr(parameter, "ds_id"):
        place(parameter, value)
    else:
        with torch.no_grad():
            parameter.copy_(value)


def saved_name(name: str) -> str:
    """Return the name under which peft saves a parameter of its model."""
    for pattern, replacement in SAVED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
