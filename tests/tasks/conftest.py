"""The real tokenizer once per session, a cache of its own for every test, and tasks built from literal rows."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
from task_setup import Made

from finetune.data import encode_classify, encode_instruct, encode_preference, encode_qa
from finetune.data.cache import build_store
from finetune.data.mixture import DataSource
from finetune.data.tokenizer import TextTokenizer, load_tokenizer
from finetune.tasks.build import build_task


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(None)


@pytest.fixture(scope="session", autouse=True)
def tokenizers_once():
    """Copying and hashing 50400 entries takes a second; the tests' encoders share one copy."""
    with pytest.MonkeyPatch.context() as patch:
        once = lru_cache(None)(TextTokenizer)
        for module in (encode_instruct, encode_classify, encode_qa, encode_preference):
            patch.setattr(module, "TextTokenizer", once)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tokenizer, tmp_path):
    """make(cfg, rows, eval_rows=None): task, store and rows of literal records, by the way that training takes."""

    def write(name, records):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        )
        return str(path)

    def made(cfg, records, eval_records=None, packing=True, previous=None, on_bad_row="error"):
        task = build_task(cfg, tokenizer, packing)
        if previous:
            task.prepare(None, previous)
        store = build_store(
            [DataSource(write("train", records))], task.encoder(), on_bad_row=on_bad_row
        )
        if not previous:
            task.prepare(store, None)
        if eval_records is not None:
            store = build_store(
                [DataSource(write("eval", eval_records))], task.encoder(), on_bad_row=on_bad_row
            )
        return Made(task, store, task.rows(store))

    return made
