"""The padding token of an export: plain transformers pools the trained token in batches padded on either side."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    GPTJConfig,
    GPTJForSequenceClassification,
    PreTrainedTokenizerFast,
)

from finetune.assets.paths import asset
from finetune.data.tokenizer import build_gptj_tokenizer
from finetune.errors import RunFailed
from finetune.export.hf_files import tokenizer_for
from finetune.export.proof import reference_outputs, verify_export
from finetune.export.run_info import RunInfo
from finetune.export.verify import check_eos
from finetune.export.write import finish_export, staged, write_model
from finetune.gptj.load import draw, meta_model

TEXTS = [
    "a good day",
    "naïve L'Haÿ-les-Roses ÿþÿ õ 100 %",
    "the cat sat on the mat, and the dog beside it",
    "",
    "x\n\ny \U0001f600",
]
NUMBERS = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "n_positions": 256,
    "initializer_range": 0.3,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "num_labels": 3,
}


def gpt2(pad: str | None = None) -> GPT2Tokenizer:
    """GPT-2's own 50257 entries, as many GPT-J on the hub have them."""
    vocabulary = json.loads((asset("tokenizer") / "encoder.json").read_text(encoding="utf-8"))
    lines = (asset("tokenizer") / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary, merges=[tuple(line.split()) for line in lines[1:] if line]
    )
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def words() -> PreTrainedTokenizerFast:
    """Whole words, every row of the embedding taken, and none that text cannot yield."""
    known = Tokenizer(models.WordLevel({"[E]": 0, "[U]": 1, "good": 2, "bad": 3}, unk_token="[U]"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=known, eos_token="[E]", unk_token="[U]", pad_token="[E]"
    )


@pytest.mark.parametrize(
    ("tokenizer", "rows", "pad"),
    [
        (build_gptj_tokenizer, 50400, ("<|extratoken_1|>", 50257)),
        (
            build_gptj_tokenizer,
            50257,
            ("<|pad|>", 187),
        ),  # the spare tokens have no rows; byte FF stands in no text
        (lambda: gpt2("<|endoftext|>"), 50257, ("<|pad|>", 187)),
        (lambda: gpt2("[PAD]"), 50257, ("<|pad|>", 187)),  # id 50257: there is no such row
        (lambda: gpt2("[PAD]"), 50258, ("[PAD]", 50257)),
        (gpt2, 50400, ("<|pad|>", 50257)),
    ],
    ids=[
        "spare token",
        "spare token without a row",
        "pad is eos",
        "pad without a row",
        "own pad",
        "new token",
    ],
)
def test_the_padding_token_has_a_row_and_changes_no_text(tokenizer, rows, pad, tmp_path):
    before = tokenizer()
    tokenizer_for(before, "classify", {}, rows).save_pretrained(tmp_path)
    ready = AutoTokenizer.from_pretrained(tmp_path)
    assert (ready.pad_token, ready.pad_token_id) == pad
    for text in TEXTS:
        assert ready(text)["input_ids"] == [*before(text)["input_ids"], before.eos_token_id]
        assert ready.decode(ready(text)["input_ids"], skip_special_tokens=True) == text

    torch.manual_seed(0)
    model = GPTJForSequenceClassification(
        GPTJConfig(**NUMBERS, vocab_size=rows, pad_token_id=pad[1])
    ).eval()
    with torch.no_grad():
        for side in ("left", "right"):
            batch = ready(TEXTS, padding=True, padding_side=side, return_tensors="pt")
            for text, found in zip(TEXTS, model(**batch).logits, strict=True):
                ids = torch.tensor([[*before(text)["input_ids"], before.eos_token_id]])
                wanted = model.score(model.transformer(ids).last_hidden_state)[0, -1]
                torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_a_vocabulary_without_a_token_to_spare_refuses_batches(tmp_path):
    ready = tokenizer_for(words(), "classify", {}, 4)
    assert ready.pad_token is None
    with pytest.raises(ValueError, match="padding token"):
        ready(["good", "bad good"], padding=True)
    model = GPTJForSequenceClassification(GPTJConfig(**NUMBERS, vocab_size=4, pad_token_id=None))
    with pytest.raises(ValueError, match="no padding token"):
        model(torch.tensor([[2, 0], [3, 0]]))


def test_language_models_may_pad_with_their_eos():
    assert tokenizer_for(gpt2("[PAD]"), "lm", {}, 50257).pad_token_id == 50256
    assert tokenizer_for(build_gptj_tokenizer(), "lm", {}, 50257).pad_token_id == 50256
    assert tokenizer_for(build_gptj_tokenizer(), "lm", {}, 50400).pad_token_id == 50257


@pytest.mark.slow
def test_verification_finds_an_export_that_pools_another_token(tmp_path, forked):
    """Alone every text is right; only batches show it."""
    config = GPTJConfig(**NUMBERS, vocab_size=50257, pad_token_id=50256)
    tokenizer, target = gpt2("<|endoftext|>"), tmp_path / "export"
    module = meta_model(config, "classify").to_empty(device="cpu").eval()
    for name, parameter in module.named_parameters():
        parameter.data = draw(name, tuple(parameter.shape), config, 0)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS if text]
    reference = reference_outputs(module, texts, "classify", 50256, torch.device("cpu"))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    info = RunInfo(
        "x", "classify", "", "fp32", {"problem": "single_label", "labels": ["a", "b", "c"]}
    )
    with staged(target) as stage:
        assert write_model(module.named_parameters(), shapes, "fp32", stage, 1.0) is None
        figures = finish_export(stage, "full", tokenizer, config, info, reference)
    assert figures["verified"] and figures["pads"]
    assert (
        set(figures["padded_max_difference"]) == {"left", "right"}
        and max(figures["padded_max_difference"].values()) < 1e-4
    )
    assert "Batches may be padded" in (target / "README.md").read_text()

    values = json.loads((target / "config.json").read_text())
    assert values["pad_token_id"] == 187
    (target / "config.json").write_text(json.dumps(values | {"pad_token_id": 50256}))
    with pytest.raises(RunFailed, match="not equal to the trained model"):
        verify_export(target, reference)
    with pytest.raises(ValueError, match="the tokenizer gives"):
        check_eos(tokenizer, [[*texts[0], 50256]])  # writes no eos
    check_eos(AutoTokenizer.from_pretrained(target), [[*texts[0], 50256]])
