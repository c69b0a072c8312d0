"""LoRA in one autograd function against peft's own forward: outputs, gradients, and who keeps peft's path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPTJConfig

from finetune.config import LoraConfig
from finetune.gptj import adapters
from finetune.gptj.lora import LoraProducts
from finetune.gptj.model import CausalLM

SHAPE = dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=96, n_positions=64)
NO_DROPOUT = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def lora_model(
    dtype: torch.dtype = torch.float32, checkpointing: bool | str = False, **settings
) -> nn.Module:
    """A two-block GPT-J with LoRA whose B factors are not zero."""
    torch.manual_seed(0)
    config = GPTJConfig(**SHAPE, **NO_DROPOUT)
    model = CausalLM(config, checkpointing=checkpointing).to(dtype)
    model = adapters.attach(model, LoraConfig(**settings), "lm", "base", 0).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def unfused(model: nn.Module) -> nn.Module:
    """A copy that takes peft's own path everywhere."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.__dict__.pop("project", None)
        module.__dict__.pop("forward", None)
    return plain


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    ids = torch.randint(0, 96, (2, 24))
    loss = model(input_ids=ids, labels=ids.roll(-1, 1).view(1, -1))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True, "selective", "offload"])
@pytest.mark.parametrize(
    "settings",
    [
        {"targets": "all-linear"},
        {"targets": "q_proj,v_proj"},
        {"targets": "fc_in,fc_out", "rslora": True, "rank": 3},
    ],
    ids=["all linear", "q and v", "rsLoRA on the MLP"],
)
def test_equals_peft(settings, checkpointing):
    model = lora_model(checkpointing=checkpointing, **settings)
    plain = unfused(model)
    loss, gradients = loss_and_gradients(model)
    reference, reference_gradients = loss_and_gradients(plain)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == reference_gradients.keys() and gradients
    for name, gradient in gradients.items():
        wanted = reference_gradients[name]
        assert (gradient - wanted).abs().max() <= 2e-6 * wanted.abs().max(), name


def test_it_is_used_for_q_k_and_v_at_once_and_for_every_other_layer(monkeypatch):
    calls: list[int] = []
    apply = LoraProducts.apply

    def counted(x, scalings, *tensors):
        calls.append(len(scalings))
        return apply(x, scalings, *tensors)

    monkeypatch.setattr(LoraProducts, "apply", counted)
    loss_and_gradients(lora_model(targets="all-linear"))
    assert calls == [3, 1, 1, 1] * 2
    calls.clear()
    loss_and_gradients(lora_model(targets="q_proj,v_proj"))
    assert calls == [2] * 2


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"dora": True}])
def test_variants_take_pefts_path(monkeypatch, settings):
    monkeypatch.setattr(LoraProducts, "apply", lambda *_: pytest.fail("not a plain LoRA layer"))
    _, gradients = loss_and_gradients(lora_model(**settings))
    assert any(gradient.any() for gradient in gradients.values())


def test_a_disabled_adapter_is_the_base(monkeypatch):
    model = lora_model(targets="all-linear")
    ids = torch.randint(0, 96, (1, 9))
    with torch.no_grad():
        adapted = model(input_ids=ids)
        with model.disable_adapter():
            base = model(input_ids=ids)
    torch.manual_seed(0)
    reference = CausalLM(GPTJConfig(**SHAPE, **NO_DROPOUT))
    assert torch.equal(base, reference(input_ids=ids)) and not torch.allclose(base, adapted)


def test_bf16_rounds_less_than_peft():
    """Added in fp32 before one rounding, where peft rounds the base, the low-rank part and their sum."""
    exact, _ = loss_and_gradients(lora_model(targets="all-linear"))
    model = lora_model(torch.bfloat16)
    ours, gradients = loss_and_gradients(model)
    peft, reference = loss_and_gradients(unfused(model))
    assert abs(ours - exact) <= abs(peft - exact) + 0.01 * exact
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=0.1, atol=0.1)


def test_nothing_is_saved_twice():
    """The input once, however many layers read it, and one low-rank product per layer."""

    def saved_bytes(model: nn.Module) -> int:
        frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ids = torch.arange(48)[None] % 96
            loss = model(input_ids=ids, labels=ids)
        assert loss.requires_grad
        return sum(storages.values())

    model = lora_model(targets="all-linear")
    assert saved_bytes(model) <= saved_bytes(unfused(model))
