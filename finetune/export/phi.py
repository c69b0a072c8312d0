"""GPT-J in Phi's form: the same function under names and a row order that more engines serve.

`PhiForCausalLM` computes GPT-J's function: one layer norm for the parallel attention and MLP,
partial rotary positions, and an untied head with a bias. Three things differ:

    names      transformer.h.0.attn.q_proj -> model.layers.0.self_attn.q_proj, ...
    biases     GPT-J has none in its attention: Phi's are zero
    rotation   GPT-J rotates neighbouring dimensions of a head, Phi the two halves of its rotary
               part. In the rows of q and k (weights, and a LoRA's B), per head of 8 dimensions of
               which 6 rotate:   0 1 2 3 4 5 6 7  ->  0 2 4  1 3 5  6 7

Scores are inner products of rows re-ordered alike, so that nothing else changes.
Source: transformers/models/phi/modeling_phi.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTJConfig

from finetune.errors import UserError, command, setting
from finetune.files import read_json, read_object, write_json
from finetune.gptj.load import Weights, evenly_spaced

ARCHITECTURES = {"lm": "PhiForCausalLM", "classify": "PhiForSequenceClassification"}
"""Head -> class of transformers. Phi has no head for question answering."""
MODULES = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "out_proj": "dense",
    "fc_in": "fc1",
    "fc_out": "fc2",
}
"""GPT-J's linear layers -> Phi's, which are also the names of an adapter's target modules."""
LAYER = re.compile(r"transformer\.h\.(\d+)\.(attn|mlp|ln_1)\.?(\w*)")
REORDERED = ("q_proj", "k_proj")
ROUNDING = 2.0**-8
"""Largest relative difference between copies of a weight in two precisions: half a unit in the last
place of bf16."""
SAME_FUNCTION = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Activations of GPT-J whose name and function Phi's config takes over."""


def check_form(config: GPTJConfig, head: str) -> None:
    """Check that a model has a counterpart in Phi's form.

    Raises:
        UserError: its head or activation has none.
    """
    if head not in ARCHITECTURES:
        raise UserError(
            "Phi has no head for question answering, and GGUF files are in Phi's form",
            "kind",
            "Use kind=merged or kind=adapter, which open in transformers.",
        )
    if config.activation_function not in SAME_FUNCTION:
        raise UserError(
            f"activation_function = {config.activation_function} is not exported as Phi",
            "kind",
            "Use kind=merged.",
        )


