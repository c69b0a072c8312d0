"""Every adapter on every head over flat batches, against plain peft on Hugging Face's GPT-J, one text at a time."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from task_setup import CPU, models

from finetune.config import (
    ClassifyConfig,
    Dtype,
    Ia3Config,
    InstructConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    QaConfig,
)
from finetune.data.tokenizer import load_tokenizer
from finetune.export.reopen import load_export
from finetune.export.write import write_adapter
from finetune.gptj import adapters
from finetune.gptj.adapter_start import load_start
from finetune.gptj.prompt_tuning import insert, remove
from finetune.gptj.recompute import KINDS as CHECKPOINTING
from finetune.inference.sample import Sampling, continue_flat
from finetune.tasks.base import to_device
from tests.peft_reference import run_peft

ADAPTERS = {
    "lora": LoraConfig(rank=4, targets="all-linear"),
    "last block": LoraConfig(rank=4, layers="1"),
    "whole modules": LoraConfig(rank=4, modules_to_save=["wte", "ln_f"]),
    "rslora": LoraConfig(rank=4, targets="q_proj,fc_in", rslora=True),
    "dora": LoraConfig(rank=4, targets="all-linear", dora=True),
    "ia3": Ia3Config(targets="all-linear"),
    "prompt": PromptConfig(virtual_tokens=3),
    "prefix": PrefixConfig(virtual_tokens=3),
}
HEADS = {"lm": "lm_head", "classify": "score", "qa": "qa_outputs"}
KINDS = {
    "lm": peft.PeftModelForCausalLM,
    "classify": peft.PeftModelForSequenceClassification,
    "qa": peft.PeftModelForQuestionAnswering,
}
CASES = [(head, name) for head in HEADS for name in ADAPTERS]
CONTEXT = "The old mill by the river was sold in 1912 to a baker from Ghent."
DATA = {
    "lm": (
        InstructConfig(template="plain", max_length=16),
        [
            {"prompt": "a b c", "completion": " d"},
            {"prompt": "2+2?", "completion": " 4"},
            {"prompt": "Hi", "completion": " a b c d e f"},
        ],
    ),
    "classify": (
        ClassifyConfig(),
        [
            {"text": "a b c d", "label": "no"},
            {"text": "2+2?", "label": "yes"},
            {"text": "Hi", "label": "no"},
        ],
    ),
    "qa": (
        QaConfig(max_length=24, stride=4),
        [
            {
                "id": "1",
                "context": CONTEXT,
                "question": "Sold when?",
                "answers": {"text": ["1912"], "answer_start": [38]},
            },
            {
                "id": "2",
                "context": CONTEXT,
                "question": "Who?",
                "answers": {"text": [], "answer_start": []},
            },
        ],
    ),
}


def pair(head: str, name: str, checkpointing: bool | str = False):
    """Our model and plain peft on Hugging Face's, with equal weights, no adapter weight at its neutral start."""
    ours, theirs = models(head, checkpointing=checkpointing)
    ours = adapters.attach(ours, ADAPTERS[name], head, "base", seed=0)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        theirs, adapters.peft_config(ADAPTERS[name], head), autocast_adapter_dtype=False
    )
    torch.manual_seed(1)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def outputs(theirs, head: str, ids: list[int]) -> torch.Tensor:
    """What peft's own forward lets the head say at each token of one text, (T, outputs)."""
    found: list[torch.Tensor] = []
    layer = [
        module
        for name, module in theirs.named_modules()
        if name.endswith((HEADS[head], f"{HEADS[head]}.modules_to_save.default"))
    ][-1]
    hook = layer.register_forward_hook(lambda module, given, output: found.append(output[0]))
    run_peft(theirs, ids)
    hook.remove()
    return found[0][-len(ids) :]


