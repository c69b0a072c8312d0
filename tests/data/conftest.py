"""The real tokenizer once per session, and a cache of its own for every test."""

from __future__ import annotations

import pytest
from toy_encoder import ToyEncoder

from finetune.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(None)


@pytest.fixture
def toy():
    return ToyEncoder()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
