"""The training GPT-J against Hugging Face's eager one (logits, loss, every gradient, packed), and the same tensors in
Hugging Face's class, which generates."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from finetune.data.columns import IGNORE
from finetune.gptj.library import to_library_model
from finetune.gptj.model import MODELS, CausalLM, add_noise
from finetune.gptj.recompute import KINDS
from finetune.inference.sample import Sampling, continue_flat, continue_ids

LENGTHS = (7, 1, 12, 12, 30)
VOCAB = 500


def config(**changes) -> GPTJConfig:
    values = dict(
        n_embd=64,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        vocab_size=VOCAB,
        n_positions=64,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return GPTJConfig(**(values | changes))


@pytest.fixture(
    params=[{}, {"rotary_dim": 16, "n_inner": 96}],
    ids=["rotary part", "rotary whole head, own n_inner"],
)
def pair(request) -> tuple[GPTJForCausalLM, CausalLM]:
    torch.manual_seed(0)
    reference = GPTJForCausalLM(config(**request.param)).eval()
    ours = CausalLM(copy.deepcopy(reference.config)).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def test_noise_on_embeddings_is_that_of_transformers_by_document():
    """NEFTune: theirs for one document; packed ones are each as long as they are, not as long as the row."""
    x = torch.randn(1, 30, 64)
    embedding = torch.nn.Embedding(1, 64).train()
    embedding.neftune_noise_alpha = 5.0
    torch.manual_seed(2)
    wanted = neftune_post_forward_hook(embedding, None, x)
    torch.manual_seed(2)
    torch.testing.assert_close(add_noise(x, torch.tensor([0, 30]).int(), 5.0), wanted)
    noise = (add_noise(x, torch.tensor([0, 3, 30]).int(), 5.0) - x)[0].abs()
    for part, length in ((noise[:3], 3), (noise[3:], 27)):
        bound = 5 / (length * 64) ** 0.5
        assert 0.9 * bound < float(part.max()) <= bound * 1.001


def test_evaluation_has_no_noise():
    model = CausalLM(config(), neftune_alpha=5.0)
    ids = torch.arange(8)[None]
    assert torch.equal(model.eval()(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))


def packed_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    labels = torch.cat(
        [torch.cat([part[1:], torch.tensor([IGNORE])]) for part in ids[0].split(LENGTHS)]
    )[None]
    return {"input_ids": ids, "position_ids": positions, "cu_seqlens": cu, "labels": labels}


def separate_logits(reference, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([reference(input_ids=part[None]).logits[0] for part in ids[0].split(LENGTHS)])


@pytest.mark.parametrize("kind", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", KINDS)
def test_packed_equals_separate_documents(pair, kind, checkpointing):
    reference, ours = pair
    weights = ours.state_dict()
    ours = CausalLM(ours.config, kind, checkpointing).train()
    ours.load_state_dict(weights)
    batch = packed_batch()
    logits = separate_logits(reference, batch["input_ids"])
    wanted = F.cross_entropy(logits, batch["labels"][0], ignore_index=IGNORE, reduction="sum")
    wanted.backward()
    loss = ours(**batch)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    without = {k: v for k, v in batch.items() if k != "labels"}
    torch.testing.assert_close(ours(**without)[0], logits, rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(
            min=1e-9
        ), name


def test_changing_a_document_changes_no_other(pair):
    _, ours = pair
    batch = packed_batch()
    batch.pop("labels")
    before = ours(**batch)[0].split(LENGTHS)
    changed = batch["input_ids"].clone()
    start = sum(LENGTHS[:2])
    changed[0, start : start + LENGTHS[2]] = (changed[0, start : start + LENGTHS[2]] + 1) % VOCAB
    after = ours(**(batch | {"input_ids": changed}))[0].split(LENGTHS)
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
    mine = (half(**batch)[0].float() - truth).pow(2).mean().sqrt()
    assert mine <= 1.05 * theirs


def test_rows_are_documents_and_keep_picks_logits(pair):
    reference, ours = pair
    ids = torch.randint(0, VOCAB, (3, 9))
    wanted = reference(input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids), wanted, rtol=1e-5, atol=1e-5)
    kept = ours(input_ids=ids, keep=torch.tensor([8, 26]))
    torch.testing.assert_close(kept, wanted.view(27, -1)[[8, 26]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "argument", ["attention_mask", "past_key_values", "cache", "use_cache", "inputs_embeds"]
)
@pytest.mark.parametrize("head", MODELS)
def test_an_argument_that_forward_does_not_know_is_an_error(head, argument):
    model = MODELS[head](config())
    with pytest.raises(TypeError, match=argument):
        model(input_ids=torch.tensor([[1, 2]]), **{argument: None})


def test_library_model_has_the_same_tensors_and_text(pair):
    reference, ours = pair
    wanted = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    library = to_library_model(ours)
    assert type(library) is GPTJForCausalLM and library.config._attn_implementation == "sdpa"
    for name, tensor in library.state_dict().items():
        assert (
            torch.equal(tensor, wanted[name])
            and tensor.data_ptr() == ours.state_dict()[name].data_ptr()
        )
    ids, mask = torch.randint(1, VOCAB, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    torch.testing.assert_close(library(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = library.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(cached, reference.generate(input_ids=ids, attention_mask=mask, **settings))


@pytest.mark.parametrize(
    "how",
    [
        Sampling(12, 0),
        Sampling(12, 0.9, 0.8),
        Sampling(12, 1.0, top_k=5, stop=tuple("bdfhjlnprtvxz")),
    ],
    ids=["greedy", "top_p", "top_k and a stop string"],
)
def test_decoding_with_a_cache_and_without_gives_the_same_text(pair, how):
    _, ours = pair
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    without = continue_flat(ours, Letters(), prompts, how, torch.device("cpu"))
    for prompt, ids in zip(prompts, without, strict=True):  # no text depends on its neighbours
        assert continue_flat(ours, Letters(), [prompt], how, torch.device("cpu")) == [ids]
    assert (
        continue_ids(to_library_model(ours), Letters(), prompts, how, torch.device("cpu"))
        == without
    )
    if how.stop:
        texts = Letters().batch_decode(without)
        assert any(text.endswith(how.stop) for text in texts)
        assert not any(letter in text[:-1] for text in texts for letter in how.stop)


class Letters:
    """A tokenizer of one letter for every token."""

    eos_token_id = 0

    def batch_decode(self, rows, skip_special_tokens=True) -> list[str]:
        return ["".join(chr(97 + int(i) % 26) for i in row) for row in rows]


def test_dropout_is_applied_and_seeded(pair):
    reference, _ = pair
    values = config(
        attn_pdrop=0.3,
        resid_pdrop=0.2,
        embd_pdrop=0.1,
        rotary_dim=reference.config.rotary_dim,
        n_inner=reference.config.n_inner,
    )
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
