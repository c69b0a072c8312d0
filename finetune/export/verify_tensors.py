"""Verification of an export tensor by tensor, for models that do not fit in host memory.

Every tensor is read back from the export's files and compared with the checkpoint's own values or,
where an adapter was merged, with the result of peft's merge into the same matrix. Only a few
tensors are in memory at a time; unlike `finetune.export.verify`, no model is run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.errors import RunFailed
from finetune.export.merge import PREFIX, RunWeights
from finetune.export.write import ADAPTER_FILE
from finetune.gptj.adapters import peft_config
from finetune.gptj.load import DTYPES, Weights
from finetune.gptj.token_rows import fixed_tensors

EPSILON = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest difference relative to the tensor's largest value: half a unit in the last place, and in
fp32 the order of sums."""
CHUNK = 1 << 22
"""Elements compared at once."""


def verify_adapter(
    folder: Path, shell: nn.Module, weights: RunWeights, dtype: str
) -> dict[str, Any]:
    """Check that the adapter's file has every trained parameter, rounded from its master weight.

    Args:
        shell: the model with its adapter; only names and shapes are used.

    Raises:
        RunFailed: names the tensor that is missing or differs.
    """
    written = load_file(folder / ADAPTER_FILE)
    count = len(written)
    trained = {
        name: weights.master(name, tuple(parameter.shape)).to(DTYPES[dtype])
        for name, parameter in shell.named_parameters()
        if parameter.requires_grad
    }
    expected = weights.init.on_base(trained) if weights.init else trained
    expected |= fixed_tensors(shell, DTYPES[dtype])
    for name, wanted in expected.items():
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        # peft's files leave this suffix out.
        key = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        compare(key, written.pop(key, None), wanted, 0.0, folder)
    if written:
        raise RunFailed(
            "the adapter's file holds tensors that were not trained: "
            f"{', '.join(list(written)[:4])}",
            str(folder),
        )
    return {"verified": True, "method": "tensors", "tensors": count}


def verify_model(folder: Path, weights: RunWeights, dtype: str) -> dict[str, Any]:
    """Check that every tensor of a merged or full export is right.

    It must equal the checkpoint's, the base model's, or peft's merge of both.

    Raises:
        RunFailed: names the tensor that is missing or differs.
    """
    written, precision = Weights(folder), DTYPES[dtype]
    worst = 0.0
    for name in weights.shapes:
        wanted, limit = weights.trained(name), 0.0
        if wanted is not None:
            wanted = wanted.to(precision)
        else:
            wanted, limit = peft_merge(weights, name), EPSILON[precision]
        tensor = written[name] if name in written.files else None
        worst = max(worst, compare(name, tensor, wanted, limit, folder))
    extra = sorted(set(written.files) - set(weights.shapes))
    if extra:
        raise RunFailed(
            f"the export holds tensors that the model has not: {', '.join(extra[:4])}", str(folder)
        )
    return {
        "verified": True,
        "method": "tensors",
        "tensors": len(weights.shapes),
        "largest_relative_difference": worst,
    }


def peft_merge(weights: RunWeights, name: str) -> Tensor:
    """Return one tensor of the base, merged with its adapter by peft in fp32 if it has one."""
    import peft  # takes seconds, and only merged models are compared in this way

    base = weights.base(name)
    module, _, leaf = name.rpartition(".")
    prefix = f"{PREFIX}{module}."
    parts = {n.removeprefix(prefix): n for n in weights.names if n.startswith(prefix)}
    if leaf != "weight" or not parts:
        return base
    # peft wraps a model of this layer alone.
    short = module.rpartition(".")[2]
    layer = nn.Linear(base.shape[1], base.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(base.float())
    alone = nn.Module()
    setattr(alone, short, layer)
    settings: Any = peft_config(weights.cfg.adapter, None, [short])
    if short in ("wte", "lm_head"):  # rows of own tokens: the head's are trained as differences
        settings = peft.TrainableTokensConfig(target_modules=[short], token_indices=weights.tokens)
        (part,) = parts.values()
        rows = weights.master(part, (len(weights.tokens), base.shape[1]))
        rows = rows if short == "wte" else rows + base[weights.tokens]
    wrapped = peft.get_peft_model(alone, settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            own = key.removeprefix(f"{PREFIX}{short}.")
            if "trainable_tokens_delta" in key:
                parameter.copy_(rows)
            elif own in parts:
                parameter.copy_(weights.master(parts[own], tuple(parameter.shape)))
    return getattr(wrapped.merge_and_unload(), short).weight.detach()  # type: ignore[operator]


def compare(name: str, tensor: Tensor | None, wanted: Tensor, limit: float, folder: Path) -> float:
    """Return the largest difference relative to the largest wanted value.

    Raises:
        RunFailed: the tensor is missing, has another shape, or differs by more than `limit`.
    """
    if tensor is None or tensor.shape != wanted.shape:
        raise RunFailed(f"the export's tensor {name} is missing or of another shape", str(folder))
    largest = difference = 0.0
    for a, b in zip(tensor.reshape(-1).split(CHUNK), wanted.reshape(-1).split(CHUNK), strict=True):
        largest = max(largest, float(b.float().abs().max()))
        step = float((a.float() - b.float()).abs().max())
        difference = max(difference, step if math.isfinite(step) else math.inf)
    difference /= max(largest, 1e-30)
    if not difference <= limit:
        raise RunFailed(
            f"the export's tensor {name} differs from what was trained by {difference:.3g} of its "
            f"largest value, more than {limit:.3g}",
            str(folder),
        )
    return difference
