"""Adapters: attach one by peft, count trained parameters, and split them for weight decay.

peft's own `forward` passes on arguments of padded batches (masks, caches), which the training model
does not take, and puts virtual tokens in front of a padded row, which in a flat batch is the first
document only. Here (`flat`) the arguments go straight to the wrapped model, and virtual tokens
enter in front of every document (`prompt_tuning.py`). Parameters and files stay peft's, so an
adapter trained here opens in plain transformers and peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from math import prod, sqrt
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from finetune.config import (
    HEADS,
    AdapterConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from finetune.gptj.lora import fuse
from finetune.gptj.prompt_tuning import Virtual
from finetune.planning import parameter_groups as grouping
from finetune.planning.shape import adapted_layers, target_modules


def attach(
    model: nn.Module,
    cfg: AdapterConfig,
    head: str,
    base: str,
    seed: int,
    tokens: Sequence[int] = (),
) -> nn.Module:
    """Return the model with the trained parameters marked by requires_grad, wrapped by peft.

    A full fine-tune returns the model itself.

    Args:
        base: path or hub id for adapter_config.json, so that others find the base model.
        seed: the adapter's random weights depend on it alone.
        tokens: ids of the task's own tokens, whose rows are trained beside a LoRA.
    """
    if isinstance(cfg, FullConfig):
        return model
    import peft

    from finetune.gptj import token_rows

    torch.manual_seed(seed)
    model.name_or_path = base
    model.config._name_or_path = base  # type: ignore[union-attr]
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if partitioned:
        # Only with this config does peft gather the partitioned weights that it reads: DoRA's
        # norms, prompts from words. transformers holds it weakly, so it must stay alive.
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        zero_3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        with mock.patch.object(
            token_rows.TrainableTokensLayer, "_collect_token_weights", token_rows.gathered_rows
        ):
            settings: Any = peft_config(cfg, head, tokens=tokens)
            wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    finally:
        if partitioned:
            del zero_3
            unset_hf_deepspeed_config()
    token_rows.initialise(wrapped, tokens)
    dtype = next(p for p in model.parameters() if not p.requires_grad).dtype
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    fuse(wrapped)
    return flat(wrapped)


def peft_config(
    cfg: AdapterConfig,
    head: str | None,
    targets: list[str] | None = None,
    tokens: Sequence[int] = (),
):
    """Convert an adapter section to peft's configuration.

    Args:
        head: lm, classify or qa; None for a bare module.
        targets: names of the adapted modules; None: those of `cfg`.
        tokens: ids of the task's own tokens; see `token_rows` for the form of their rows.
    """
    import peft

    task = HEADS[head].peft_task if head else None
    heads = [HEADS[head].module] if head in ("classify", "qa") else None
    match cfg:
        case LoraConfig():
            layers = adapted_layers(cfg.layers)
            names = targets or target_modules(cfg.targets)
            rows: dict[str, Any] = {}
            if tokens and "wte" not in cfg.modules_to_save:
                rows["trainable_token_indices"] = {"wte": list(tokens)}
            if tokens and head == "lm" and "lm_head" not in cfg.modules_to_save:
                names = [*names, "lm_head"]
                rows["rank_pattern"] = {"lm_head": len(tokens)}
                # A scale of 1.
                alpha = sqrt(len(tokens)) if cfg.rslora else float(len(tokens))
                rows["alpha_pattern"] = {"lm_head": alpha}
            return peft.LoraConfig(
                task_type=task,
                layers_to_transform=layers,
                layers_pattern="h" if layers else None,
                r=cfg.rank,
                lora_alpha=cfg.alpha,
                lora_dropout=cfg.dropout,  # type: ignore[arg-type]
                target_modules=names,
                use_rslora=cfg.rslora,
                use_dora=cfg.dora,
                modules_to_save=[*(heads or ()), *cfg.modules_to_save] or None,
                **rows,
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


class FlatAdapter:
    """Mixed into the peft model's class in front of peft's own `forward`."""

    def forward(self, *args: Any, adapter: bool = True, **inputs: Any) -> Any:
        """Call the model; with `adapter` false, the base model alone and without dropout."""
        with nullcontext() if adapter else _switched_off(self):  # type: ignore[arg-type]
            return self.base_model(*args, **inputs)  # type: ignore[attr-defined]


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """Let peft's layers compute what the base model's do.

    peft's own `disable_adapter` also clears requires_grad, which DeepSpeed has read already.
    """
    layers = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    was_training = model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]
        model.train(was_training)


class FlatPrompts(FlatAdapter):
    """The same for prompt and prefix tuning."""

    _saving: dict[str, Tensor] | None = None

    def forward(self, *args: Any, adapter: bool = True, **inputs: Any) -> Any:
        """Call the model with the trained rows as virtual tokens."""
        if not adapter:
            return super().forward(*args, adapter=False, **inputs)
        name, config = self.active_adapter, self.active_peft_config  # type: ignore[attr-defined]
        # Read through the encoder's forward, where ZeRO-3 gathers them.
        encoder = self.prompt_encoder[name]  # type: ignore[attr-defined]
        rows = encoder(self.prompt_tokens[name].to(encoder.embedding.weight.device))  # type: ignore[attr-defined]
        if config.peft_type.value == "PROMPT_TUNING":
            virtual = Virtual(prompt=rows)
        else:
            size = config.token_dim // config.num_attention_heads
            split = rows.view(len(rows), config.num_layers, 2, config.num_attention_heads, size)
            virtual = Virtual(prefix=split.permute(1, 2, 0, 3, 4))
        return super().forward(*args, virtual=virtual, **inputs)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        self._saving = options.get("state_dict")
        try:
            super().save_pretrained(*args, **options)  # type: ignore[misc]
        finally:
            self._saving = None

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return the rows of the state dict that is being saved.

        peft computes them, which at ZeRO-3 would wait for the other ranks forever.
        """
        if self._saving is None:
            return super().get_prompt_embedding_to_save(adapter_name)  # type: ignore[misc]
        return self._saving[f"prompt_encoder.{adapter_name}.embedding.weight"].detach().cpu()


def flat(model: nn.Module) -> nn.Module:
    """Make a peft model take flat batches from now on, and return it."""
    if not isinstance(model, FlatAdapter):
        from finetune.gptj.token_rows import connect

        connect(model)
        model.__class__ = _flat_class(type(model), model.active_peft_config.is_prompt_learning)  # type: ignore[union-attr]
    return model


@lru_cache(None)
def _flat_class(base: type, prompts: bool) -> type:
    return type(f"Flat{base.__name__}", (FlatPrompts if prompts else FlatAdapter, base), {})


def count(model: nn.Module) -> dict[str, int]:
    """Count all parameters and the trained ones, also if they are partitioned or quantised."""
    packed = {id(m.weight): prod(m.shape) for m in model.modules() if hasattr(m, "pack")}
    sizes = [
        (packed.get(id(p)) or int(getattr(p, "ds_numel", p.numel())), p.requires_grad)
        for p in model.parameters()
    ]
    return {
        "total": sum(n for n, _ in sizes),
        "trainable": sum(n for n, trained in sizes if trained),
    }


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Return the optimizer's groups, as `planning.parameter_groups` makes them.

    Each holds `params`, `weight_decay` and `lr_ratio`, the factor of its learning rate.

    Args:
        lr_ratio: that of LoRA's B matrices.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    shapes = [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]
    return [
        {
            "params": [named[i][1] for i in group.indices],
            "weight_decay": weight_decay if group.decays else 0.0,
            "lr_ratio": group.lr_ratio,
        }
        for group in grouping.split(shapes, lr_ratio)
    ]
