"""A toy encoder without a tokenizer: every kind of column, one token per character."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from finetune.data.columns import Column
from finetune.errors import UserError

EOS = 0


class ToyEncoder:
    """One token per character, its code point, and an eos; every kind of column."""

    def __init__(self, name: str = "toy"):
        self.name, self.batches = name, 0
        self.columns = {
            "ids": Column("token", "uint16"),
            "scored": Column("token", "bool"),
            "weight": Column("scalar", "float32"),
            "subset": Column("category", "int32"),
            "answer": Column("blob", "uint8"),
        }

    def fingerprint(self) -> str:
        return self.name

    def encode(self, batch):
        self.batches += 1
        return [self._one(where, record) for where, record in batch]

    def _one(self, where, record):
        if "text" not in record:
            return UserError("no text", where)
        return [self._example(part) for part in record["text"].split("/") if part]

    def _example(self, text):
        ids = [ord(character) for character in text] + [EOS]
        scored = np.array([not character.isupper() for character in text] + [True])
        return {
            "ids": ids,
            "scored": scored,
            "weight": len(text),
            "subset": text[0],
            "answer": text.encode()[1:],
        }


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
