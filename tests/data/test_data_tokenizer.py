"""GPT-J's tokenizer and the document encoder, against transformers' own encoding."""

from __future__ import annotations

import random

import pytest
from toy_encoder import write_jsonl
from transformers import AutoTokenizer

from finetune.assets.paths import asset, resolve
from finetune.config import ClmConfig, InstructConfig
from finetune.data import tokenizer as tokenizer_module
from finetune.data.cache import build_store
from finetune.data.encode_clm import TextEncoder
from finetune.data.mixture import DataSource
from finetune.data.tokenizer import (
    TextTokenizer,
    build_gptj_tokenizer,
    load_tokenizer,
    text_pieces,
    token_ids,
    token_limit,
    token_problems,
    tokenizer_fingerprint,
)
from finetune.errors import UserError

OWN = ClmConfig(tokens=["<think>", "</think>"])
SAMPLES = [
    "Hello world",
    " leading",
    "it's  we'll\n\n\n  x ",
    "1234 €5",
    "\t tabs\r\n",
    "Ünïcödé 中文 😀",
    "<|endoftext|>x",
    "a<|extratoken_143|>b",
    "\u00a0nbsp\u2028sep\u0085nel",
]


def test_gptj_tokenizer(tokenizer):
    assert len(tokenizer) == 50400
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 50256
    assert tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|extratoken_1|>", "<|extratoken_143|>"]
    ) == [
        50256,
        50257,
        50399,
    ]
    assert tokenizer.model_max_length == 2048 and tokenizer.pad_token is None
    # Published GPT-2 ids; a wrong merge order or an empty vocabulary changes them.
    assert tokenizer.encode("Hello world, it's 2024.\n\nBye") == [
        15496,
        995,
        11,
        340,
        338,
        48609,
        13,
        198,
        198,
        3886,
        68,
    ]
    assert all(tokenizer.decode(tokenizer.encode(sample)) == sample for sample in SAMPLES)


def test_saved_tokenizer_reloads_identically(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert (
            len(again) == 50400 and again.eos_token_id == 50256 and again.model_max_length == 2048
        )
        assert [again.encode(sample) for sample in SAMPLES] == [
            tokenizer.encode(sample) for sample in SAMPLES
        ]
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_a_directory_without_tokenizer_gets_gptjs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    assert len(load_tokenizer(str(tmp_path))) == 50400


def test_a_tokenizer_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match=r"(?s)no tokenizer can be loaded.*model.tokenizer=null"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)someone/nothing: no tokenizer.*needs the network"):
        load_tokenizer("someone/nothing")


