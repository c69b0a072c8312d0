"""The trained tensors in transformers' own GPTJForCausalLM, which generates.

transformers 5.24 computes GPT-J with SDPA, has static and dynamic key/value caches and compiles whole, so inference
needs no class of ours. The tensors are handed over, not copied: our loader has checked them all by then.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig, GPTJForCausalLM
from transformers.models.gptj.modeling_gptj import GPTJRotaryEmbedding

from finetune.gptj.model import CausalLM, copy_config


def takes_virtual_tokens(module: nn.Module) -> bool:
    """Tell prompt and prefix adapters, whose trained rows stand in front of the text.

    peft 0.21 injects them under the argument name that transformers 5.24 gave up: its `generate` then leaves them out
    without a word. Such a model generates through the training forward (`finetune.inference.sample`).
    """
    config = getattr(module, "active_peft_config", None)
    return config is not None and config.is_prompt_learning


def to_library_model(module: nn.Module) -> nn.Module:
    """Return transformers' model, in evaluation mode, around the tensors of a `CausalLM`, its adapter by peft included.

    `module` shares its tensors with the result and must not be trained any more. Module names are the same in both, so
    every name must match.
    """
    base = module.get_base_model() if hasattr(module, "peft_config") else module  # type: ignore[operator]
    assert isinstance(base, CausalLM), type(base)
    config = copy_config(base.config)
    config.use_cache = True
    config.tie_word_embeddings = False  # both tensors are there
    with torch.device("meta"):
        model: nn.Module = GPTJForCausalLM._from_config(config, attn_implementation="sdpa")
        # The position table is no parameter and stays in fp32, as transformers loads it.
    device = next(base.parameters()).device
    with torch.device(device):
        model.transformer.rotary_emb = GPTJRotaryEmbedding(config)  # type: ignore[union-attr]
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    if module is not base:
        import peft

        model = peft.PeftModel(
            model,
            module.active_peft_config,
            low_cpu_mem_usage=True,  # type: ignore[arg-type]
            autocast_adapter_dtype=False,
        )
    model.load_state_dict(module.state_dict(), assign=True)
    return model.eval()
