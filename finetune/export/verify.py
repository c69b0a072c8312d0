"""Reopen an export with the engine's own code, away from this project's model, and compare outputs.

    python -m finetune.export.verify EXPORT_DIR REFERENCE.safetensors

The reference holds ids.N (T,) and outputs.N (T, V) of the trained model, each text alone. Texts
called short_ids.N, of unequal lengths, are also read as one batch that the export's own tokenizer
pads, on the right and on the left. Prints one JSON object.

Nothing of this project's GPT-J is used here. The judge of layouts for transformers and peft is
Hugging Face's eager implementation; that of a GGUF file is llama.cpp (`verify_gguf.py`).
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.config import HEADS, Dtype
from finetune.export import verify_gguf
from finetune.export.gguf_file import MODEL_FILE
from finetune.files import read_json, read_object

TOLERANCE = {
    "float32": (2e-5, 2e-3, 0.999),
    "bfloat16": (0.05, 0.5, 0.9),
    "float16": (0.01, 0.1, 0.97),
}
"""dtype -> (mean and largest difference over the outputs' standard deviation, least arg-max
agreement). The largest one finds a single wrong row of the head, which the mean over 50400 does not
show."""
SIDES = {"PROMPT_TUNING": (), "PREFIX_TUNING": ("right",)}
"""Sides that batches may be padded on where an adapter has virtual tokens: padding must not come
between those and the text, and a classifier cannot pool behind a prompt at all. All other exports:
both."""
PADDED_MEAN = 3
"""A padded batch has a few numbers where the texts have thousands: its mean difference may be as
many times larger."""


def open_export(folder: Path):
    """Return the model in evaluation mode, as a stranger would load it, and its head.

    Raises:
        ValueError: tensors are missing from the files or left over: transformers only warns, and
            draws them at random.
    """
    import transformers

    about, adapter = (
        read_json(folder / "finetune.json"),
        read_object(folder / "adapter_config.json"),
    )
    auto = getattr(transformers, HEADS[about["head"]].auto_class)
    dtype = getattr(torch, Dtype(about["dtype"]).torch_name)
    settings = {"dtype": dtype, "attn_implementation": "eager"}
    if adapter:
        from peft import PeftModel

        # A head needs the export's config: number of labels, and the padding token.
        if (folder / "config.json").exists():
            settings["config"] = transformers.AutoConfig.from_pretrained(str(folder))
        base, revision = adapter["base_model_name_or_path"], adapter.get("revision") or "main"
        quantized = quantization(about, dtype)
        model = auto.from_pretrained(base, revision=revision, **settings, **quantized)
        if quantized:
            dequantize(model)
        model = PeftModel.from_pretrained(model, str(folder))
        # Not `to`, which transformers refuses for quantised models.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    else:
        model, told = auto.from_pretrained(str(folder), output_loading_info=True, **settings)
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


def outputs(model, head: str, ids: Tensor) -> Tensor:
    """Return the head's outputs at every position of a text in fp32, (T, V), before any pooling."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: list = []
    hook = getattr(inner, HEADS[head].module).register_forward_hook(
        lambda module, given, output: seen.append(output[0])
    )
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.peft_type == "PREFIX_TUNING" and head != "lm":
        # peft 0.21 hands its prefix over as `past_key_values`, a name that transformers 5.24
        # replaced by `cache`: for these heads peft's own forward refuses. Run the base model on the
        # keys and values that peft makes; everything else is peft's and transformers'.
        prefix = model.get_prompt(batch_size=1)
        mask = torch.ones(1, prefix.get_seq_length() + len(ids), dtype=torch.long)
        positions = torch.arange(prefix.get_seq_length(), mask.shape[1])[None]
        inner(input_ids=ids[None], cache=prefix, attention_mask=mask, position_ids=positions)
    else:
        model(input_ids=ids[None])
    hook.remove()
    return seen[-1][-len(ids) :].float()  # a prompt's own outputs stand in front


