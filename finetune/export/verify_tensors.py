"""Verification of an export tensor by tensor, for models that do not fit in host memory.

Every tensor is read back from the export's files and compared with the checkpoint's own values or,
where an adapter was merged, with the result of peft's merge into the same matrix. Only a few
tensors are in memory at a time; unlike `finetune.export.write.verify`, no model is run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.checkpointing.format import StateReader
from finetune.config import AdapterConfig, Config, FullConfig, Init
from finetune.errors import RunFailed
from finetune.export.merge import PREFIX
from finetune.gptj.adapters import peft_config
from finetune.gptj.load import DTYPES, Weights, draw, local_folder, meta_model

EPSILON = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest difference relative to the tensor's largest value: half a unit in the last place, and in fp32 the order of
sums."""
CHUNK = 1 << 22
"""Elements compared at once."""


def verify_adapter(folder: Path, shell: nn.Module, masters, dtype: torch.dtype) -> dict[str, Any]:
    """Check that the adapter's file has every trained parameter, rounded from its master weight.

    Args:
        shell: the model with its adapter; only names and shapes are used.

    Raises:
        RunFailed: names the tensor that is missing or differs.
    """
    written = load_file(folder / "adapter_model.safetensors")
    count = len(written)
    for name, parameter in shell.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        key = key.replace(
            "lora_magnitude_vector.weight", "lora_magnitude_vector"
        )  # not in peft's files
        wanted = masters.read(name, "master", 0, parameter.numel()).view(parameter.shape).to(dtype)
        _compare(key, written.pop(key, None), wanted, 0.0, folder)
    if written:
        raise RunFailed(
            f"the adapter's file holds tensors that were not trained: {', '.join(list(written)[:4])}",
            str(folder),
        )
    return {"verified": True, "method": "tensors", "tensors": count}


def verify_model(folder: Path, cfg: Config, config, info, checkpoint: Path) -> dict[str, Any]:
    """Check that every tensor of a merged or full export is right.

    It must equal the checkpoint's, the base model's, or peft's merge of both.

    Args:
        config: the trained model's GPTJConfig.
        info: the export's ExportInfo.

    Raises:
        RunFailed: names the tensor that is missing or differs.
    """
    masters, written, dtype = StateReader(checkpoint), Weights(folder), DTYPES[info.dtype]
    names = set(masters.names())
    source = Weights(local_folder(cfg.model)) if cfg.model.init is Init.pretrained else None
    parameters = dict(meta_model(config, info.head).named_parameters())
    worst = 0.0
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        trained = name if isinstance(cfg.adapter, FullConfig) else _head_key(name)
        if trained in names:
            wanted, limit = (
                masters.read(trained, "master", 0, parameter.numel()).view(shape).to(dtype),
                0.0,
            )
        else:
            known = source is not None and name in source.files
            base = (
                source[name]
                if source is not None and known
                else draw(name, shape, config, cfg.seed)
            )
            base = base.to(DTYPES[cfg.model.dtype.value])
            wanted, limit = _folded(name, base, cfg.adapter, masters, names), EPSILON[dtype]
        found = written[name] if name in written.files else None
        worst = max(worst, _compare(name, found, wanted, limit, folder))
    extra = set(written.files) - set(parameters)
    if extra:
        raise RunFailed(
            f"the export holds tensors that the model has not: {', '.join(sorted(extra)[:4])}",
            str(folder),
        )
    return {
        "verified": True,
        "method": "tensors",
        "tensors": len(parameters),
        "largest_relative_difference": worst,
    }


def _head_key(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.modules_to_save.default.{leaf}"


def _folded(name: str, base: Tensor, cfg: AdapterConfig, masters, names: set[str]) -> Tensor:
    """Merge one matrix and its adapter with peft in fp32."""
    module, _, leaf = name.rpartition(".")
    mine = {
        n.removeprefix(f"{PREFIX}{module}."): n for n in names if n.startswith(f"{PREFIX}{module}.")
    }
    if leaf != "weight" or not mine:
        return base
    short = module.rpartition(".")[2]
    alone = nn.Module()
    layer = nn.Linear(base.shape[1], base.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(base.float())
    setattr(alone, short, layer)
    wrapped = peft.get_peft_model(alone, peft_config(cfg, None, [short]))  # type: ignore[arg-type]
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            own = key.removeprefix(f"{PREFIX}{short}.")
            if own in mine:
                parameter.copy_(
                    masters.read(mine[own], "master", 0, parameter.numel()).view(parameter.shape)
                )
    return getattr(wrapped.merge_and_unload(), short).weight.detach()  # type: ignore[operator]


def _compare(name: str, found: Tensor | None, wanted: Tensor, limit: float, folder: Path) -> float:
    """Return the largest difference relative to the largest wanted value."""
    if found is None or found.shape != wanted.shape:
        raise RunFailed(f"the export's tensor {name} is missing or of another shape", str(folder))
    largest = difference = 0.0
    for a, b in zip(found.reshape(-1).split(CHUNK), wanted.reshape(-1).split(CHUNK), strict=True):
        largest = max(largest, float(b.float().abs().max()))
        step = float((a.float() - b.float()).abs().max())
        difference = max(difference, step if math.isfinite(step) else math.inf)
    difference /= max(largest, 1e-30)
    if not difference <= limit:
        raise RunFailed(
            f"the export's tensor {name} differs from what was trained by {difference:.3g} of its largest "
            f"value, more than {limit:.3g}",
            str(folder),
        )
    return difference
