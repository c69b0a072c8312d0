"""The fast GPT-J against Hugging Face's eager one: logits, loss, every gradient, packed, padded, cached."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTJConfig, GPTJForCausalLM

from finetune.data.constants import IGNORE
from finetune.gptj.model import CausalLM
from finetune.gptj.recompute import KINDS

LENGTHS = (7, 1, 12, 12, 30)
VOCAB = 500


def config(**changes) -> GPTJConfig:
    values = dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=VOCAB, n_positions=64, embd_pdrop=0.0,
                  attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    return GPTJConfig(**(values | changes))


@pytest.fixture(params=[{}, {"rotary_dim": 16, "n_inner": 96}], ids=["rotary part", "rotary whole head, own n_inner"])
def pair(request) -> tuple[GPTJForCausalLM, CausalLM]:
    torch.manual_seed(0)
    reference = GPTJForCausalLM(config(**request.param)).eval()
    ours = CausalLM(copy.deepcopy(reference.config)).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def packed_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    labels = torch.cat([torch.cat([part[1:], torch.tensor([IGNORE])]) for part in ids[0].split(LENGTHS)])[None]
    return {"input_ids": ids, "position_ids": positions, "cu_seqlens": cu, "labels": labels}


def separate_logits(reference, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([reference(input_ids=part[None]).logits[0] for part in ids[0].split(LENGTHS)])


@pytest.mark.parametrize("kind", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", KINDS)
def test_packed_equals_separate_documents(pair, kind, checkpointing):
    reference, ours = pair
    ours.train()
    ours.transformer.attention, ours.transformer.checkpointing = kind, checkpointing
    batch = packed_batch()
    logits = separate_logits(reference, batch["input_ids"])
    wanted = F.cross_entropy(logits, batch["labels"][0], ignore_index=IGNORE, reduction="sum")
    wanted.backward()
    loss = ours(**batch)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    without = {k: v for k, v in batch.items() if k != "labels"}
    torch.testing.assert_close(ours(**without).logits[0], logits, rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(min=1e-9), name


def test_changing_a_document_changes_no_other(pair):
    _, ours = pair
    batch = packed_batch()
    batch.pop("labels")
    before = ours(**batch).logits[0].split(LENGTHS)
    changed = batch["input_ids"].clone()
    start = sum(LENGTHS[:2])
    changed[0, start : start + LENGTHS[2]] = (changed[0, start : start + LENGTHS[2]] + 1) % VOCAB
    after = ours(**(batch | {"input_ids": changed})).logits[0].split(LENGTHS)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 2)


def test_bf16_is_no_worse_than_eager_bf16(pair):
    reference, ours = pair
    batch = packed_batch()
    truth = separate_logits(reference, batch["input_ids"])
    eager_half = copy.deepcopy(reference).bfloat16()
    half = copy.deepcopy(ours).bfloat16()
    batch.pop("labels")
    theirs = (separate_logits(eager_half, batch["input_ids"]).float() - truth).pow(2).mean().sqrt()
    mine = (half(**batch).logits[0].float() - truth).pow(2).mean().sqrt()
    assert mine <= 1.05 * theirs


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(pair, side):
    reference, ours = pair
    ids, mask = torch.randint(0, VOCAB, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :8] = 0
    if side == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = reference(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found = ours(input_ids=ids, attention_mask=mask).logits
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found * mask[..., None], wanted * mask[..., None], rtol=1e-5, atol=1e-5)


def test_generation_with_cache_equals_without_and_hugging_face(pair):
    reference, ours = pair
    ids, mask = torch.randint(1, VOCAB, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    settings = dict(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = ours.generate(use_cache=True, **settings)
    assert torch.equal(cached, ours.generate(use_cache=False, **settings))
    assert torch.equal(cached, reference.generate(**settings))
    alone = ours.generate(**(settings | {"input_ids": ids[1:2, 4:], "attention_mask": mask[1:2, 4:]}))
    assert torch.equal(cached[1, 9:], alone[0, 5:])


def test_dropout_is_applied_and_seeded(pair):
    reference, _ = pair
    values = config(attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1, rotary_dim=reference.config.rotary_dim,
                    n_inner=reference.config.n_inner)
    model = CausalLM(values).train()
    model.load_state_dict(reference.state_dict())
    batch = packed_batch()

    def run(seed: int) -> float:
        torch.manual_seed(seed)
        return model(**batch).item()

    assert run(1) == run(1)
    assert run(1) != run(2)
    model.eval()
    assert run(1) == run(2)
