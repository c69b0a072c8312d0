"""Reopen an export with plain transformers and peft, away from this project's model, and compare outputs.

    python -m finetune.verify EXPORT_DIR REFERENCE.safetensors

The reference holds ids.N (T,) and outputs.N (T, V) of the trained model. Prints one JSON object. Nothing of this
project's GPT-J is used here: Hugging Face's eager implementation is the judge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOLERANCE = {"float32": (2e-5, 2e-3, 0.999), "bfloat16": (0.05, 0.5, 0.9), "float16": (0.01, 0.1, 0.97)}
"""dtype -> (mean and largest difference over the outputs' standard deviation, least arg-max agreement). The largest one
finds a single wrong row of the head, which the mean over 50400 does not show."""


def open_export(folder: Path):
    """Model in evaluation mode, as a stranger would load it.

    Raises:
        ValueError: tensors are missing from the files or left over: transformers only warns, and draws them at random.
    """
    import torch
    import transformers

    about = json.loads((folder / "finetune.json").read_text(encoding="utf-8"))
    kind = {"lm": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification",
            "qa": "AutoModelForQuestionAnswering"}[about["head"]]
    auto = getattr(transformers, kind)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[about["dtype"]]
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        extra = {"num_labels": about["task"]["num_labels"]} if about["task"].get("num_labels") else {}
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = auto.from_pretrained(base, dtype=dtype, attn_implementation="eager", **extra)
        model = PeftModel.from_pretrained(model, str(folder)).to(dtype)
    else:
        model, told = auto.from_pretrained(str(folder), dtype=dtype, attn_implementation="eager",
                                           output_loading_info=True)
        wrong = {key: sorted(told[key])[:4] for key in ("missing_keys", "unexpected_keys") if told[key]}
        if wrong:
            raise ValueError(f"the files do not hold the model: {wrong}")
    return model.eval(), about["head"]


def outputs(model, head: str, ids):
    """Head outputs at every position of the text, fp32 (T, V): pooling is the task's business, not the export's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = {"lm": "lm_head", "classify": "score", "qa": "qa_outputs"}[head]
    seen: list = []
    hook = getattr(inner, layer).register_forward_hook(lambda module, given, output: seen.append(output[0]))
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.peft_type == "PREFIX_TUNING" and head != "lm":
        _with_prefix(model, inner, ids)
    else:
        model(input_ids=ids[None])
    hook.remove()
    return seen[-1][-len(ids) :].float()  # a prompt's own outputs stand in front


def _with_prefix(model, inner, ids) -> None:
    """Run the base model on the keys and values that peft makes of a prefix.

    peft 0.21 hands them over as `past_key_values`, a name that transformers 5.24 replaced by `cache`: for classification
    and question answering peft's own forward refuses. Everything else here is peft's and transformers'.
    """
    import torch

    prefix = model.get_prompt(batch_size=1)
    mask = torch.ones(1, prefix.get_seq_length() + len(ids), dtype=torch.long)
    positions = torch.arange(prefix.get_seq_length(), mask.shape[1])[None]
    inner(input_ids=ids[None], cache=prefix, attention_mask=mask, position_ids=positions)


def compare(folder: Path, reference: Path) -> dict:
    """Figures over all positions, and whether they are within what the precision explains."""
    import torch
    from safetensors.torch import load_file

    from finetune.peak import emulates_bf16

    torch.set_grad_enabled(False)
    saved = load_file(reference)
    model, head = open_export(folder)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype == "bfloat16" and emulates_bf16(torch.device("cpu")):
        model = model.float()  # the same numbers, two hundred times as fast
    wanted, found = [], []
    for i in range(sum(name.startswith("ids.") for name in saved)):
        wanted.append(saved[f"outputs.{i}"])
        found.append(outputs(model, head, saved[f"ids.{i}"]))
    a, b = torch.cat(wanted), torch.cat(found)
    difference = (a - b).abs()
    mean_limit, max_limit, agreement_limit = TOLERANCE[dtype]
    agreement = _agreement(wanted, found, head)
    spread = a.std().clamp(min=1e-12)
    relative, largest = float(difference.mean() / spread), float(difference.max() / spread)
    finite = bool(torch.isfinite(b).all())
    return {
        "equal": finite and relative <= mean_limit and largest <= max_limit and (agreement >= agreement_limit or relative < 1e-5),
        "max_difference": float(difference.max()), "mean_difference": float(difference.mean()),
        "relative_difference": relative, "argmax_agreement": agreement, "positions": a.shape[0], "dtype": dtype,
        "arithmetic": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tensors": sum(1 for _ in model.parameters()), "parameters": sum(p.numel() for p in model.parameters()),
    }


def _agreement(wanted: list, found: list, head: str) -> float:
    """Share of the decisions that are the same: the likeliest token or label at every position, or, for question
    answering, the likeliest start and end of each text."""
    import torch

    axis = 0 if head == "qa" else -1
    same = [(a.argmax(axis) == b.argmax(axis)).float() for a, b in zip(wanted, found, strict=True)]
    return float(torch.cat([s.flatten() for s in same]).mean())


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
