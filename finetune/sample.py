"""Text from a model in training or from an export: left-padded batches, a key/value cache, a seed of its own."""

from __future__ import annotations

import torch
from torch import nn


def sample_texts(model: nn.Module, tokenizer, prompts: list[str], max_new_tokens: int, seed: int, device: torch.device,
                 **options) -> list[str]:
    """Continuations of `prompts`, without the prompts.

    Args:
        options: generation settings of transformers; by default samples at temperature 0.9.
    """
    settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0} | options
    if tokenizer.pad_token_id is None:  # GPT-J has none; eos serves, behind a mask
        tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    was_training = model.training
    model.eval()
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            out = model.generate(  # type: ignore[operator]
                input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device),
                max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id, **settings)
    finally:
        torch.random.set_rng_state(state)
        model.train(was_training)
    return tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1]:], skip_special_tokens=True)
