"""Reopen an export with plain transformers and peft, away from this project's model, and compare outputs.

    python -m finetune.export.verify EXPORT_DIR REFERENCE.safetensors

The reference holds ids.N (T,) and outputs.N (T, V) of the trained model, each text alone. Texts called short_ids.N, of
unequal lengths, are also read as one batch that the export's own tokenizer pads, on the right and on the left. Prints
one JSON object. Nothing of this project's GPT-J is used here: Hugging Face's eager implementation is the judge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from finetune.config import HEADS, Dtype
from finetune.files import read_json

TOLERANCE = {
    "float32": (2e-5, 2e-3, 0.999),
    "bfloat16": (0.05, 0.5, 0.9),
    "float16": (0.01, 0.1, 0.97),
}
"""dtype -> (mean and largest difference over the outputs' standard deviation, least arg-max agreement). The largest one
finds a single wrong row of the head, which the mean over 50400 does not show."""


def open_export(folder: Path):
    """Model in evaluation mode, as a stranger would load it.

    Raises:
        ValueError: tensors are missing from the files or left over: transformers only warns, and draws them at random.
    """
    import torch
    import transformers

    about = read_json(folder / "finetune.json")
    auto = getattr(transformers, HEADS[about["head"]].auto_class)
    dtype = getattr(torch, Dtype(about["dtype"]).torch_name)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        values = read_json(folder / "adapter_config.json")
        quantized = quantization(about, dtype)
        # A head needs the export's config: number of labels, and the padding token.
        extra = (
            {"config": transformers.AutoConfig.from_pretrained(str(folder))}
            if (folder / "config.json").exists()
            else {}
        )
        model = auto.from_pretrained(
            values["base_model_name_or_path"],
            revision=values.get("revision") or "main",
            dtype=dtype,
            attn_implementation="eager",
            **extra,
            **quantized,
        )
        if quantized:
            dequantize(model)
        model = PeftModel.from_pretrained(model, str(folder))
        for (
            parameter
        ) in model.parameters():  # not `to`, which transformers refuses for quantised models
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    else:
        model, told = auto.from_pretrained(
            str(folder), dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        wrong = {
            key: sorted(told[key])[:4] for key in ("missing_keys", "unexpected_keys") if told[key]
        }
        if wrong:
            raise ValueError(f"the files do not hold the model: {wrong}")
    return model.eval(), about["head"]


def quantization(about: dict, dtype) -> dict:
    """Return what `from_pretrained` needs to quantise an adapter's base as it was in training."""
    from transformers import BitsAndBytesConfig

    skipped = {"llm_int8_skip_modules": [head.module for head in HEADS.values()]}
    kind = about.get("quantize", "none")
    if kind == "none":
        return {}
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True, **skipped)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=about["quantize_double"],
            bnb_4bit_compute_dtype=dtype,
            **skipped,
        )
    return {"quantization_config": settings, "device_map": "cpu"}


