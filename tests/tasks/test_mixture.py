"""Mixtures and rows held out, for every task and format of file: what is trained on and what is evaluated."""

from __future__ import annotations

import csv
import gzip
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import zstandard

from finetune.compose import compose_train
from finetune.dist import World
from finetune.errors import UserError
from finetune.training.inputs import Inputs, prepare_inputs

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "txt")
RECIPES = ("clm_pile_lora", "instruct_lora", "classify_lora", "qa_lora", "preference_lora")


def rows(recipe: str, first: int, n: int) -> list[dict]:
    texts = [f"number {i} is followed by {i + 1}" for i in range(first, first + n)]
    if recipe == "clm_pile_lora":
        return [{"text": text} for text in texts]
    if recipe == "instruct_lora":
        return [{"prompt": text, "completion": "yes"} for text in texts]
    if recipe == "classify_lora":
        return [{"text": text, "label": ["even", "odd"][i % 2]} for i, text in enumerate(texts)]
    if recipe == "preference_lora":
        return [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in texts]
    answers = {"text": ["number"], "answer_start": [0]}
    return [{"context": text, "question": "What?", "answers": answers} for text in texts]


def write(file: Path, records: list[dict]) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    match file.name.partition(".")[2]:
        case "jsonl":
            file.write_text(lines)
        case "jsonl.gz":
            file.write_bytes(gzip.compress(lines.encode()))
        case "jsonl.zst":
            file.write_bytes(zstandard.compress(lines.encode()))
        case "json":
            file.write_text(json.dumps(records))
        case "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
        case "txt":
            file.write_text(records[0]["text"])
        case _:
            with file.open("w", newline="") as f:
                writer = csv.DictWriter(f, list(records[0]))
                writer.writeheader()
                writer.writerows(
                    {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
                    for record in records
                )
    return file


def inputs(recipe: str, *words: str, told: list[str] | None = None) -> Inputs:
    cfg = compose_train([f"recipe={recipe}", "debug=tiny", "train.packing=false", *words])
    say = [].append if told is None else told.append
    return prepare_inputs(cfg, 50400, ALONE, lambda name: nullcontext(), say)


def texts_of(found: Inputs, sequences) -> list[str]:
    """Decode the examples of some sequences."""
    examples = sequences.examples.tolist()
    offsets, ids = found.train.offsets, found.train.column("ids")
    return [found.tokenizer.decode(ids[offsets[i] : offsets[i + 1]]) for i in examples]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("ending", FORMATS)
def test_every_task_and_format_can_be_mixed_and_held_out(recipe, ending, tmp_path):
    if ending == "txt" and recipe != "clm_pile_lora":
        pytest.skip("plain text has no fields")
    a = write(tmp_path / f"a.{ending}", rows(recipe, 0, 20))
    b = write(tmp_path / "b.jsonl", rows(recipe, 1000, 40))
    train = f"data.train=[{{path: {a}, weight: 2}}, {{path: {b}, weight: 1}}]"
    found = inputs(recipe, train, "data.eval=0.1", "data.weight_by=rows")
    n = 1 if ending == "txt" else 20
    held = 0 if ending == "txt" else 2
    assert [(s.name, s.examples) for s in found.sources] == [(a.name, n - held), (b.name, 36)]
    epoch = n - held + 36
    assert [s.drawn for s in found.sources] == [round(epoch * 2 / 3), round(epoch / 3)]
    assert len(found.eval[""].rows) == held + 4
    trained = set(texts_of(found, found.rows))
    evaluated = set(texts_of(found, found.eval[""].rows))
    assert len(trained) == epoch and len(evaluated) == held + 4 and not trained & evaluated
    assert not found.notes["eval"]


def test_an_instruct_mixture_joins_layouts(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}]
    b = write(tmp_path / "b.jsonl", [{"messages": turns}])
    c = write(tmp_path / "c.csv", [{"instruction": "i", "input": "", "output": "c"}])
    found = inputs("instruct_lora", f"data.train=[{a}, {b}, {c}]", "data.eval=null")
    assert [source.examples for source in found.sources] == [1, 1, 1]


def test_only_the_first_rows_are_read(tmp_path):
    a = write(tmp_path / "a.jsonl", rows("clm_pile_lora", 0, 20))
    b = write(tmp_path / "b.jsonl", rows("clm_pile_lora", 50, 20))
    found = inputs(
        "clm_pile_lora",
        f"data.train=[{a},{{path: {b}, max_rows: 2}}]",
        f"data.eval={{one: {a}, two: {b}}}",
        "data.max_rows=5",
    )
    assert [source.examples for source in found.sources] == [5, 2]
    assert {name: len(part.store) for name, part in found.eval.items()} == {"one": 5, "two": 5}


def test_texts_that_are_trained_on_are_told(tmp_path):
    a = write(tmp_path / "a.jsonl", rows("classify_lora", 0, 20))
    b = write(tmp_path / "b.csv", rows("classify_lora", 15, 20))
    told: list[str] = []
    inputs("classify_lora", f"data.train={a}", f"data.eval={b}", told=told)
    assert any("trained on as well: the texts of 5 of 20 examples" in line for line in told)


def test_the_same_rows_are_held_out_whatever_the_template_and_the_adapter(tmp_path):
    a = write(tmp_path / "a.jsonl", rows("instruct_lora", 0, 30))
    held = [
        inputs("instruct_lora", f"data.train={a}", "data.eval_rows=3", *words)
        .eval[""]
        .rows.examples
        for words in ([], ["task.template=plain", "task.max_length=64"])
    ]
    assert held[0].tolist() == held[1].tolist() and len(held[0]) == 3


def test_a_source_whose_rows_are_all_held_out_is_told(tmp_path):
    a = write(tmp_path / "a.jsonl", rows("clm_pile_lora", 0, 20))
    held = inputs("clm_pile_lora", f"data.train={a}", "data.eval_rows=1")
    row = int(held.eval[""].rows.examples[0])
    b = write(tmp_path / "b.jsonl", rows("clm_pile_lora", row, 1))
    with pytest.raises(UserError, match=r"b.jsonl: every row of this source has the text"):
        inputs("clm_pile_lora", f"data.train=[{a},{b}]", "data.eval=0.05")
