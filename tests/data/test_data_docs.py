"""docs/data.md: its Python runs, its keys exist, its drawings are what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from finetune import config
from finetune.data.packing import best_fit, document_chunks, stream_blocks
from finetune.data.sources import READERS, field_error

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {
    "data": [config.DataConfig],
    "task": [config.ClmConfig, config.InstructConfig],
    "train": [config.TrainConfig],
}


def test_the_python_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
    exec(code, {})
    assert "tokens in" in capsys.readouterr().out


def test_every_key_is_in_the_schema():
    keys = re.findall(r"\b(data|task|train)\.([a-z_]+)(?==|`)", DOC)
    assert len(keys) > 10
    for section, key in keys:
        assert any(key in {f.name for f in dataclasses.fields(cls)} for cls in SECTIONS[section]), (
            section,
            key,
        )


def test_every_key_of_the_data_is_explained():
    for key in (field.name for field in dataclasses.fields(config.DataConfig)):
        assert re.search(rf"`[^`]*\bdata\.{key}\b", DOC), key


def test_every_format_is_listed():
    assert all(f"`{suffix.removesuffix('.gz').removesuffix('.zst')}`" in DOC for suffix in READERS)
    assert "`.gz`" in DOC and "`.zst`" in DOC


def test_the_error_is_the_one_that_is_shown():
    shown = "data/train-003.jsonl.zst:18204"
    fault = field_error(
        {"prompt": "", "response": ""}, "completion", shown, "task.completion_field"
    )
    assert str(fault) in DOC


def drawn(name: str) -> str:
    (line,) = [line for line in DOC.splitlines() if line.startswith(name)]
    return " ".join(re.findall(r"\[.*?\]", line.removeprefix(name)))


def draw(rows, letters: str) -> str:
    rows_text = []
    for a, b in zip(rows.pointers[:-1], rows.pointers[1:], strict=True):
        starts, lengths = rows.starts[a:b], rows.lengths[a:b]
        segments = [" ".join(letters[s : s + n]) for s, n in zip(starts, lengths, strict=True)]
        rows_text.append("[" + "|".join(segments) + "]")
    return " ".join(rows_text)


def test_the_packing_drawings():
    letters, offsets = "aaaaEbEccE", np.array([0, 5, 7, 10])
    assert draw(stream_blocks(offsets, 4), letters) == drawn("causal LM, packed")
    assert draw(document_chunks(offsets, 4), letters) == drawn("causal LM, train.packing=false")
    assert draw(best_fit(offsets, 5), letters) == drawn("instructions, packed (sequences of 5)")
