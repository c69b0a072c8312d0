"""Rows of own tokens beside a LoRA have the losses and gradients of peft on Hugging Face's GPT-J."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import GPTJConfig, GPTJForCausalLM

from finetune.config import HEADS, LoraConfig
from finetune.data.columns import IGNORE
from finetune.gptj import adapters
from finetune.gptj.model import MODELS, copy_config
from finetune.planning.shape import ModelShape

TOKENS = [90, 93]
CFG = LoraConfig(rank=3, targets="q_proj,fc_in")
TEXTS = [[5, 90, 7, 93, 93, 8, 90], [93, 4, 90, 90]]
DELTA, ADDED = "wte.token_adapter.trainable_tokens_delta.default", "lm_head.lora_A.default.weight"


def config() -> GPTJConfig:
    return GPTJConfig(
        vocab_size=96, bos_token_id=0, eos_token_id=0, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip


def models(head_bias: float):
    """Our model with its adapter, and Hugging Face's without one; equal weights."""
    torch.manual_seed(0)
    theirs = GPTJForCausalLM(config())
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(theirs.lm_head.bias, std=head_bias)
    ours = MODELS["lm"](copy_config(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    ours = adapters.attach(ours, CFG, "lm", "base", 0, TOKENS)
    torch.manual_seed(1)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and ADDED not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return ours, theirs.eval()


def flat_loss(model, per_token: bool = False) -> torch.Tensor:
    """Sum of the losses of `TEXTS` as one flat batch."""
    ids = torch.tensor([[i for text in TEXTS for i in text]])
    labels = torch.tensor([[i for text in TEXTS for i in (*text[1:], IGNORE)]])
    positions = torch.tensor([[i for text in TEXTS for i in range(len(text))]])
    ends = torch.tensor([0, *map(len, TEXTS)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return model(ids, positions, ends, labels=labels, per_token=per_token).sum()


def plain_loss(model) -> torch.Tensor:
    rows = [(model(input_ids=torch.tensor([text])).logits[0], text) for text in TEXTS]
    pairs = [(logits[:-1], torch.tensor(text[1:])) for logits, text in rows]
    return sum(F.cross_entropy(logits, ids, reduction="sum") for logits, ids in pairs)


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").removeprefix("transformer."): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def test_losses_and_gradients_are_those_of_peft():
    """peft's own trainable_token_indices for both matrices; without a bias of the head, which it leaves out."""
    ours, theirs = models(head_bias=0.0)
    settings = adapters.peft_config(CFG, "lm")
    settings.trainable_token_indices = {"wte": TOKENS, "lm_head": TOKENS}
    theirs = peft.get_peft_model(theirs, settings, autocast_adapter_dtype=False).eval()
    theirs.load_state_dict(
        {n: v for n, v in ours.state_dict().items() if ADDED not in n}, strict=False
    )
    flat_loss(ours).backward()
    loss = plain_loss(theirs)
    loss.backward()
    torch.testing.assert_close(flat_loss(ours), loss, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(ours), gradients(theirs)
    wanted[ADDED] = wanted.pop("lm_head.token_adapter.trainable_tokens_delta.default")
    assert found.keys() == wanted.keys() and DELTA in found
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_with_the_heads_bias_gradients_are_those_of_the_whole_matrices():
    ours, theirs = models(head_bias=0.5)
    with torch.no_grad():  # the same function, by whole matrices
        state = ours.state_dict()
        theirs.transformer.wte.weight[TOKENS] = state[f"base_model.model.transformer.{DELTA}"]
        layers = dict(ours.named_modules())
        for name, module in theirs.named_modules():
            layer = layers.get(f"base_model.model.{name}")
            if isinstance(layer, peft.tuners.lora.Linear) and "lm_head" not in name:
                module.weight += layer.get_delta_weight("default")
    loss = plain_loss(theirs)
    loss.backward()
    for per_token in (False, True):
        ours.zero_grad()
        ours_loss = flat_loss(ours, per_token)
        ours_loss.backward()
        torch.testing.assert_close(ours_loss, loss, rtol=1e-5, atol=1e-5)
        found = gradients(ours)
        for name, whole in ((DELTA, theirs.transformer.wte), (ADDED, theirs.lm_head)):
            wanted = whole.weight.grad[TOKENS]
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


def test_peft_leaves_out_the_bias_of_a_head_with_trained_rows():
    """Why the head's rows are a LoRA: where peft mends this, `token_rows` can go without."""
    _, plain = models(head_bias=0.5)
    bias, wanted = plain.lm_head.bias.clone(), plain(torch.tensor([TEXTS[0]])).logits
    settings = peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": TOKENS}
    )
    wrapped = peft.get_peft_model(plain, settings).eval()
    torch.testing.assert_close(wrapped(torch.tensor([TEXTS[0]])).logits, wanted - bias)


def test_without_its_adapter_the_model_is_the_base():
    ours, theirs = models(head_bias=0.5)
    with torch.no_grad():
        found = ours(torch.tensor([TEXTS[0]]), adapter=False)
        torch.testing.assert_close(found, theirs(torch.tensor([TEXTS[0]])).logits)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("whole", [[], ["wte"]])
def test_the_planner_counts_the_rows(head, whole):
    cfg = LoraConfig(rank=3, targets="q_proj", modules_to_save=whole)
    model = MODELS[head](config())
    shape = ModelShape.from_config(config().to_dict(), head, 2)
    shape = ModelShape(**vars(shape) | {"own_tokens": len(TOKENS)})
    model = adapters.attach(model, cfg, head, "base", 0, TOKENS)
    trained = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    assert list(shape.trainable_tensors(cfg)) == trained
    counted = adapters.count(model)
    assert counted == {"total": shape.total(cfg), "trainable": shape.trainable(cfg)}