def dequantize(model) -> None:
    """Replace bitsandbytes' layers by plain ones with the values that it quantised weights to.

    Its own products round more, as training does not: activations to 8 bits with int8, scales to
    bf16 with nf4 on CPUs. As one row, because its CPU kernel takes other blocks' scales where the
    columns are no multiple of a block.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in list(model.named_modules()):
        if not isinstance(module, (Linear4bit, Linear8bitLt)):
            continue
        plain = torch.nn.Linear(module.in_features, module.out_features, device="meta")
        weight = module.weight
        if isinstance(module, Linear4bit):
            state = weight.quant_state
            state.shape = torch.Size([plain.weight.numel()])
            values = dequantize_4bit(weight.data, state).view(plain.weight.shape)
        else:
            values = (weight.data * (weight.SCB / 127)[:, None]).to(model.dtype)
        plain.weight, plain.bias = torch.nn.Parameter(values), module.bias
        model.set_submodule(name, plain)


SIDES = {"PROMPT_TUNING": (), "PREFIX_TUNING": ("right",)}
"""Sides that batches may be padded on where an adapter has virtual tokens: padding must not come between those and the
text, and a classifier cannot pool behind a prompt at all (see `finetune.export.write.write`). All other exports: both."""
PADDED_MEAN = 3
"""A padded batch has a few numbers where the texts have thousands: its mean difference may be as many times larger."""


def outputs(model, head: str, ids):
    """Head outputs at every position of the text, fp32 (T, V): pooling is the task's business, not the export's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: list = []
    hook = getattr(inner, HEADS[head].module).register_forward_hook(
        lambda module, given, output: seen.append(output[0])
    )
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

    from finetune.training.mfu import emulates_bf16

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
    padded = padded_difference(folder, model, head, saved)
    a, b = torch.cat(wanted), torch.cat(found)
    difference = (a - b).abs()
    mean_limit, max_limit, agreement_limit = TOLERANCE[dtype]
    agreement = _agreement(wanted, found, head)
    spread = a.std().clamp(min=1e-12)
    relative, largest = float(difference.mean() / spread), float(difference.max() / spread)
    finite = bool(torch.isfinite(b).all())
    fits = all(
        mean / float(spread) <= PADDED_MEAN * mean_limit and most / float(spread) <= max_limit
        for mean, most in padded.values()
    )
    return {
        "equal": finite
        and relative <= mean_limit
        and largest <= max_limit
        and fits
        and (agreement >= agreement_limit or relative < 1e-5),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "relative_difference": relative,
        "argmax_agreement": agreement,
        "positions": a.shape[0],
        "dtype": dtype,
        "arithmetic": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tensors": sum(1 for _ in model.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "padded_max_difference": {side: most for side, (_, most) in padded.items()},
    }


def padded_difference(
    folder: Path, model, head: str, saved: dict
) -> dict[str, tuple[float, float]]:
    """Mean and largest difference of the short texts in a padded batch from each alone, by the side that is padded.

    A classifier is compared in what it returns, which transformers pools by itself; the other heads at every token.

    Raises:
        ValueError: the export's tokenizer does not write the eos that training wrote.
    """
    import torch
    from transformers import AutoTokenizer

    count = sum(name.startswith("short_ids.") for name in saved)
    rows, alone = (
        [saved[f"short_{kind}.{i}"] for i in range(count)] for kind in ("ids", "outputs")
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if head != "lm":
        _check_eos(tokenizer, [ids.tolist() for ids in rows])
    file = folder / "adapter_config.json"
    kind = read_json(file)["peft_type"] if file.exists() else ""
    found = {}
    sides = SIDES.get(kind, ("right", "left"))
    if tokenizer.pad_token_id is None or count < 2 or (kind == "PREFIX_TUNING" and head != "lm"):
        sides = ()  # for a prefix before another head see `_with_prefix`
    for side in sides:
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": [ids.tolist() for ids in rows]}, return_tensors="pt")
        result = model(**batch)
        if head == "classify":
            differences = [result.logits[i].float() - alone[i][-1] for i in range(count)]
        else:
            values = (
                result.logits
                if head == "lm"
                else torch.stack([result.start_logits, result.end_logits], -1)
            )
            real = batch["attention_mask"].bool()
            differences = [(values[i][real[i]].float() - alone[i]).flatten() for i in range(count)]
        difference = torch.cat(differences).abs().nan_to_num(torch.inf)
        found[side] = (float(difference.mean()), float(difference.max()))
    return found


def _check_eos(tokenizer, rows: list[list[int]]) -> None:
    for ids in rows:
        text = tokenizer.decode(ids[:-1])
        # Ids that a text was cut off from need not be those of the text they spell.
        if (
            tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:-1]
            and tokenizer(text)["input_ids"] != ids
        ):
            raise ValueError(
                f"the tokenizer gives {tokenizer(text)['input_ids'][-3:]} at the end, training gave {ids[-3:]}"
            )


def _agreement(wanted: list, found: list, head: str) -> float:
    """Share of the decisions that are the same: the likeliest token or label at every position, or, for question
    answering, the likeliest start and end of each text."""
    import torch

    axis = 0 if head == "qa" else -1
    same = [(a.argmax(axis) == b.argmax(axis)).float() for a, b in zip(wanted, found, strict=True)]
    return float(torch.cat([s.flatten() for s in same]).mean())


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
