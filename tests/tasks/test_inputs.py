"""What a run tells about its data before the first step."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from finetune.check import check
from finetune.cli.generate import read_prompts
from finetune.cli.schemas import GenerateConfig
from finetune.compose import compose_train
from finetune.config import DataConfig
from finetune.data.sources import data_notes
from finetune.dist import World
from finetune.errors import UserError
from finetune.training.inputs import prepare_inputs


def test_bad_rows_left_out_files_and_shared_files_are_told(tmp_path):
    """On the terminal and in the notes that result.json and the page take."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    for name, content in {
        "a.jsonl": rows + "oops\n",
        "held.jsonl": rows,
        "b.docx": "x",
        "c.txt": "",
    }.items():
        (tmp_path / name).write_text(content)
    cfg = compose_train(
        [
            "recipe=clm_pile_lora",
            "debug=tiny",
            f"data.train={tmp_path}",
            f"data.eval={tmp_path}/held.jsonl",
            "data.on_bad_row=skip",
            f"data.cache_dir={tmp_path}/.cache",
        ]
    )
    told: list[str] = []
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    inputs = prepare_inputs(cfg, 50400, alone, lambda name: nullcontext(), told.append)
    assert inputs.notes["train"] == [
        f"left out, of unknown format (.docx): 1 file, {tmp_path}/b.docx"
    ]
    assert inputs.notes["eval"][0].startswith(
        f"trained on as well: 1 of 1 file, {tmp_path}/held.jsonl; "
    )
    assert [line.split(";")[0] for line in told] == [
        f"train data: {inputs.notes['train'][0]}",
        "train data: 2 bad rows left out",
        f"eval data: trained on as well: 1 of 1 file, {tmp_path}/held.jsonl",
    ]
    assert len(inputs.train) == 4


def test_files_of_prompts_are_read_as_data_are(tmp_path):
    """Compressed ones and .ndjson too; another encoding and a git-lfs pointer are refused."""

    def prompts(name: str, data: bytes) -> list[str]:
        (tmp_path / name).write_bytes(data)
        return [
            row.record["prompt"]
            for row in read_prompts(GenerateConfig(prompts=str(tmp_path / name)))
        ]

    assert prompts("a.txt", b"\xef\xbb\xbfone\r\n\ntwo") == ["one", "two"]
    assert prompts("a.ndjson", b'{"prompt": "one"}\n') == ["one"]
    for data, problem in (
        (b"it\x92s fine\n", "read as cp1252 it says 'it\u2019s fine'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
    ):
        try:
            raise AssertionError(prompts("b.txt", data))
        except UserError as error:
            assert problem in str(error)


def test_an_unknown_encoding_is_told_with_the_other_problems():
    cfg = compose_train(
        ["recipe=clm_pile_lora", "debug=tiny", "data.encoding=latin9000", "data.max_bad_rows=-1"]
    )
    with pytest.raises(
        UserError, match=r"(?s)data.max_bad_rows = -1.*data.encoding = latin9000 is no encoding"
    ):
        check(cfg, 1, False)


def test_an_evaluation_does_not_need_the_training_data(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for gone in (tmp_path / "*.csv", tmp_path / "b.jsonl", tmp_path / "b.jsonl,c.jsonl"):
        assert data_notes(DataConfig(train=str(gone), eval=str(tmp_path))) == {
            "train": [],
            "eval": [],
        }