def test_fingerprint_follows_the_ids_and_nothing_else(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    other = load_tokenizer(None)
    other("a text", truncation=True, max_length=4, padding=False)
    assert tokenizer_fingerprint(other) == before
    other.add_tokens(["<new>"])
    assert tokenizer_fingerprint(other) != before


@pytest.fixture
def marked():
    """GPT-J's tokenizer with two more tokens, which GPT-J's embedding has no rows for."""
    tokenizer = build_gptj_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_token_without_a_row_is_named_with_its_line(marked, tmp_path, on_bad_row):
    """Neither counted as a bad row nor found again only by the model: the tokenizer is the wrong one."""
    encoder, limit = TextEncoder(marked, "text", None), token_limit(marked, 50400, "Try another.")
    spec = str(write_jsonl(tmp_path / "x.jsonl", [{"text": "hello"}, {"text": "<|im_end|> hello"}]))
    words = r"x.jsonl:2: .*'<\|im_end\|>' has id 50401, and the model's embedding has 50400 rows(.|\n)*Try another."
    with pytest.raises(UserError, match=words):
        build_store([DataSource(spec)], encoder, on_bad_row=on_bad_row, limit=limit)
    build_store([DataSource(spec)], encoder, on_bad_row=on_bad_row)  # as for a larger embedding
    with pytest.raises(UserError, match=r"x.jsonl, example 2 of 2: .*has id 50401"):
        build_store([DataSource(spec)], encoder, on_bad_row=on_bad_row, limit=limit)


def test_a_large_tokenizer_is_fine_where_its_tokens_do_not_occur(marked, tmp_path):
    encoder, limit = TextEncoder(marked, "text", None), token_limit(marked, 50400, "")
    spec = str(write_jsonl(tmp_path / "x.jsonl", [{"text": "hello"}, {"text": "im_end"}]))
    assert (
        len(build_store([DataSource(spec)], encoder, limit=limit))
        == len(build_store([DataSource(spec)], encoder, limit=limit))
        == 2
    )


def test_most_tokenizers_need_no_check(tokenizer, marked):
    assert token_limit(tokenizer, 50400, "") is None and token_limit(marked, 50402, "") is None
    limit = token_limit(marked, 50401, "")
    assert limit is not None
    limit.check([0, 50400], "")
    with pytest.raises(UserError, match="50401"):
        limit.check([50401], "")


def test_documents_end_with_eos_and_know_their_subset(tokenizer, tmp_path):
    records = [
        {"text": "Hello world", "meta": {"pile_set_name": "Wiki"}},
        {"text": ""},
        {"text": "Bye"},
        {"text": "a<|endoftext|>b", "meta": {"pile_set_name": None}},
    ]
    store = build_store(
        [DataSource(str(write_jsonl(tmp_path / "d.jsonl", records)))],
        TextEncoder(tokenizer, "text", "meta.pile_set_name"),
    )
    assert store.column("ids").tolist() == [
        15496,
        995,
        50256,
        3886,
        68,
        50256,
        64,
        50256,
        65,
        50256,
    ]
    assert store.offsets.tolist() == [0, 3, 6, 10]
    assert store.names("subset") == ["Wiki", ""] and store.column("subset").tolist() == [0, 1, 1]
    assert store.stats["documents"] == 4 and store.stats["tokens_by_name"] == {
        "subset": {"": 7, "Wiki": 3}
    }


def test_encoder_fingerprint(tokenizer):
    prints = {
        TextEncoder(tokenizer, *fields).fingerprint()
        for fields in (("text", None), ("text", "meta"), ("body", None))
    }
    assert len(prints) == 3


def test_truncation_set_elsewhere_does_not_cut_documents():
    tokenizer = load_tokenizer(None)
    tokenizer("a b c d", truncation=True, max_length=2)
    assert len(TextTokenizer(tokenizer)(["a b c d"])[0]) == 4


@pytest.fixture(scope="module")
def texts_to_ids(tokenizer):
    return TextTokenizer(tokenizer)


@pytest.mark.parametrize("seed", range(40))
def test_cutting_a_long_text_does_not_change_its_ids(tokenizer, texts_to_ids, monkeypatch, seed):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 7)
    rng = random.Random(seed)
    parts = [
        "a",
        "word",
        "'s",
        "'",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "12",
        ".",
        "...",
        "é",
        "中",
        "😀",
        "\u00a0",
        "\u2028",
        "_",
        "-",
        "<|endoftext|>",
        "\u0085",
        "\x1c",
        "²",
        "e\u0301",
    ]
    text = "".join(rng.choices(parts, k=300))
    texts = [text, "", "short", text[::-1]]
    assert len(list(text_pieces(text))) > 5 and "".join(text_pieces(text)) == text
    assert texts_to_ids(texts) == [tokenizer.encode(t) for t in texts]


def test_assets():
    assert resolve("asset:tokenizer/encoder.json") == str(asset("tokenizer") / "encoder.json")
    assert resolve("asset:tokenizer") == str(asset("tokenizer"))
    assert resolve("org/name") == "org/name" and resolve("/a/b") == "/a/b"
    for name in ("nothing", "..", "../data", ""):
        with pytest.raises(UserError, match=r"(?s)there is no asset.*tokenizer"):
            resolve(f"asset:{name}")


def test_own_tokens_are_names_of_spare_rows(tokenizer, tmp_path):
    """In order, from the first on; all other texts keep their ids, and transformers reads the same files."""
    own = load_tokenizer(None, OWN)
    assert token_ids(own, OWN) == {"<think>": 50257, "</think>": 50258}
    assert (len(own), own.eos_token_id, own.pad_token) == (50400, 50256, None)
    own.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        assert own.encode(text) == saved.encode(text) == tokenizer.encode(text)
    assert saved.encode("a<think> b</think>") == [64, 50257, 275, 50258]
    assert saved.decode([64, 50257], skip_special_tokens=True) == "a<think>"
    assert tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer)
    # An export's tokenizer has them by itself, and naming them again changes nothing.
    again = load_tokenizer(str(tmp_path), OWN)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(own)


def test_chatml_brings_two_tokens_and_ends_turns_by_the_second(tmp_path):
    cfg = InstructConfig(template="chatml", tokens=["<think>", "<|im_end|>"])
    load_tokenizer(None, cfg).save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert token_ids(saved, cfg) == {"<|im_start|>": 50257, "<|im_end|>": 50258, "<think>": 50259}
    assert (saved.eos_token, saved.eos_token_id, saved.bos_token_id) == ("<|im_end|>", 50258, 50256)
    ids = saved.encode("<|im_start|>a<think><|im_end|>")
    assert ids == [50257, 64, 50259, 50258] and saved.decode(ids, True) == "a<think>"


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (["hello"], "the tokenizer has 'hello' (31373) already"),
        (["<|endoftext|>", "<a>"], "the tokenizer has '<|endoftext|>' (50256) already"),
        ([f"<{i}>" for i in range(144)], "144 tokens of your own need as many spare rows"),
        ([f"<{i}>" for i in range(143)], None),
    ],
)
def test_names_that_cannot_be_given(tokens, problem):
    problems = list(token_problems(None, ClmConfig(tokens=tokens), 50400))
    assert [problem] == [p.problem[: len(problem or "")] for p in problems] or not (
        problem or problems
    )
