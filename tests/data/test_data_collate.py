"""Flat batches: exact arrays, and the proof that no target is lost or counted twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from toy_encoder import EOS, ToyEncoder, write_jsonl

from finetune.data.cache import build_store
from finetune.data.collate import lm_batch
from finetune.data.columns import IGNORE
from finetune.data.mixture import DataSource
from finetune.data.packing import best_fit, document_chunks, one_per_sequence, stream_blocks


def store_of(tmp_path, texts, columns=("ids", "scored", "weight", "subset", "answer")):
    encoder = ToyEncoder(f"toy {columns}")
    encoder.columns = {name: encoder.columns[name] for name in columns}
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    return build_store([DataSource(str(file))], encoder)


def ids(text: str) -> list[int]:
    return [
        EOS if character == "E" else IGNORE if character == "-" else ord(character)
        for character in text
    ]


def test_the_example_of_the_docstring(tmp_path):
    store = store_of(tmp_path, ["abcd", "xy"], columns=("ids",))
    batch = lm_batch(store, stream_blocks(store.offsets, 4), [0, 1])
    assert batch["ids"].tolist() == ids("abcdExyE")
    assert batch["positions"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert batch["cu_seqlens"].tolist() == [0, 4, 5, 8]
    assert batch["labels"].tolist() == ids("bcdE-yE-")
    assert batch["examples"].tolist() == [0, 0, 1]
    assert batch["tokens"] == 8
    assert {key: value.dtype.name for key, value in batch.items() if key != "tokens"} == {
        "ids": "int64",
        "positions": "int64",
        "cu_seqlens": "int32",
        "labels": "int64",
        "examples": "int64",
    }


def test_rows_come_in_the_order_asked_for(tmp_path):
    store = store_of(tmp_path, ["abcd", "xy"], columns=("ids",))
    rows = document_chunks(store.offsets, 4)
    batch = lm_batch(store, rows, np.array([2, 0]))
    assert batch["ids"].tolist() == ids("xyEabcd") and batch["labels"].tolist() == ids("yE-bcdE")
    assert batch["examples"].tolist() == [1, 0] and batch["cu_seqlens"].tolist() == [0, 3, 7]


def test_only_scored_targets_are_labels(tmp_path):
    store = store_of(tmp_path, ["ABcd", "Xy"])  # capitals are not scored
    batch = lm_batch(store, one_per_sequence(store.offsets), [0, 1])
    assert batch["ids"].tolist() == [ord("A"), ord("B"), *ids("cdE"), ord("X"), *ids("yE")]
    assert batch["labels"].tolist() == ids("-cdE-yE-")


def test_no_rows_give_one_ignored_token(tmp_path):
    store = store_of(tmp_path, ["ab"])
    batch = lm_batch(store, one_per_sequence(store.offsets), [])
    assert {key: np.asarray(value).tolist() for key, value in batch.items()} == {
        "ids": [0],
        "positions": [0],
        "cu_seqlens": [0, 1],
        "labels": [IGNORE],
        "examples": [-1],
        "tokens": 0,
    }


@pytest.mark.parametrize("policy", [stream_blocks, document_chunks, best_fit])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_a_target_exactly_once(tmp_path, policy, seed):
    rng = np.random.default_rng(seed)
    texts = [
        "".join(chr(rng.integers(97, 123)) for _ in range(rng.integers(1, 25))) for _ in range(30)
    ]
    store = store_of(tmp_path, texts)
    rows = policy(store.offsets, 26 if policy is best_fit else int(rng.integers(1, 12)))
    seen: Counter = Counter()
    for row in rng.permutation(len(rows)):
        batch = lm_batch(store, rows, [int(row)])
        segments = range(int(rows.pointers[row]), int(rows.pointers[row + 1]))
        for n, segment in enumerate(segments):
            a, b = batch["cu_seqlens"][n : n + 2]
            document = int(batch["examples"][n])
            first = int(rows.starts[segment] - store.offsets[document])
            assert batch["positions"][a:b].tolist() == list(range(b - a))
            for i, label in enumerate(batch["labels"][a:b].tolist()):
                if label != IGNORE:
                    seen[document, first + i + 1] += 1
                    assert label == ([*map(ord, texts[document]), EOS])[first + i + 1]
    # Every token but each document's first, the closing eos included.
    assert seen == Counter((d, i) for d, text in enumerate(texts) for i in range(1, len(text) + 1))


def test_grouping_rows_into_batches_changes_nothing(tmp_path):
    store = store_of(tmp_path, ["abcdefg", "hi", "jklmnopqr", "s"])
    rows = stream_blocks(store.offsets, 5)
    whole = lm_batch(store, rows, list(range(len(rows))))
    parts = [lm_batch(store, rows, [row]) for row in range(len(rows))]
    for key in ("ids", "labels", "positions", "examples"):
        assert whole[key].tolist() == np.concatenate([part[key] for part in parts]).tolist()
