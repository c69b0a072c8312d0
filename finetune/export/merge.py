"""Fold an adapter into one base tensor, in fp32: LoRA, rsLoRA, DoRA and (IA)3.

The formulas are those of the adapters' papers, not peft's code, so that reopening the result in peft's company is a
real comparison: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353, (IA)3 arXiv:2205.05638.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune.config import AdapterConfig, Ia3Config, LoraConfig
from finetune.errors import UserError

PREFIX = "base_model.model."


def merged_tensor(name: str, base: Tensor, cfg: AdapterConfig, masters, names: set[str]) -> Tensor:
    """The tensor `name` of the merged model.

    Args:
        base: base weight (out, in) or a bias, in the precision that computed during training.
        masters: checkpoint reader with read(name, "master", start, numel).
        names: parameters that the checkpoint holds.

    Returns:
        fp32 where something was folded in, to be rounded once; else `base` as it is.
    """
    module, _, leaf = name.rpartition(".")
    head = f"{PREFIX}{module}.modules_to_save.default.{leaf}"
    if head in names:
        return masters.read(head, "master", 0, base.numel()).view(base.shape)
    if (
        leaf != "weight"
    ):  # (IA)3 scales a bias only where it scales outputs: GPT-J's attention has no biases
        return base
    match cfg:
        case LoraConfig():
            return _lora(f"{PREFIX}{module}", base, cfg, masters, names)
        case Ia3Config():
            return _ia3(f"{PREFIX}{module}", base, masters, names)
        case _:
            return base


def check_mergeable(cfg: AdapterConfig) -> None:
    """
    Raises:
        UserError: this kind of adapter has no equivalent weights (prompt and prefix tuning).
    """
    if not isinstance(cfg, (LoraConfig, Ia3Config)):
        raise UserError(
            "prompts and prefixes are inputs, not weights: they cannot be merged",
            "kind",
            "Use kind=adapter.",
        )


def _lora(module: str, base: Tensor, cfg: LoraConfig, masters, names: set[str]) -> Tensor:
    if f"{module}.lora_A.default.weight" not in names:
        return base
    out, width = base.shape
    a = masters.read(f"{module}.lora_A.default.weight", "master", 0, cfg.rank * width).view(
        cfg.rank, width
    )
    b = masters.read(f"{module}.lora_B.default.weight", "master", 0, out * cfg.rank).view(
        out, cfg.rank
    )
    scale = cfg.alpha / (math.sqrt(cfg.rank) if cfg.rslora else cfg.rank)
    merged = base.to(torch.float32, copy=True).addmm_(
        b, a, alpha=scale
    )  # in place: one such tensor at a time
    if not cfg.dora:
        return merged
    magnitude = masters.read(f"{module}.lora_magnitude_vector.default.weight", "master", 0, out)
    return merged.mul_((magnitude / merged.norm(dim=1))[:, None])


def _ia3(module: str, base: Tensor, masters, names: set[str]) -> Tensor:
    key = f"{module}.ia3_l.default"
    if key not in names:
        return base
    rows, columns = base.shape
    if module.rpartition(".")[2].startswith("fc_"):
        return base.float() * masters.read(key, "master", 0, columns)[None]
    return base.float() * masters.read(key, "master", 0, rows)[:, None]