def reference_loss(theirs, head: str, made) -> torch.Tensor:
    """Summed loss from peft's outputs, one text at a time, by torch's own functions."""
    total = torch.zeros(())
    for i in range(len(made.store)):
        example = made.example(i)
        found = outputs(theirs, head, example["ids"])
        if head == "lm":
            scored = torch.tensor(example["scored"][1:], dtype=torch.bool)
            targets = torch.tensor(example["ids"][1:])[scored]
            total = total + F.cross_entropy(found[:-1][scored], targets, reduction="sum")
        elif head == "classify":
            total = total + F.cross_entropy(found[-1], torch.tensor(made.batch([i])["targets"][0]))
        else:
            first = example["context_at"]
            sides = [
                F.cross_entropy(found[first:, side], torch.tensor(example[key] - first))
                for side, key in enumerate(("start", "end"))
            ]
            total = total + (sides[0] + sides[1]) / 2
    return total


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("head", "name"), CASES)
def test_outputs_loss_and_gradients_are_plain_pefts(make, head, name, packing):
    cfg, rows = DATA[head]
    made = make(cfg, rows, packing=packing)
    ours, theirs = pair(head, name)
    batch = to_device(made.batch(), CPU)
    flat = ours(
        input_ids=batch["ids"][None],
        position_ids=batch["positions"][None],
        cu_seqlens=batch["cu_seqlens"],
    )
    flat = flat[0]
    alone = [
        outputs(theirs, head, batch["ids"][a:b].tolist())
        for a, b in zip(batch["cu_seqlens"][:-1], batch["cu_seqlens"][1:], strict=True)
    ]
    torch.testing.assert_close(flat, torch.cat(alone), rtol=1e-5, atol=1e-5)
    ours_loss, their_loss = made.loss(ours), reference_loss(theirs, head, made)
    torch.testing.assert_close(ours_loss, their_loss, rtol=1e-5, atol=1e-6)
    ours_loss.backward()
    their_loss.backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys() and wanted
    scale = max(float(g.abs().max()) for g in wanted.values())
    for n in wanted:
        assert wanted[n].any() and (found[n] - wanted[n]).abs().max() <= 1e-5 * scale, n
    assert head == "lm" or any(HEADS[head] in n for n in found)  # the head is always trained


@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_activation_checkpointing_changes_no_gradient(make, name):
    made = make(*DATA["lm"])
    gradients = []
    for checkpointing in CHECKPOINTING:
        ours, _ = pair("lm", name, checkpointing)
        ours.train()
        made.loss(ours).backward()
        gradients.append({n: p.grad for n, p in ours.named_parameters() if p.requires_grad})
    for n, gradient in gradients[0].items():
        assert all(torch.equal(gradient, other[n]) for other in gradients[1:]), n


@pytest.mark.parametrize(("head", "name"), CASES)
def test_the_saved_adapter_opens_in_plain_peft_and_here(tmp_path, head, name):
    ours, _ = pair(head, name)
    models(head)[1].save_pretrained(tmp_path / "base")
    trained = {n: p.detach() for n, p in ours.named_parameters() if p.requires_grad}
    write_adapter(ours, trained, tmp_path / "adapter")
    fresh = KINDS[head].from_pretrained(models(head)[1], str(tmp_path / "adapter"))
    ids = [17, 10, 17, 30, 50256]
    wanted = ours.eval()(input_ids=torch.tensor([ids]))[0].detach()
    torch.testing.assert_close(
        outputs(fresh.eval(), head, ids).detach(), wanted, rtol=1e-5, atol=1e-5
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert head == "lm" or HEADS[head] in config["modules_to_save"]
    (tmp_path / "adapter" / "finetune.json").write_text(
        json.dumps(
            {
                "head": head,
                "dtype": "fp32",
                "base": str(tmp_path / "base"),
                "kind": "adapter",
                "task": {"num_labels": 2},
                "settings": {},
            }
        )
    )
    again = load_export(tmp_path / "adapter", Dtype.fp32, CPU).module(input_ids=torch.tensor([ids]))
    torch.testing.assert_close(again[0].detach(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("head", "name"), CASES)
def test_training_goes_on_from_what_plain_peft_saved(tmp_path, head, name):
    _, theirs = pair(head, name)
    theirs.save_pretrained(tmp_path)
    fresh = adapters.attach(models(head)[0], ADAPTERS[name], head, "base", seed=5)
    ids = [17, 10, 17, 30, 50256]
    before = fresh.eval()(input_ids=torch.tensor([ids]))[0].detach()
    load_start(fresh, tmp_path, place=lambda parameter, value: None)
    found = fresh(input_ids=torch.tensor([ids]))[0].detach()
    torch.testing.assert_close(found, outputs(theirs, head, ids).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_generation_with_virtual_tokens_follows_plain_pefts_logits(name):
    ours, theirs = pair("lm", name)
    prompts = [[64, 275], [17, 10, 17, 30]]
    found = continue_flat(ours, load_tokenizer(None), prompts, Sampling(8, temperature=0), CPU)
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(theirs(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert prompt + continuation == ids


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_why_virtual_tokens_do_not_generate_through_peft(name):
    """peft 0.21 reads and writes the cache under its old name: from the second token on `generate` of transformers 5.24
    computes something else. When this fails, peft's own generation can be used again."""
    _, theirs = pair("lm", name)
    ids = torch.tensor([[17, 10, 17, 30]])
    generated = theirs.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=50256,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = theirs(input_ids=generated.sequences[:, :5]).logits[0, -1]
    assert not torch.allclose(generated.logits[1][0], wanted, atol=1e-4)


def test_virtual_rows_go_in_and_out_again():
    flat = torch.arange(5)[:, None]
    wide = insert(flat, torch.tensor([[-1], [-2]]), (3, 2))
    assert wide[:, 0].tolist() == [-1, -2, 0, 1, 2, -1, -2, 3, 4]
    assert remove(wide, 2, (3, 2)).equal(flat)