def compare(folder: Path, saved: dict[str, Tensor]) -> dict:
    """Return figures over all positions, and whether they are within what the precision explains."""
    from finetune.training.mfu import emulates_bf16

    model, head = open_export(folder)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype == "bfloat16" and emulates_bf16(torch.device("cpu")):
        model = model.float()  # the same numbers, two hundred times as fast
    texts = range(sum(name.startswith("ids.") for name in saved))
    wanted = [saved[f"outputs.{i}"] for i in texts]
    reopened = [outputs(model, head, saved[f"ids.{i}"]) for i in texts]
    padded = padded_differences(folder, model, head, saved)

    # Decisions: the likeliest token or label at every position, or a question's start and end.
    axis = 0 if head == "qa" else -1
    same = [a.argmax(axis) == b.argmax(axis) for a, b in zip(wanted, reopened, strict=True)]
    agreement = float(torch.cat([row.float().flatten() for row in same]).mean())
    a, b = torch.cat(wanted), torch.cat(reopened)
    difference, spread = (a - b).abs(), float(a.std().clamp(min=1e-12))
    mean, largest = float(difference.mean()), float(difference.max())
    mean_limit, max_limit, least_agreement = TOLERANCE[dtype]
    equal = (
        bool(torch.isfinite(b).all())
        and mean / spread <= mean_limit
        and largest / spread <= max_limit
        and (agreement >= least_agreement or mean / spread < 1e-5)
        and all(
            one.mean() / spread <= PADDED_MEAN * mean_limit and one.max() / spread <= max_limit
            for one in padded.values()
        )
    )
    libraries = ("transformers", "peft") if hasattr(model, "peft_config") else ("transformers",)
    return {
        "equal": equal,
        "max_difference": largest,
        "mean_difference": mean,
        "relative_difference": mean / spread,
        "argmax_agreement": agreement,
        "positions": sum(len(text) for text in wanted),
        "dtype": dtype,
        "arithmetic": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tensors": sum(1 for _ in model.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "padded_max_difference": {side: float(one.max()) for side, one in padded.items()},
        "engine": " and ".join(f"{library} {version(library)}" for library in libraries),
    }


def padded_differences(
    folder: Path, model, head: str, saved: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the differences of the short texts in a padded batch from each alone, by padded side.

    A classifier is compared in what it returns, which transformers pools by itself; the other heads
    at every token.

    Raises:
        ValueError: the export's tokenizer does not write the eos that training wrote.
    """
    from transformers import AutoTokenizer

    count = sum(name.startswith("short_ids.") for name in saved)
    rows = [saved[f"short_ids.{i}"].tolist() for i in range(count)]
    alone = [saved[f"short_outputs.{i}"] for i in range(count)]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if head != "lm":
        check_eos(tokenizer, rows)
    adapter = read_object(folder / "adapter_config.json").get("peft_type", "")
    sides = SIDES.get(adapter, ("right", "left"))
    # For a prefix before another head see `outputs`.
    prefixed = adapter == "PREFIX_TUNING" and head != "lm"
    if tokenizer.pad_token_id is None or count < 2 or prefixed:
        sides = ()
    differences = {}
    for side in sides:
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        result = model(**batch)
        if head == "classify":
            parts = [result.logits[i].float() - alone[i][-1] for i in range(count)]
        else:
            qa = head == "qa"
            values = (
                torch.stack([result.start_logits, result.end_logits], -1) if qa else result.logits
            )
            real = batch["attention_mask"].bool()
            parts = [(values[i][real[i]].float() - alone[i]).flatten() for i in range(count)]
        differences[side] = torch.cat(parts).abs().nan_to_num(torch.inf)
    return differences


def check_eos(tokenizer, rows: list[list[int]]) -> None:
    """Check that the tokenizer ends every text with the eos that training put there.

    Raises:
        ValueError: it does not.
    """
    for ids in rows:
        text = tokenizer.decode(ids[:-1])
        # Ids that a text was cut off from need not be those of the text they spell.
        whole = tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:-1]
        written = tokenizer(text)["input_ids"]
        if whole and written != ids:
            raise ValueError(
                f"the tokenizer gives {written[-3:]} at the end, training gave {ids[-3:]}"
            )


def main(folder: Path, reference: Path) -> None:
    """Print the figures of the export in `folder`."""
    torch.set_grad_enabled(False)
    saved = load_file(reference)
    is_gguf = (folder / MODEL_FILE).is_file()
    print(json.dumps(verify_gguf.compare(folder, saved) if is_gguf else compare(folder, saved)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
