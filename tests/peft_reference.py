"""Plain peft on Hugging Face's GPT-J, where a head of a prefix needs a way around a renamed argument."""

from __future__ import annotations

import torch


def run_peft(model, ids: list[int] | torch.Tensor) -> None:
    """Call peft's model (or a bare one) on one text, (T,); hooks of the caller see what its layers say.

    peft 0.21 refuses prefixes for models whose forward has no argument `past_key_values`, which transformers 5.24 calls
    `cache`: heads get peft's own prefix under the new name. `CausalLM` takes the old name, with a warning.
    """
    text = torch.as_tensor(ids)[None]
    config = getattr(model, "active_peft_config", None)
    if (
        config is not None
        and config.peft_type == "PREFIX_TUNING"
        and config.task_type != "CAUSAL_LM"
    ):
        prefix = model.get_prompt(batch_size=1)
        mask = torch.ones(1, prefix.get_seq_length() + text.shape[1])
        model.get_base_model()(input_ids=text, cache=prefix, attention_mask=mask)
    else:
        model(input_ids=text)
