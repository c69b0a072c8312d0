"""Every way in which data can be bad names file and line, and says what to do."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import time

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from toy_encoder import ToyEncoder

from finetune.data import utf8
from finetune.data.cache import build_store
from finetune.data.encode_clm import TextEncoder
from finetune.data.mixture import DataSource
from finetune.data.sources import read
from finetune.errors import UserError

GOOD = b'{"text": "good"}\n'
# Text that does not compress well: a cut or a flipped byte then lies in the middle of the data.
NOISE = "".join(
    json.dumps({"text": f"{random.Random(i).getrandbits(256):064x}"}) + "\n" for i in range(4000)
).encode()

BAD_ROWS = {
    "broken JSON": (
        "a.jsonl",
        GOOD + b'{"text": "a}\n' + GOOD,
        2,
        "broken JSON: Unterminated string",
    ),
    "no comma": (
        "a.jsonl",
        GOOD + b'{"text": "a" "b": 1}\n' + GOOD,
        2,
        "broken JSON: Expecting ',' delimiter at column 14",
    ),
    "single quotes": ("a.jsonl", GOOD + b"{'text': 'a'}\n" + GOOD, 2, "broken JSON"),
    "cut last line": ("a.jsonl", GOOD * 2 + b'{"text": "go', 3, "may have been cut off"),
    "invalid UTF-8": (
        "a.jsonl",
        GOOD + b'{"text": "caf\xe9"}\n' + GOOD,
        2,
        "invalid UTF-8: byte 0xe9 at position 13",
    ),
    "half a surrogate": (
        "a.jsonl",
        GOOD + b'{"text": "\\ud83d!"}\n' + GOOD,
        2,
        "half a surrogate pair",
    ),
    "an array": ("a.jsonl", GOOD + b'["a", "b"]\n' + GOOD, 2, "the row is an array, not an object"),
    "a string": ("a.jsonl", GOOD + b'"text"\n' + GOOD, 2, "the row is a string, not an object"),
    "too deep": (
        "a.jsonl",
        GOOD + b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n" + GOOD,
        2,
        "nested too deeply",
    ),
    "huge number": (
        "a.jsonl",
        GOOD + b'{"text": ' + b"1" * 5000 + b"}\n" + GOOD,
        2,
        "broken JSON: Exceeds the limit",
    ),
    "in a .zst": (
        "a.jsonl.zst",
        zstandard.compress(GOOD + b"oops\n" + GOOD),
        2,
        "zstd -dc < .*a.jsonl.zst . sed -n 2p",
    ),
    "CSV, too many fields": (
        "a.csv",
        b"text,n\ngood,1\na,2,3\ngood,4\n",
        3,
        "the row has 3 fields, the header 2",
    ),
    "CSV, too few fields": (
        "a.csv",
        b"text,n\ngood,1\na\ngood,4\n",
        3,
        "the row has 1 fields, the header 2",
    ),
    "CSV, invalid UTF-8": (
        "a.csv",
        b"text,n\ngood,1\ncaf\xe9,2\ngood,4\n",
        3,
        "invalid UTF-8: byte 0xe9",
    ),
    "CSV, quote": ("a.csv", b'text,n\n"good",1\n"a"b,2\ngood,4\n', 3, "broken CSV"),
    "text, invalid UTF-8": ("a.txt", b"one\ntwo\ncaf\xe9\n", 3, "invalid UTF-8: byte 0xe9"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_and_the_rest_is_read(tmp_path, kind):
    name, data, line, problem = BAD_ROWS[kind]
    path = tmp_path / name
    path.write_bytes(data)
    found = list(read(str(path), "train"))
    faults = [row for row in found if isinstance(row, UserError)]
    assert [fault.where for fault in faults] == [f"{path}:{line}"]
    assert str(faults[0]).startswith(f"{path}:{line}: ")
    assert re.search(problem, str(faults[0])), str(faults[0])
    assert faults[0].remedy
    assert len(found) == (1 if name == "a.txt" else 3)


def test_a_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert [record for _, record in read(str(tmp_path / "a.jsonl"), "train")] == [
        {"text": "\U0001f600"}
    ]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) * 3 + data[middle + 3 :]


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(i) for i in range(1000)]}), sink)
    return sink.getvalue().to_pybytes()


EMPTY_FILES = {
    "empty": ("a.jsonl", b""),
    "blank": ("a.jsonl", b"\n\n  \n"),
    "empty gz": ("a.jsonl.gz", b""),
    "empty zst": ("a.jsonl.zst", zstandard.compress(b"")),
    "empty JSON": ("a.json", b"[]"),
    "empty text": ("a.txt", b""),
    "blank text": ("a.txt", b" \n\n"),
    "empty CSV": ("a.csv", b""),
    "header only": ("a.csv", b"text,n\n"),
    "separator only": ("a.csv", b"sep=;\n"),
}
HTML = b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 2469606195\n" % (
    b"4d7a" * 16
)

BAD_FILES = {
    "truncated gz": (
        "a.jsonl.gz",
        gzip.compress(NOISE)[:-3000],
        "the gzip stream is truncated; the last good line is 3",
    ),
    "gz trailer cut": (
        "a.jsonl.gz",
        gzip.compress(NOISE)[:-3],
        "the gzip stream is truncated; the last good line is 4000",
    ),
    "corrupt gz": ("a.jsonl.gz", flipped(gzip.compress(NOISE)), "the gzip data is damaged"),
    "no gz": (
        "a.jsonl.gz",
        bytes(range(256)) * 9,
        "the gzip data is damaged .*; no line of it can be read",
    ),
    "gz in gz": ("a.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "this file is compressed twice"),
    "workbook": (
        "a.csv",
        b"PK\x03\x04" + NOISE,
        "this file is a zip archive or an Excel workbook, not .csv",
    ),
    "web page": ("a.jsonl", HTML, "this file is a web page"),
    "pointer to text": (
        "a.txt",
        POINTER,
        "this is a git-lfs pointer, not the file itself; its 2.30 GiB are still",
    ),
    "pointer to lines": ("a.jsonl", POINTER, "git-lfs pointer"),
    "pointer to a table": ("a.csv", POINTER, "git-lfs pointer"),
    "pointer to parquet": ("a.parquet", POINTER, "git-lfs pointer"),
    "pointer to an archive": ("a.jsonl.zst", POINTER, "git-lfs pointer"),
    "UTF-16 without mark": (
        "a.csv",
        "text,n\na,1\n".encode("utf-16-le"),
        "a.csv:1: this file is UTF-16-LE, not UTF-8",
    ),
    "header without names": ("a.csv", b",,\na,b,c\n", "a.csv:1: the first line names no column"),
    "truncated zst": (
        "a.jsonl.zst",
        zstandard.compress(NOISE)[:-3000],
        "the zstd stream is truncated; the last good line is ",
    ),
    "truncated zst in the second frame": (
        "a.jsonl.zst",
        zstandard.compress(GOOD * 5) + zstandard.compress(NOISE)[:40],
        "truncated; the last good line is 5",
    ),
    "corrupt zst": (
        "a.jsonl.zst",
        flipped(zstandard.ZstdCompressor(write_checksum=True).compress(NOISE)),
        "the zstd data is damaged",
    ),
    "no zst": ("a.jsonl.zst", bytes(range(256)) * 9, "the zstd data is damaged"),
    "truncated parquet": ("a.parquet", parquet()[:-100], "not a readable parquet file"),
    "no parquet": ("a.parquet", NOISE, "not a readable parquet file"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl:1: this file is UTF-16"),
    "unknown suffix": ("a.docx", b"PK", "unknown format '.docx'"),
    "JSON without data": (
        "a.json",
        b'{\n "rows": [1],\n "n": 2}',
        "a.json:3: this is one object without an array 'data'",
    ),
    "JSON data no array": (
        "a.json",
        b'{\n "data": {"a": 1}}',
        "a.json:2: 'data' is an object, not an array",
    ),
    "JSON is a string": ("a.json", b'"text"', "a.json:1: this is neither an array nor an object"),
    "JSON cut": ("a.json", b'[{"text": "a"},\n{"text": "b', "a.json:2: broken JSON: .*cut off"),
    "JSON cut between": (
        "a.json",
        b'[{"text": "a"},\n{"text": "b"}',
        "a.json:2: broken JSON: expected ',', found the end",
    ),
    "JSON broken": (
        "a.json",
        b'[{"text": "a"},\n{"text" "b"},\n{"text": "c"}]',
        "a.json:2: broken JSON",
    ),
    "JSON trailing comma": (
        "a.json",
        b'[{"text": "a"},\n]',
        "a.json:2: a comma stands before the closing bracket",
    ),
    "JSON and more": ("a.json", b'[{"text": "a"}]\n[1]', "a.json:2: there is more text"),
    "JSON invalid UTF-8": (
        "a.json",
        b'[{"text": "a"},\n{"text": "\xe9"}]',
        "a.json:2: invalid UTF-8: byte 0xe9",
    ),
    "JSON truncated gz": (
        "a.json.gz",
        gzip.compress(b"[" + b",\n".join(NOISE.splitlines()) + b"]")[:-300],
        "the gzip stream is truncated",
    ),
    "CSV header twice": ("a.csv", b"text,text\n1,2\n", "a.csv:1: the header names 'text' twice"),
    "CSV open quote": (
        "a.csv",
        b'text,n\ngood,1\n"open,2\ngood\nfine, or not,3\n',
        "a.csv:3: a quoted field is opened here and never closed",
    ),
    "CSV quote that ends wrongly": (
        "a.csv",
        b'text,n\ngood,1\n"open,2\ngood\nhe said "hi" there,4\ngood,5\n',
        "a.csv:3: a quoted field is opened here and ends wrongly 2 lines below",
    ),
    "CSV quotes that may enclose rows": (
        "a.csv",
        b'prompt,completion\nsum,one\n"add,two\nall,three\nup",four\n',
        "a.csv:3: a quote opens here and seems to swallow the 2 rows behind it",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_raised(tmp_path, kind):
    name, data, problem = BAD_FILES[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=problem) as caught:
        for _ in read(str(tmp_path / name), "train"):
            pass
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("kind", EMPTY_FILES)
def test_an_empty_file_is_a_bad_row(tmp_path, toy, kind):
    """It stops a run, or is told and left out; nothing but empty files is an error all the same."""
    name, data = EMPTY_FILES[kind]
    (tmp_path / "all").mkdir()
    path = tmp_path / "all" / name
    path.write_bytes(data)
    (fault,) = read(str(path), "train")
    assert isinstance(fault, UserError) and str(fault).startswith(
        f"{path}: the file holds no record"
    )
    with pytest.raises(UserError, match=r"(?s)no example is left.*the file holds no record"):
        build_store([DataSource(str(path))], toy, on_bad_row="skip")
    (tmp_path / "all" / "good.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match="the file holds no record"):
        build_store([DataSource(str(tmp_path / "all"))], toy)
    store = build_store([DataSource(str(tmp_path / "all"))], toy, on_bad_row="skip")
    assert (
        len(store) == 1
        and store.stats["bad_rows"] == 1
        and str(path) in store.stats["bad_row_messages"][0]
    )


@pytest.mark.parametrize("cut", range(1, 60))
def test_every_cut_of_a_zst_or_gz_is_noticed(tmp_path, cut):
    for name, whole in (
        ("a.jsonl.zst", zstandard.compress(GOOD * 3)),
        ("a.jsonl.gz", gzip.compress(GOOD * 3)),
    ):
        if cut < len(whole):
            (tmp_path / name).write_bytes(whole[:-cut])
            with pytest.raises(UserError, match="truncated"):
                list(read(str(tmp_path / name), "train"))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(utf8, "LINE_LIMIT_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"[" + b"1," * (1 << 20))
    with pytest.raises(UserError, match=r"(?s)a.jsonl:2: a line is longer than .*name it .json"):
        list(read(str(tmp_path / "a.jsonl"), "train"))


def test_missing_files(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"no such file or directory\n  Nearest in .*: train.jsonl"):
        read(str(tmp_path / "trian.jsonl"), "train")
    with pytest.raises(UserError, match="no file matches"):
        read(str(tmp_path / "*.csv"), "train")
    with pytest.raises(UserError, match="does not exist either"):
        read(str(tmp_path / "nowhere" / "a.jsonl"), "train")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="no data file in this directory"):
        read(str(tmp_path / "sub"), "train")
    with pytest.raises(UserError, match="there is no asset 'nothing'"):
        read("asset:nothing/a.jsonl", "train")


@pytest.mark.parametrize("spec", ["someone/data-set", "wikitext"])
def test_hub_ids_offline_say_so_at_once(tmp_path, monkeypatch, spec):
    import datasets  # noqa: F401  (its import is not what is timed)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(
        UserError, match=f"(?s){spec}: there is no such file.*HF_HUB_OFFLINE.*data.train="
    ):
        read(spec, "train")
    assert time.monotonic() - started < 10


def test_an_unreachable_hub_is_not_waited_for(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the Hugging Face hub cannot be reached"):
        read("someone/data-set", "train")


def test_an_unreadable_file(tmp_path, toy):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(UserError, match="cannot be read"):
        build_store([DataSource(str(path))], toy)


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    return TextEncoder(tokenizer, "text", None)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"content": "a"},
            r"a.jsonl:2: field 'text' is missing; this record has 'content'.\n  Try task.text_field=content.",
        ),
        ({"text": 7}, "a.jsonl:2: field 'text' is a number, not a string"),
        ({"text": None}, "a.jsonl:2: field 'text' is null, not a string"),
        ({"text": ["a"]}, "a.jsonl:2: field 'text' is an array, not a string"),
        ({}, "a.jsonl:2: field 'text' is missing; this record has no field at all"),
    ],
)
def test_missing_and_wrongly_typed_text(tmp_path, text_encoder, record, problem):
    (tmp_path / "a.jsonl").write_bytes(GOOD + json.dumps(record).encode() + b"\n" + GOOD)
    with pytest.raises(UserError, match=problem):
        build_store([DataSource(str(tmp_path / "a.jsonl"))], text_encoder)


def mixed(tmp_path, bad: int):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(GOOD + b"oops\n" for _ in range(bad)) + GOOD + b'{"other": 1}\n')
    return str(path)


def test_bad_rows_are_skipped_and_counted(tmp_path, toy):
    store = build_store([DataSource(mixed(tmp_path, 7))], toy, on_bad_row="skip")
    assert store.stats["bad_rows"] == 8 and store.stats["documents"] == 8 == len(store)
    with pytest.raises(
        UserError, match=r"(?s)8 bad rows, more than data.max_bad_rows=7.*a.jsonl:2: "
    ):
        build_store(
            [DataSource(mixed(tmp_path, 7))], toy, on_bad_row="skip", max_bad_rows=7
        )  # also from the cache
    assert (
        len(store.stats["bad_row_messages"]) == 5
        and ":2: broken JSON" in store.stats["bad_row_messages"][0]
    )


def test_too_many_bad_rows_end_the_build(tmp_path, toy):
    with pytest.raises(
        UserError, match=r"(?s)4 bad rows, more than data.max_bad_rows=3.*a.jsonl:2: .*a.jsonl:4: "
    ):
        build_store([DataSource(mixed(tmp_path, 7))], toy, on_bad_row="skip", max_bad_rows=3)
    assert not list((tmp_path / "cache").glob("*[!k]"))


def test_the_first_bad_row_in_order_is_raised(tmp_path, toy):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        GOOD + b'{"other": 1}\n' + b"oops\n"
    )  # the encoder's row stands before the parser's
    with pytest.raises(UserError, match=r"a.jsonl:2: no text"):
        build_store([DataSource(str(path))], toy)


def test_only_bad_or_empty_rows(tmp_path, toy):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"oops\n" * 3)
    with pytest.raises(
        UserError, match=r"(?s)no example is left.*3 bad rows.*a.jsonl:1: broken JSON"
    ):
        build_store([DataSource(str(path))], toy, on_bad_row="skip")
    path.write_bytes(b'{"text": ""}\n')
    with pytest.raises(UserError, match=r"no example is left to train on .1 empty row"):
        build_store([DataSource(str(path))], ToyEncoder())


def test_a_truncated_file_is_a_fault_even_when_rows_are_skipped(tmp_path, toy):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(NOISE)[:-3000])
    with pytest.raises(UserError, match="the zstd stream is truncated"):
        build_store([DataSource(str(path))], toy, on_bad_row="skip")
