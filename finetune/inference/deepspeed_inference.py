"""DeepSpeed-Inference around Hugging Face's own GPT-J, whose layers it knows. For GPUs only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.files import read_json


def refuse_engine(engine: str, folder: Path, about: dict[str, Any]) -> None:
    """Check that an engine other than torch can take an export.

    Raises:
        UserError: it has another head, or an adapter of virtual tokens, which needs the training
            forward.
    """
    if about["head"] != "lm":
        raise UserError(
            f"engine={engine} serves language models; this export has the head '{about['head']}'",
            "engine",
            "Leave engine out.",
        )
    file = folder / "adapter_config.json"
    if file.is_file() and read_json(file)["peft_type"] in (
        "PROMPT_TUNING",
        "PREFIX_TUNING",
    ):
        raise UserError(
            f"engine={engine} needs weights alone; prompts and prefixes cannot be folded into them",
            "engine",
            "Leave engine out.",
        )


def accelerated(
    module: nn.Module, folder: Path, about: dict[str, Any], device: torch.device
) -> nn.Module:
    """Return the export as `deepspeed.init_inference` serves it.

    The adapter is folded in, and kernels are injected where DeepSpeed has them.

    Args:
        module: the export on this project's GPT-J; its memory is freed.
        about: the export's finetune.json.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM

    dtype = next(module.parameters()).dtype
    module.to("meta")
    torch.cuda.empty_cache()
    adapter = (folder / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(
        about["base"] if adapter else str(folder), dtype=dtype
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    served = deepspeed.init_inference(
        model.to(device),
        dtype=dtype,
        replace_with_kernel_inject=True,
        max_out_tokens=model.config.n_positions,
    )
    return served.module
