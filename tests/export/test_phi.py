"""GPT-J in Phi's form gives plain GPT-J's logits, text and classes; a LoRA carries over."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    PhiForSequenceClassification,
)

from finetune.config import Ia3Config, LoraConfig
from finetune.errors import UserError
from finetune.export import gguf_file, phi
from finetune.export.kinds import check_kind

SHAPES = {
    "rotary part": {"rotary_dim": 12},
    "rotary share that floats round down": {"rotary_dim": 58, "n_embd": 200, "n_head": 2},
    "rotary whole head, own n_inner": {"rotary_dim": 16, "n_inner": 96},
}


def gptj(shape: str, kind=GPTJForCausalLM, **changes):
    values = dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64, bos_token_id=0,
        eos_token_id=0, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind(GPTJConfig(**values | SHAPES[shape] | changes)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def in_phi_form(model, kind, head):
    values = json.loads(model.config.to_json_string())
    values = phi.config_values(model.config, head, values)
    other = kind(PhiConfig(**{k: v for k, v in values.items() if k != "architectures"})).double()
    tensors = [
        pair
        for name, tensor in model.named_parameters()
        for pair in phi.convert(name, tensor.detach(), model.config)
    ]
    other.load_state_dict(dict(tensors), strict=True)
    return other.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_text(shape):
    model = gptj(shape)
    other = in_phi_form(model, PhiForCausalLM, "lm")
    ids = torch.randint(2, 300, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :13] = 0, 0  # left-padded, as for generation
    with torch.no_grad():
        wanted, logits = (
            model(ids, attention_mask=mask).logits,
            other(ids, attention_mask=mask).logits,
        )
    assert (wanted - logits)[mask.bool()].abs().max() < 1e-6 * wanted.abs().max()
    settings = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert torch.equal(model.generate(ids, **settings), other.generate(ids, **settings))


def test_classifier_on_padded_batches():
    model = gptj("rotary part", GPTJForSequenceClassification)
    other = in_phi_form(model, PhiForSequenceClassification, "classify")
    ids = torch.randint(2, 300, (4, 11))
    for row, length in enumerate((11, 8, 3, 1)):
        ids[row, length:] = 1
    mask = (ids != 1).long()
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        logits = other(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"layers_to_transform": [1], "layers_pattern": "h"}]
)
def test_a_lora_carries_over(tmp_path, changes):
    base = gptj("rotary part")
    other = in_phi_form(base, PhiForCausalLM, "lm")
    config = base.config
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=list(phi.MODULES), **changes
    )
    adapted = get_peft_model(base, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = [pair for n, t in load_file(file).items() for pair in phi.convert(n, t, config)]
    save_file({name: tensor.contiguous() for name, tensor in tensors}, file)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(phi.adapter_config(values, "there")))
    reopened = PeftModel.from_pretrained(other, str(tmp_path)).eval()
    assert reopened.peft_config["default"].base_model_name_or_path == "there"
    ids = torch.randint(2, 300, (2, 15))
    with torch.no_grad():
        wanted, logits = adapted.eval()(ids).logits, reopened(ids).logits
        with reopened.disable_adapter():
            plain = reopened(ids).logits
    assert (wanted - logits).abs().max() < 1e-6 * wanted.abs().max()
    assert not torch.allclose(plain, wanted, rtol=0.1)


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        (Ia3Config(), "ia3"),
        (LoraConfig(dora=True), "dora"),
        (LoraConfig(modules_to_save=["wte", "ln_f"]), r"whole modules \(wte, ln_f\)"),
    ],
)
def test_other_adapters_are_refused_and_named(adapter, named):
    with pytest.raises(UserError, match=f"{named}(.|\n)*kind=phi"):
        check_kind("phi_adapter", adapter)
    assert check_kind("phi", adapter).whole


def test_heads_and_activations_without_a_counterpart_are_refused():
    config = GPTJConfig()
    with pytest.raises(UserError, match=r"question answering(.|\n)*kind=merged"):
        phi.check_form(config, "qa")
    with pytest.raises(UserError, match=r"question answering(.|\n)*kind=merged"):
        gguf_file.check_form(config, "qa")
    with pytest.raises(UserError, match="activation_function = relu"):
        phi.check_form(GPTJConfig(activation_function="relu"), "lm")
    phi.check_form(config, "classify")
