"""Which files a spec names: what is read, left out, told and refused; compression by content; encodings."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datasets import Dataset
from hydra.core.override_parser.overrides_parser import OverridesParser

from finetune.config import DataConfig
from finetune.data.cache import build_store
from finetune.data.mixture import DataSource
from finetune.data.sources import data_notes, field_error, read
from finetune.data.utf8 import FileOptions
from finetune.errors import UserError


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def texts(spec, **options) -> list[str]:
    return [row[1]["text"] for row in read(str(spec), "train", options=FileOptions(**options))]


@pytest.fixture
def corpus(tmp_path):
    """A folder made of {name: content}."""

    def make(files: dict[str, bytes]):
        for name, data in files.items():
            path = tmp_path / "corpus" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "corpus"

    return make


def notes(train, held_out=None) -> dict[str, list[str]]:
    return data_notes(DataConfig(train=str(train), eval=str(held_out) if held_out else None))


def test_every_name_of_json_lines_is_read(corpus):
    folder = corpus(
        {
            "a.jsonl": line("a"),
            "b.ndjson": line("b"),
            "c.jsonlines": line("c"),
            "d.NDJSON": line("d"),
            "e.ndjson.gz": gzip.compress(line("e")),
            "f.csv.zst": zstandard.compress(b"text\nf\n"),
            "g.json.zst": zstandard.compress(b'[{"text": "g"}]'),
        }
    )
    assert texts(folder) == list("abcdefg") and notes(folder) == {"train": [], "eval": []}


def test_files_of_unknown_format_are_told(corpus):
    folder = corpus(
        {"a.jsonl": line("a"), "b.docx": b"PK", "sub/c.pdf": b"%PDF", "d.jsonl.bz2": b"BZh9"}
    )
    (note,) = notes(folder)["train"]
    assert (
        note.startswith("left out, of unknown format (.bz2 .docx .pdf): 3 files, ")
        and "sub/c.pdf" in note
    )
    assert notes(f"{folder}/*")["train"] == [
        f"left out, of unknown format (.bz2 .docx): 2 files, {folder}/b.docx, {folder}/d.jsonl.bz2"
    ]


def test_what_commonly_lies_beside_data_is_not_told(corpus):
    names = [
        "README.md",
        "LICENSE",
        "_SUCCESS",
        "_committed_1",
        ".gitattributes",
        ".cache/x.jsonl",
        ".b.jsonl.swp",
        "load.py",
        "a.jsonl.sha256",
        "dataset_info.json",
        "README.txt",
        "SHA256SUMS",
        "__MACOSX/a.jsonl",
        "CITATION.cff",
    ]
    folder = corpus({"a.jsonl": line("a"), **dict.fromkeys(names, b"about the data")})
    for spec in (folder, f"{folder}/*"):
        assert texts(spec) == ["a"] and notes(spec) == {"train": [], "eval": []}


def test_a_data_file_may_be_called_notice(corpus):
    assert texts(corpus({"notice.jsonl": line("a")})) == ["a"]


@pytest.mark.parametrize("pattern", ["", "/*", "/*.jsonl*"])
def test_a_file_beside_its_compressed_copy_is_refused(corpus, pattern):
    folder = corpus(
        {"a.jsonl": line("a"), "a.jsonl.zst": zstandard.compress(line("a")), "b.jsonl": line("b")}
    )
    with pytest.raises(
        UserError, match=r"a.jsonl and a.jsonl.zst are probably the same data"
    ) as caught:
        texts(f"{folder}{pattern}")
    command = caught.value.remedy.split("e.g.: ")[1]
    subprocess.run(command, shell=True, check=True)
    assert texts(f"{folder}{pattern}") == ["a", "b"]


def test_copies_and_several_formats_are_told(corpus):
    folder = corpus(
        {
            "a.jsonl": line("a"),
            "copy of a.jsonl": line("a"),
            "b.csv": b"text\nb\n",
            "b.jsonl": line("b"),
        }
    )
    same, formats = notes(folder)["train"]
    assert (
        same
        == f"read although their content is the same: 2 files, {folder}/a.jsonl, {folder}/copy of a.jsonl"
    )
    assert (
        formats
        == f"read although the same name is there in several formats: {folder}/b{{.csv,.jsonl}}"
    )


def test_evaluation_files_among_the_training_files_are_told(corpus, tmp_path):
    folder = corpus({"part-0.jsonl": line("a"), "part-1.jsonl": line("b"), "held.jsonl": line("c")})
    (note,) = notes(folder, folder / "held.jsonl")["eval"]
    assert note.startswith(
        f"trained on as well: 1 of 1 file, {folder}/held.jsonl; figures on these rows tell"
    )
    assert len(notes(f"{folder}/*.jsonl", folder)["eval"]) == 1
    shutil.copy(folder / "held.jsonl", tmp_path / "other.jsonl")  # the same rows under another name
    assert len(notes(folder, tmp_path / "other.jsonl")["eval"]) == 1
    assert len(notes(folder / "held.jsonl", folder / "held.jsonl")["eval"]) == 1
    assert notes(folder / "part-0.jsonl", folder / "held.jsonl") == {"train": [], "eval": []}
    assert (
        len(data_notes(DataConfig(train="org/name", eval="org/name", eval_split="train"))["eval"])
        == 1
    )
    assert data_notes(DataConfig(train="org/name", eval="org/name")) == {"train": [], "eval": []}


@pytest.mark.parametrize(
    "name", ["data/test-00000-of-00001.jsonl", "validation.jsonl", "dev/0.jsonl", "my_eval.jsonl"]
)
def test_files_named_like_held_out_data_are_told(corpus, name):
    folder = corpus(
        {"data/train-00000-of-00001.jsonl": line("a"), name: line("b"), "latest.jsonl": line("c")}
    )
    (note,) = notes(folder)["train"]
    assert note.startswith(
        f"trained on although named like held-out data: 1 file, {folder}/{name}; "
    )
    assert notes(folder / name) == {"train": [], "eval": []}  # it was named itself


def test_several_files_with_commas(corpus, monkeypatch):
    folder = corpus(
        {
            "a.jsonl": line("a"),
            "b.jsonl": line("b"),
            "sub/c.jsonl": line("c"),
            "d,e.jsonl": line("d"),
        }
    )
    monkeypatch.chdir(folder)
    assert texts("b.jsonl,a.jsonl") == ["b", "a"] and texts("sub, b*.jsonl") == ["c", "b"]
    assert texts("d,e.jsonl") == ["d"]  # a file of this very name
    with pytest.raises(
        UserError, match=r"(?s)there is no such file or directory: c.jsonl\n.*Nearest in .*jsonl"
    ):
        texts("a.jsonl,c.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl is named twice"):
        texts("a.jsonl,a.jsonl")


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        (
            "https://example.org/data/a.jsonl?x=1",
            "curl -fL -o a.jsonl 'https://example.org/data/a.jsonl?x=1'\n  Then data.train=a.jsonl",
        ),
        (
            "https://huggingface.co/datasets/o/n/blob/main/a.csv",
            "https://huggingface.co/datasets/o/n/resolve/main/a.csv",
        ),
        ("https://huggingface.co/datasets/o/n", "Try data.train=o/n"),
        ("https://github.com/o/n/blob/main/a.csv", "https://github.com/o/n/raw/main/a.csv"),
        ("file:///tmp/a.jsonl", "Try data.train=/tmp/a.jsonl"),
        ("s3://bucket/a.jsonl", "Copy it to this machine"),
    ],
)
def test_addresses_are_refused_with_the_way_to_their_content(spec, remedy):
    with pytest.raises(UserError, match="this is an address") as caught:
        read(spec, "train")
    assert remedy in caught.value.remedy


def test_a_remedy_can_be_pasted_whatever_the_path_holds(tmp_path):
    """A shell and Hydra give back the path, or the name of a field, that the remedy was made of."""
    name = "my data, n=2"
    (tmp_path / name).mkdir()
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / name / "saved")
    faults = {}
    for spec in (tmp_path / name, f"file://{tmp_path}/{name}", f"https://a.org/{name}.csv"):
        with pytest.raises(UserError) as caught:
            read(str(spec), "train")
        faults[caught.value.remedy] = "data.train="
    fault = field_error({name: "x"}, "text", "a.csv:2", "task.format=prompt task.prompt_field")
    faults[fault.remedy.removesuffix(".")] = "task.format="
    settings = []
    for remedy, key in faults.items():
        start = min(
            at
            for at in (remedy.find(key), remedy.find(f"'{key}"), remedy.find(f'"{key}'))
            if at >= 0
        )
        words = OverridesParser.create().parse_overrides(shlex.split(remedy[start:]))
        settings.append((words[-1].key_or_group, words[-1].value()))
    assert settings == [
        ("data.train", f"{tmp_path}/{name}/saved"),
        ("data.train", f"{tmp_path}/{name}"),
        ("data.train", f"{name}.csv"),
        ("task.prompt_field", name),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.JSONL"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_the_content_says_how_a_file_is_compressed(corpus, name, pack):
    assert texts(corpus({name: pack(line("a") * 3)})) == ["a"] * 3


def test_parquet_under_another_name_and_text_in_binary_columns(corpus, tmp_path):
    turns = pyarrow.list_(pyarrow.struct({"role": pyarrow.binary()}))
    table = pyarrow.table(
        {
            "text": pyarrow.array([b"caf\xc3\xa9", None], pyarrow.binary()),
            "image": pyarrow.array([b"\x89PNG", b"\xff"], pyarrow.large_binary()),
            "turns": pyarrow.array([[{"role": b"user"}], []], turns),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.jsonl")
    assert [row[1] for row in read(str(tmp_path / "a.jsonl"), "train")] == [
        {"text": "caf\u00e9", "image": b"\x89PNG", "turns": [{"role": "user"}]},
        {"text": None, "image": b"\xff", "turns": []},
    ]


def test_the_remedy_for_a_pointer_fetches_its_repository(corpus):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7\n"
    folder = corpus({"a b/a.jsonl": pointer, ".git/HEAD": b""})
    with pytest.raises(UserError) as caught:
        texts(folder / "a b" / "a.jsonl")
    assert caught.value.remedy == f"git lfs install && git -C '{folder}/a b' lfs pull"
    # A text about pointers is none.
    about = corpus(
        {
            "about.txt": b"The file begins: version https://git-lfs.github.com/spec/v1\n",
            "long.txt": pointer + b"x" * 1024,
        }
    )
    assert texts(about / "about.txt") and texts(about / "long.txt")


RUSSIAN = "Съешь же ещё этих мягких булок"
SAMPLES = {
    "cp1252": "it\u2019s fine \u2013 really, \u201cquoted\u201d text; caf\u00e9 \u20ac5",
    "cp1251": RUSSIAN,
    "koi8-r": RUSSIAN,
    "shift_jis": "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059",
    "euc-kr": "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "utf-16": "caf\u00e9",
    "utf-16-be": "plain words and a caf\u00e9",
}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.csv.gz", "a.json"])
@pytest.mark.parametrize("encoding", SAMPLES)
def test_the_remedy_for_another_encoding_decodes_the_file(tmp_path, encoding, name):
    """Both of its ways, the key and the command, give the text that was written."""
    text = SAMPLES[encoding]
    written = {"csv": f'text\n"{text}"\n', "txt": text}.get(
        name.split(".")[1], json.dumps({"text": text}, ensure_ascii=False)
    )
    data = written.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    try:
        (fault,) = [row for row in read(str(path), "train") if isinstance(row, UserError)]
    except UserError as error:
        fault = error
    key, command = fault.remedy.split(". Or convert the file:\n")
    assert texts(path, encoding=key.partition("data.encoding=")[2]) == [text]
    subprocess.run(command, shell=True, check=True)
    converted = next(tmp_path.glob("*.utf8.*"))
    assert texts(converted) == [text]


def test_one_bad_line_of_a_file_in_utf8_is_no_other_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        '{"text": "caf\u00e9"}\n'.encode() + b'{"text": "caf\xe9"}\n'
    )
    fault = list(read(str(tmp_path / "a.jsonl"), "train"))[1]
    assert (
        "other lines of this file are valid UTF-8" in str(fault) and "encoding" not in fault.remedy
    )


def test_a_wrong_encoding_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("caf\u00e9", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"this file is UTF-8, which data.encoding=cp1252 would garble"
    ):
        texts(tmp_path / "a.txt", encoding="cp1252")
    (tmp_path / "b.txt").write_bytes(b"one\n\x81two")
    with pytest.raises(UserError, match=r"b.txt:2: this is not cp1252: byte 0x81"):
        texts(tmp_path / "b.txt", encoding="cp1252")


def test_the_way_of_reading_is_part_of_the_cache(tmp_path, toy):
    (tmp_path / "a.csv").write_text('text\nplain\n"quoted"\n')
    plain = build_store([DataSource(str(tmp_path / "a.csv"))], toy)
    as_text = build_store(
        [DataSource(str(tmp_path / "a.csv"))], toy, options=FileOptions(quotes="text")
    )
    assert plain.path != as_text.path and len(as_text.column("ids")) == len(plain.column("ids")) + 2
