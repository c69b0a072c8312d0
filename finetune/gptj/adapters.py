"""Attach an adapter by peft, count what is trained, and split parameters for weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from finetune.config import (
    AdapterConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from finetune.gptj.lora import fuse
from finetune.gptj.prompt_tuning import flat
from finetune.planning import parameter_groups as grouping
from finetune.planning.shape import target_modules

PEFT_TASKS = {"lm": "CAUSAL_LM", "classify": "SEQ_CLS", "qa": "QUESTION_ANS"}
HEAD_MODULES = {"lm": None, "classify": ["score"], "qa": ["qa_outputs"]}


def attach(model: nn.Module, cfg: AdapterConfig, head: str, base: str, seed: int) -> nn.Module:
    """The model with what is trained marked by requires_grad: itself, or wrapped by peft.

    Args:
        base: path or hub id for adapter_config.json, so that others find the base model.
        seed: the adapter's random weights depend on it alone.
    """
    if isinstance(cfg, FullConfig):
        return model
    import peft

    torch.manual_seed(seed)
    model.name_or_path = base
    model.config._name_or_path = base  # type: ignore[union-attr]
    with _peft_gathers(model):
        wrapped = peft.get_peft_model(model, peft_config(cfg, head), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    dtype = next(p for p in model.parameters() if not p.requires_grad).dtype
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    fuse(wrapped)
    return flat(wrapped)


@contextmanager
def _peft_gathers(model: nn.Module) -> Iterator[None]:
    """peft gathers the partitioned weights that it reads (DoRA's norms, prompts from words) only if told so here."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    known = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}}
    )  # held only weakly by transformers
    try:
        yield
    finally:
        del known
        unset_hf_deepspeed_config()


def peft_config(cfg: AdapterConfig, head: str | None, targets: list[str] | None = None):
    """peft's form of an adapter section.

    Args:
        head: lm, classify or qa; None for a bare module.
        targets: names of the adapted modules; None: those of `cfg`.
    """
    import peft

    task, heads = (PEFT_TASKS[head], HEAD_MODULES[head]) if head else (None, None)
    match cfg:
        case LoraConfig():
            return peft.LoraConfig(
                task_type=task,
                r=cfg.rank,
                lora_alpha=cfg.alpha,
                lora_dropout=cfg.dropout,  # type: ignore[arg-type]
                target_modules=targets or target_modules(cfg.targets),
                use_rslora=cfg.rslora,
                use_dora=cfg.dora,
                modules_to_save=heads,
            )
        case Ia3Config():
            names = targets or target_modules(cfg.targets)
            return peft.IA3Config(
                task_type=task,
                target_modules=names,
                modules_to_save=heads,
                feedforward_modules=[n for n in names if n.startswith("fc_")],
            )
        case PromptConfig():
            # The embeddings of random words: from noise, prompts learn far more slowly (arXiv:2104.08691, section 3.2).
            return peft.PromptTuningConfig(
                task_type=task,
                num_virtual_tokens=cfg.virtual_tokens,  # type: ignore[arg-type]
                prompt_tuning_init="SAMPLE_VOCAB",
            )
        case PrefixConfig():
            return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=cfg.virtual_tokens)  # type: ignore[arg-type]
        case _:
            raise AssertionError(type(cfg))


def count(model: nn.Module) -> dict[str, int]:
    """Parameters in all and trained, also when ZeRO-3 has partitioned them."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return {
        "total": sum(n for n, _ in sizes),
        "trainable": sum(n for n, trained in sizes if trained),
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay; biases, norms and other vectors without; each cut as `parameter_groups` says."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [
        {"params": [kind[i] for i in run], "weight_decay": decay}
        for kind, decay in ((matrices, weight_decay), (vectors, 0.0))
        for run in grouping.cut([int(getattr(p, "ds_numel", p.numel())) for p in kind])
    ]


def plain_name(name: str) -> str:
    """Parameter name without what wrappers put in front."""
    return name.removeprefix("module.")
