"""All formats give the same records in the same order, each with its place."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from finetune.data import compressed_files, formats, large_json
from finetune.data.sources import MISSING, field_error, get_field, read
from finetune.errors import UserError

TEXTS = [
    "first",
    "with \u2028 a line separator",
    'quotes " and, commas',
    "two\nlines",
    "Ünïcödé 😀 中文",
    "last",
]
RECORDS = [{"text": text, "n": str(i)} for i, text in enumerate(TEXTS)]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def as_csv(delimiter: str = ",") -> bytes:
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "n"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue().encode()


def plain(tmp_path, name, data: bytes):
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


FORMATS = {
    "d.jsonl": lambda: JSONL,
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + JSONL,
    "crlf.jsonl": lambda: JSONL.replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda: JSONL.replace(b"\n", b"\n\n \n"),
    "nonewline.jsonl": lambda: JSONL[:-1],
    "d.jsonl.gz": lambda: gzip.compress(JSONL),
    "members.jsonl.gz": lambda: gzip.compress(JSONL[:77]) + gzip.compress(JSONL[77:]) + b"\0" * 100,
    "d.jsonl.zst": lambda: zstandard.compress(JSONL),
    "frames.jsonl.zst": lambda: (
        zstandard.compress(JSONL[:77]) + zstandard.compress(b"") + zstandard.compress(JSONL[77:])
    ),
    "skippable.jsonl.zst": lambda: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(JSONL),
    "array.json": lambda: json.dumps(RECORDS).encode(),
    "pretty.json": lambda: json.dumps(RECORDS, indent=2).encode(),
    "data.json": lambda: json.dumps(
        {"version": "v2.0", "data": RECORDS, "more": [1]}, indent=1
    ).encode(),
    "line.json": lambda: json.dumps({"version": "v2.0", "data": RECORDS}).encode(),
    "lines.json": lambda: JSONL,
    "array.json.gz": lambda: gzip.compress(json.dumps(RECORDS).encode()),
    "d.csv": as_csv,
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(),
    "semicolons.csv": lambda: as_csv(";"),
    "d.tsv": lambda: as_csv("\t"),
    "d.csv.gz": lambda: gzip.compress(as_csv()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    found = list(read(plain(tmp_path, name, FORMATS[name]()), "train"))
    assert [record for _, record in found] == RECORDS


def test_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS * 100), path, row_group_size=7)
    assert [record for _, record in read(str(path), "train")] == RECORDS * 100


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "name", [n for n in FORMATS if "pretty" in n or "data" in n or "zst" in n or "members" in n]
)
def test_chunk_borders_do_not_matter(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(compressed_files, "READ_BYTES", size)
    assert [
        record for _, record in read(plain(tmp_path, name, FORMATS[name]()), "train")
    ] == RECORDS


def test_a_number_on_a_chunk_border_is_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_files, "READ_BYTES", 1)
    path = plain(tmp_path, "n.json", b'{"size": 12345, "data": [{"a": 678.5e3}, {"a": 9}]}')
    monkeypatch.setattr(large_json, "_is_jsonl", lambda *_: False)
    assert [record for _, record in read(path, "train")] == [{"a": 678.5e3}, {"a": 9}]


def test_places(tmp_path):
    jsonl = plain(tmp_path, "a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n')
    assert [where for where, _ in read(jsonl, "train")] == [f"{jsonl}:1", f"{jsonl}:3"]
    table = plain(tmp_path, "a.csv", b'text,n\n"one\ntwo",1\n\nthree,2\n')
    assert [where for where, _ in read(table, "train")] == [f"{table}:2", f"{table}:5"]
    array = plain(tmp_path, "a.json", b'[{"text": "a"},\n {"text": "b"}]')
    assert [where for where, _ in read(array, "train")] == [f"{array}:1[0]", f"{array}:2[1]"]
    long = plain(
        tmp_path,
        "b.json",
        b'{"version": 1,\n"data": [\n'
        + b",\n".join(b'{"text": "%d"}' % i for i in range(9))
        + b"]}",
    )
    assert [where for where, _ in read(long, "train")] == [f"{long}:{3 + i}[{i}]" for i in range(9)]
    text = plain(tmp_path, "a.txt", b"one\ntwo\n")
    assert list(read(text, "train")) == [(text, {"text": "one\ntwo\n"})]


def test_long_text_files_become_documents_that_end_at_newlines(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_files, "READ_BYTES", 64)
    monkeypatch.setattr(formats, "DOCUMENT_BYTES", 500)
    text = "".join(f"line {i} is ünïcödé\n" for i in range(200))
    path = plain(tmp_path, "a.txt.gz", gzip.compress(text.encode()))
    found = list(read(path, "train"))
    assert "".join(record["text"] for _, record in found) == text
    assert len(found) > 5 and all(record["text"].endswith("\n") for _, record in found)
    second = found[0][1]["text"].count("\n") + 1
    assert [where for where, _ in found[:2]] == [path, f"{path}:{second}"]


def test_text_without_newlines_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_files, "READ_BYTES", 7)
    monkeypatch.setattr(formats, "DOCUMENT_BYTES", 20)
    path = plain(tmp_path, "a.txt", ("ü" * 50).encode())
    found = [record["text"] for _, record in read(path, "train")]
    assert "".join(found) == "ü" * 50 and len(found) > 2


def test_globs_and_directories_are_sorted_and_recursive(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden/d.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    texts = [record["text"] for _, record in read(str(tmp_path), "train")]
    assert texts == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert [r["text"] for _, r in read(str(tmp_path / "*.jsonl"), "train")] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert [r["text"] for _, r in read(str(tmp_path / "s*/**/*.jsonl"), "train")] == ["sub/c.jsonl"]


def test_count_adds_up_to_the_size_of_the_files(tmp_path):
    path = plain(tmp_path, "a.jsonl.zst", zstandard.compress(JSONL * 1000))
    counts = []
    list(read(path, "train", counts.append))
    assert sum(counts) == (tmp_path / "a.jsonl.zst").stat().st_size


def test_assets_are_specs():
    where, record = next(iter(read("asset:data/pile_sample/train.jsonl.zst", "train")))
    assert where.endswith("pile_sample/train.jsonl.zst:1") and isinstance(record["text"], str)


def test_saved_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(
        {"train": Dataset.from_list(RECORDS), "other": Dataset.from_list(RECORDS[:1])}
    ).save_to_disk(tmp_path / "d")
    Dataset.from_list(RECORDS[1:]).save_to_disk(tmp_path / "single")
    assert list(read(str(tmp_path / "d"), "train"))[1] == (f"{tmp_path / 'd'}[1]", RECORDS[1])
    assert [record for _, record in read(str(tmp_path / "d"), "other")] == RECORDS[:1]
    assert [record for _, record in read(str(tmp_path / "single"), "train")] == RECORDS[1:]
    with pytest.raises(
        UserError,
        match=r"no split 'validation'; there is train, other\n  Try data.eval_split=train",
    ):
        list(read(str(tmp_path / "d"), "validation"))


def test_get_field():
    record = {"text": "a", "meta": {"pile_set_name": "Wiki", "deep": {"x": None}}, "dotted.name": 1}
    assert get_field(record, "text") == "a"
    assert get_field(record, "meta.pile_set_name") == "Wiki"
    assert get_field(record, "meta.deep.x") is None
    assert get_field(record, "dotted.name") == 1
    assert get_field(record, "meta.nothing") is MISSING
    assert get_field(record, "text.nothing") is MISSING


def test_field_error_suggests_the_field_that_is_meant():
    fault = field_error(
        {"prompt": "p", "response": "r"},
        "completion",
        "data/train-003.jsonl.zst:18204",
        "task.completion_field",
    )
    assert str(fault) == (
        "data/train-003.jsonl.zst:18204: field 'completion' is missing; this record has 'prompt', "
        "'response'.\n  Try task.completion_field=response."
    )


@pytest.mark.parametrize(
    ("record", "field", "best"),
    [
        (
            {"id": 7, "content": "some text", "url": "http://a.very.long.address/that/goes/on"},
            "text",
            "content",
        ),
        ({"id": "1", "body_text": "x"}, "text", "body_text"),
        ({"sentiment": "pos", "review": "good film"}, "label", "sentiment"),
        ({"meta": {"text": "x"}, "id": "a"}, "text", "meta.text"),
        ({"a": "short", "b": "the longest string of all"}, "text", "b"),
    ],
)
def test_the_suggested_field(record, field, best):
    assert field_error(record, field, "f:1", "k").remedy == f"Try k={best}."


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_highly_repetitive_archive_does_not_fill_the_memory(tmp_path, suffix):
    line = b'{"text": "' + b"hello " * 1000 + b'"}\n'
    pack = gzip.compress if suffix == "gz" else zstandard.compress
    path = plain(
        tmp_path, f"a.jsonl.{suffix}", pack(line * 10_000)
    )  # 60 MB of text in less than 200 kB
    assert max(map(len, compressed_files.chunks(tmp_path / f"a.jsonl.{suffix}"))) < 16 << 20
    assert sum(1 for _ in read(path, "train")) == 10_000


def test_class_labels_are_read_by_name(tmp_path):
    """As an export should know them, in lists too; -1 marks a row without one."""
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    names = ClassLabel(names=["no", "yes"])
    features = Features({"text": Value("string"), "label": names, "tags": Sequence(names)})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "labelled")
    found = [record for _, record in read(str(tmp_path / "labelled"), "train")]
    assert [record["label"] for record in found] == ["yes", "no", None]
    assert [record["tags"] for record in found] == [["no", "yes"], [], ["yes"]]
    with pytest.raises(UserError, match="`datasets` folder lies in this directory"):
        list(read(str(tmp_path), "train"))


def test_a_directory_is_its_data_files_those_behind_links_too(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "other").mkdir()
    for place in ("all/a.jsonl", "other/b.jsonl"):
        (tmp_path / place).write_text(json.dumps({"text": place}) + "\n")
    for name in ("README.txt", "dataset_infos.json", ".hidden.jsonl"):
        (tmp_path / "all" / name).write_text('{"text": "about the data"}')
    (tmp_path / "all/link").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "all")
    assert [record["text"] for _, record in read(str(tmp_path / "all"), "train")] == [
        "all/a.jsonl",
        "other/b.jsonl",
    ]


def test_home_is_expanded_and_suffixes_have_no_case(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(JSONL))
    assert [record for _, record in read("~/A.JSONL.GZ", "train")] == RECORDS
    assert [record for _, record in read("~/*.GZ", "train")] == RECORDS


def test_one_object_per_line_whatever_the_length_of_the_first(tmp_path):
    texts = ["long " * 200_000, "short"]
    (tmp_path / "a.json").write_text(
        "\n" * 400_000 + "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    assert [record["text"] for _, record in read(str(tmp_path / "a.json"), "train")] == texts


def test_dates_that_python_does_not_know_are_bad_rows(tmp_path):
    table = pyarrow.table(
        {
            "text": ["a", "b"],
            "day": pyarrow.array([10**7, 1], pyarrow.int32()).cast(pyarrow.date32()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    bad, good = read(str(tmp_path / "a.parquet"), "train")
    assert isinstance(bad, UserError) and "a.parquet[0]" in str(bad) and good[1]["text"] == "b"


def test_a_tab_separates_a_tsv_whatever_its_header_holds(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel, raw\ngood\t1\n")
    assert [record for _, record in read(str(tmp_path / "a.tsv"), "train")] == [
        {"text": "good", "label, raw": "1"}
    ]