def config_values(config: GPTJConfig, head: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return Phi's config.json.

    Args:
        values: GPT-J's config.json, for what both have: dtype, token ids, labels.
    """
    head_dim = config.n_embd // config.n_head
    rotary = config.rotary_dim or head_dim
    share = rotary / head_dim
    if int(head_dim * share) < rotary:  # as readers compute it: 58 of 100 would give 57
        share = math.nextafter(share, 1.0)
    inner = config.n_inner or 4 * config.n_embd
    kept = ("dtype", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id")
    kept += ("num_labels", "problem_type", "_name_or_path", "transformers_version")
    return {
        "architectures": [ARCHITECTURES[head]],
        "model_type": "phi",
        **{key: values[key] for key in kept if key in values},
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": inner,
        "n_inner": inner,  # vLLM's own class, up to release 0.25, and SGLang's read this one
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "hidden_act": config.activation_function,
        "max_position_embeddings": config.n_positions,
        "layer_norm_eps": config.layer_norm_epsilon,
        "embd_pdrop": config.embd_pdrop,
        "resid_pdrop": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
        "initializer_range": config.initializer_range,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        # The first two are read by engines and older releases of transformers, the third by newer.
        "rope_theta": 10000.0,
        "partial_rotary_factor": share,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": share,
        },
    }


def convert(name: str, tensor: Tensor, config: GPTJConfig) -> list[tuple[str, Tensor]]:
    """Return one tensor of GPT-J in Phi's form, followed by the zero biases that Phi has beside it.

    `name` may carry a prefix and a suffix of peft's: `base_model.model. ... .lora_B.weight`.
    """
    new = phi_name(name)
    match = LAYER.search(name)
    module = match[3] if match else ""
    # A LoRA's A reads the layer's input, which has no order to change.
    if module in REORDERED and "lora_A" not in name:
        tensor = tensor[row_order(config).to(tensor.device)]
    converted = [(new, tensor)]
    if match and match[2] == "attn" and name.endswith(f"{module}.weight"):
        bias = new.removesuffix("weight") + "bias"
        converted.append((bias, tensor.new_zeros(tensor.shape[0])))
    return converted


def convert_all(
    tensors: Iterable[tuple[str, Tensor]], config: GPTJConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield GPT-J's tensors in Phi's form, one at a time."""
    for name, tensor in tensors:
        yield from convert(name, tensor, config)


def shapes(gptj: dict[str, tuple[int, ...]], config: GPTJConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that `convert_all` gives, in its order."""
    empty = ((name, torch.empty(shape, device="meta")) for name, shape in gptj.items())
    return {name: tuple(tensor.shape) for name, tensor in convert_all(empty, config)}


def phi_name(name: str) -> str:
    """Return Phi's name for a tensor or module of GPT-J."""

    def layer(match: re.Match) -> str:
        number, part, module = match.groups()
        if part == "ln_1":
            # A parameter of the norm: ln_1.weight.
            return f"model.layers.{number}.input_layernorm.{module}"
        inside = "self_attn" if part == "attn" else "mlp"
        return f"model.layers.{number}.{inside}.{MODULES[module]}"

    name = LAYER.sub(layer, name)
    name = name.replace("transformer.wte", "model.embed_tokens")
    return name.replace("transformer.ln_f", "model.final_layernorm")


def adapter_config(values: dict[str, Any], base: str) -> dict[str, Any]:
    """Return the adapter_config.json of a LoRA for a base in Phi's form.

    Args:
        values: adapter_config.json for GPT-J.
        base: path or hub id of the base in Phi's form.
    """
    targets = sorted(MODULES[target] for target in values["target_modules"])
    return values | {
        "target_modules": targets,
        "layers_pattern": "layers" if values.get("layers_to_transform") else None,
        "base_model_name_or_path": base,
        "revision": None,
    }


def row_order(config: GPTJConfig) -> Tensor:
    """Return the rows of q and k, (n_embd,) int64, in Phi's order."""
    head_dim = config.n_embd // config.n_head
    rotary = config.rotary_dim or head_dim
    order = torch.cat(
        [torch.arange(0, rotary, 2), torch.arange(1, rotary, 2), torch.arange(rotary, head_dim)]
    )
    heads = torch.arange(config.n_head)[:, None] * head_dim
    return (heads + order).reshape(-1)


def rewrite_files(folder: Path, config: GPTJConfig, head: str, base: str | None) -> None:
    """Rewrite an export's config.json, and the adapter in peft's layout for GPT-J, in Phi's form.

    Args:
        base: path of an adapter's base in Phi's form; None: a whole model.
    """
    file = folder / "config.json"
    if file.exists():
        write_json(file, config_values(config, head, read_json(file)))
    if base is None:
        return
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    write_json(file, adapter_config(read_json(file), base))
    converted = dict(convert_all(load_file(weights).items(), config))
    save_file({name: t.contiguous() for name, t in converted.items()}, weights)
    weights.chmod(0o644)


def check_base(base: str | None, trained_on: Path, config: GPTJConfig) -> Path:
    """Return the folder of an adapter's base in Phi's form.

    Args:
        trained_on: the base in GPT-J's layout; some rows of every tensor are compared.

    Raises:
        UserError: there is none, or it was made of other weights.
    """
    source = setting("source", trained_on)
    make = command(["python", "launch/convert.py", source, "target=BASE-phi", "to=phi"])
    if not base:
        raise UserError(
            "kind=phi_adapter needs the base model in Phi's form",
            "base",
            f"Make it once, and name it with base=BASE-phi: {make}",
        )
    folder = Path(base).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}", "base", f"Make it with: {make}")
    if read_object(folder / "config.json").get("model_type") != "phi":
        raise UserError("this is not a model in Phi's form", str(folder), f"Make it with: {make}")
    ours, theirs = Weights(trained_on), Weights(folder)
    order = row_order(config).tolist()
    for name in (name for name in ours.files if name.startswith("transformer.")):
        new, shape = phi_name(name), ours.shape(name)
        same = new in theirs.files and theirs.shape(new) == shape
        if same:
            rows = evenly_spaced(shape[0])
            reordered = any(f".{module}." in name for module in REORDERED)
            wanted = ours.sample(name, [order[row] for row in rows] if reordered else rows).float()
            difference = (theirs.sample(new, rows).float() - wanted).abs()
            # The base may be stored in another precision.
            same = bool((difference <= ROUNDING * wanted.abs() + ROUNDING**2).all())
        if not same:
            raise UserError(
                f"these are not the weights that this adapter was trained on: {new} differs from "
                f"{name} of {trained_on}",
                str(folder),
                f"Make the right base with: {make}",
            )
    return folder
