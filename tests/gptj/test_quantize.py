"""Quantised linear layers: bitsandbytes' own values in one parameter, and gradients of a dense layer."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes.nn as bnb
import pytest
import torch
from torch import nn

from finetune.check import check
from finetune.compose import compose_train
from finetune.config import Dtype, LoraConfig, ModelConfig, Quantize
from finetune.errors import UserError
from finetune.gptj import adapters
from finetune.gptj.load import build_model
from finetune.gptj.lora import LoraProducts
from finetune.gptj.quantize import QuantizedLinear
from finetune.planning.quantization import BLOCK
from finetune.training import inputs

FORMATS = [("int8", True), ("nf4", False), ("nf4", True)]
CPU = torch.device("cpu")


def settings(quantize: str, double: bool = True, dtype: str = "fp32", path: Path = Path()):
    return ModelConfig(
        path=str(path), dtype=Dtype(dtype), quantize=Quantize(quantize), quantize_double=double
    )


def layer(quantize: str, double: bool, dtype: str, rows: int = 48, columns: int = 128):
    """A quantised layer and the weight that was packed, (rows, columns)."""
    torch.manual_seed(0)
    value = torch.randn(rows, columns).to(getattr(torch, Dtype(dtype).torch_name))
    found = QuantizedLinear(settings(quantize, double, dtype), columns, rows).to(value.dtype)
    found.weight = nn.Parameter(found.pack(value), requires_grad=False)
    nn.init.normal_(found.bias)
    return found, value


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quantize, double", FORMATS)
def test_values_are_those_of_bitsandbytes(quantize, double, dtype, monkeypatch):
    """They are quantised some blocks at a time, and the last of these are fewer."""
    monkeypatch.setattr("finetune.gptj.quantize.PIECE", 10 * BLOCK)
    ours, value = layer(quantize, double, dtype)
    if quantize == "int8":
        weight = bnb.Int8Params(value, requires_grad=False, has_fp16_weights=False)._quantize(CPU)
        wanted = (weight.CB * weight.SCB[:, None] / 127).to(value.dtype)
    else:
        weight = bnb.Params4bit(value, compress_statistics=double, quant_type=quantize)
        weight = weight.to("cpu")
        wanted = bnb.modules.bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    torch.testing.assert_close(ours.dequantize(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("columns", [32, 96, 128, 45])
@pytest.mark.parametrize("quantize, limit", [("int8", 0.01), ("nf4", 0.11)])
def test_any_width_is_as_close_as_its_format_can_be(quantize, limit, columns):
    ours, value = layer(quantize, True, "fp32", columns=columns)
    assert (ours.dequantize() - value).abs().mean() / value.abs().mean() < limit


@pytest.mark.parametrize("quantize, double", FORMATS)
def test_the_gradient_is_that_of_the_dense_layer_and_only_packed_bytes_are_saved(quantize, double):
    ours, _ = layer(quantize, double, "fp32")
    x = torch.randn(3, 7, 128, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ours(x)
    dense = nn.functional.linear(x, ours.dequantize(), ours.bias)
    upstream = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, upstream)
    (wanted,) = torch.autograd.grad(dense, x, upstream)
    assert torch.equal(y, dense) and torch.equal(found, wanted)
    assert [t.data_ptr() for t in saved] == [ours.weight.data_ptr()]


@pytest.mark.parametrize("quantize, double", FORMATS)
def test_a_conversion_of_the_module_leaves_the_bytes_alone(quantize, double):
    ours, _ = layer(quantize, double, "bf16")
    before = ours.weight.detach().clone().view(torch.uint8)
    converted = copy.deepcopy(ours).float()
    assert torch.equal(converted.weight.view(torch.uint8), before)
    assert converted.bias.dtype == torch.float32
    x = torch.randn(2, 128)
    torch.testing.assert_close(
        converted(x), nn.functional.linear(x, ours.dequantize().float(), ours.bias.float())
    )


def test_the_blocks_are_quantised_and_lora_takes_one_pass(pocket_gptj, monkeypatch):
    model = build_model(settings("nf4", path=pocket_gptj), "lm", device=CPU, seed=0)
    kinds = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(kinds) == 2 * 6 and all(".h." in name for name in kinds)
    wrapped = adapters.attach(model, LoraConfig(targets="all-linear"), "lm", "base", 0)
    dense = build_model(
        ModelConfig(path=str(pocket_gptj), dtype=Dtype.fp32), "lm", device=CPU, seed=0
    )
    counted = adapters.count(adapters.attach(dense, LoraConfig(targets="all-linear"), "lm", "b", 0))
    assert adapters.count(wrapped) == counted
    calls: list[int] = []
    apply = LoraProducts.apply
    monkeypatch.setattr(
        LoraProducts, "apply", lambda x, s, *rest: calls.append(len(s)) or apply(x, s, *rest)
    )
    ids = torch.randint(0, 96, (1, 24))
    wrapped(input_ids=ids, labels=ids).backward()
    assert calls == [3, 1, 1, 1] * 2


def test_full_fine_tuning_and_a_missing_library_are_refused(monkeypatch):
    words = ["recipe=clm_pile", "debug=tiny", "model.quantize=nf4"]
    with pytest.raises(UserError, match=r"model.quantize = nf4 .*\n.*adapter=lora"):
        check(compose_train(words), 1, False)
    cfg = compose_train([*words, "adapter=lora"])
    check(cfg, 1, False)
    assert not list(inputs.absent(cfg, False))
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    (problem,) = inputs.absent(cfg, False)
    assert "bitsandbytes" in str(problem) and "pip install -e '.[quant]'" in str(problem)
