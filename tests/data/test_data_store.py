"""The store: exact columns, and a cache that is reused, invalidated, repaired and shared."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from toy_encoder import EOS, ToyEncoder, write_jsonl

from finetune.data import cache, cache_builder
from finetune.data.cache import build_store, default_cache_dir
from finetune.data.columns import open_store
from finetune.data.mixture import DataSource
from finetune.errors import UserError

RECORDS = [{"text": "aBc/dE"}, {"text": ""}, {"text": "xyz"}, {"text": "d"}]


@pytest.fixture
def spec(tmp_path):
    return str(write_jsonl(tmp_path / "data.jsonl", RECORDS))


def test_columns(spec, toy):
    store = build_store([DataSource(spec)], toy)
    assert len(store) == 4
    assert store.offsets.tolist() == [0, 4, 7, 11, 13]
    assert store.column("ids").tolist() == [
        97,
        66,
        99,
        EOS,
        100,
        69,
        EOS,
        120,
        121,
        122,
        EOS,
        100,
        EOS,
    ]
    assert store.column("scored").tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert store.column("weight").tolist() == [3, 2, 3, 1]
    assert store.column("subset").tolist() == [0, 1, 2, 1] and store.names("subset") == [
        "a",
        "d",
        "x",
    ]
    assert [store.blob("answer", i) for i in range(4)] == [b"Bc", b"E", b"yz", b""]
    assert store.column("ids").dtype == np.uint16 and store.offsets.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        store.column("ids")[0] = 1


def test_stats(spec, toy):
    stats = build_store([DataSource(spec)], toy).stats
    assert stats.pop("seconds") >= 0
    assert stats == {
        "documents": 4,
        "left_out": 1,
        "examples": 4,
        "tokens": 13,
        "lengths": {"2": 1, "4": 3},
        "bad_rows": 0,
        "bad_row_messages": [],
        "tokens_by_name": {"subset": {"d": 5, "a": 4, "x": 4}},
    }


def test_lengths_histogram_has_power_of_two_bins(tmp_path, toy):
    texts = ["x" * (length - 1) for length in (2, 3, 4, 5, 8, 9, 1024, 1025)]
    spec = str(write_jsonl(tmp_path / "l.jsonl", [{"text": text} for text in texts]))
    assert build_store([DataSource(spec)], toy).stats["lengths"] == {
        "2": 1,
        "4": 2,
        "8": 2,
        "16": 1,
        "1024": 1,
        "2048": 1,
    }


def test_batches_are_cut_by_size_and_keep_the_order(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(cache_builder, "BATCH_BYTES", 50)
    texts = [chr(97 + i % 26) * (1 + i % 7) for i in range(500)]
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in texts])
    store = build_store([DataSource(str(file))], toy)
    assert toy.batches > 20
    assert "".join(map(chr, store.column("ids"))) == "".join(text + "\0" for text in texts)


def test_the_second_build_encodes_nothing(spec):
    first, second = ToyEncoder(), ToyEncoder()
    path = build_store([DataSource(spec)], first).path
    assert build_store([DataSource(spec)], second).path == path
    assert (first.batches, second.batches) == (1, 0)
    assert path.parent == default_cache_dir()
    assert (
        open_store(path).column("ids").tolist()
        == build_store([DataSource(spec)], second).column("ids").tolist()
    )


def test_what_invalidates_the_cache(spec, tmp_path):
    def path(encoder=None, **options):
        return build_store([DataSource(spec)], encoder or ToyEncoder(), **options).path

    def rewrite(records):
        write_jsonl(Path(spec), records)

    seen = [path(), path(ToyEncoder("other")), path(on_bad_row="skip")]
    status = os.stat(spec)
    rewrite([{"text": "ABC/dE"}, *RECORDS[1:]])  # same size, and the same time of change
    os.utime(spec, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.append(path())
    os.utime(spec, ns=(0, 0))
    seen.append(path())
    changed = ToyEncoder()
    changed.columns = {"ids": changed.columns["ids"]}
    seen.append(path(changed))
    assert len(set(seen)) == len(seen)
    assert path(cache_dir=tmp_path / "elsewhere").parent == tmp_path / "elsewhere"


def test_default_cache_dir(monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", "/a")
    assert default_cache_dir() == Path("/a")
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_dir() == Path("/b/finetune-gptj")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/finetune-gptj"


@pytest.mark.parametrize("damage", ["short", "long", "gone", "meta", "no meta"])
def test_a_damaged_cache_is_built_again_with_one_line(spec, toy, damage, caplog):
    path = build_store([DataSource(spec)], toy).path
    expected = bytes(open_store(path).column("ids"))
    if damage in ("short", "long"):
        os.truncate(path / "ids.bin", 3 if damage == "short" else 999)
    elif damage == "meta":
        (path / "meta.json").write_text("{")
    else:
        (path / {"gone": "answer.bin", "no meta": "meta.json"}[damage]).unlink()
    with pytest.raises(UserError, match="not a complete token cache"):
        open_store(path)
    with caplog.at_level(logging.INFO):
        assert bytes(build_store([DataSource(spec)], toy).column("ids")) == expected
    assert len(caplog.records) == 1 and "is damaged" in caplog.text


def test_progress_ends_with_everything(spec, toy):
    calls = []
    build_store([DataSource(spec)], toy, progress=lambda *values: calls.append(values))
    size = os.path.getsize(spec)
    assert calls[-1] == (size, size, 13) and len(calls) <= 3


def test_a_failure_leaves_nothing_behind(spec, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "encode", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_store([DataSource(spec)], toy)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_an_id_that_does_not_fit_its_type_is_noticed(tmp_path, toy):
    spec = str(write_jsonl(tmp_path / "d.jsonl", [{"text": "\U0001f600"}]))
    with pytest.raises(OverflowError):
        build_store([DataSource(spec)], toy)


def test_a_cache_dir_that_is_a_file(spec, toy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"(?s)token cache cannot be written.*data.cache_dir="):
        build_store([DataSource(spec)], toy, cache_dir=tmp_path / "file" / "sub")


SCRIPT = """
import sys, time, resource
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from toy_encoder import ToyEncoder
from finetune.data.cache import build_store
from finetune.data.mixture import DataSource
from finetune.errors import UserError

class Slow(ToyEncoder):
    def encode(self, batch):
        Path(sys.argv[2]).joinpath(f"encoding-{{time.monotonic_ns()}}").touch()
        time.sleep(float(sys.argv[3]))
        return super().encode(batch)

limit = int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    store = build_store([DataSource(sys.argv[1])], Slow())
    print(len(store), store.path)
except UserError as error:
    sys.exit(str(error))
"""


def process(spec, tmp_path, sleep=0.0, limit=0):
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parents[2]))
    return subprocess.Popen(
        [sys.executable, "-c", script, spec, str(tmp_path), str(sleep), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def encodings(tmp_path) -> int:
    return len(list(tmp_path.glob("encoding-*")))


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_concurrent_builders_one_builds(spec, tmp_path):
    builders = [process(spec, tmp_path, sleep=0.7) for _ in range(3)]
    results = [builder.communicate(timeout=120) for builder in builders]
    assert len({out for out, _ in results}) == 1 and results[0][0].startswith("4 "), results
    assert encodings(tmp_path) == 1
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_a_killed_builder_blocks_nobody_and_leaves_no_store(spec, tmp_path):
    killed = process(spec, tmp_path, sleep=60)
    wait_for(lambda: encodings(tmp_path) == 1)
    waiting = process(spec, tmp_path)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, err = waiting.communicate(timeout=120)
    assert out.startswith("4 "), err
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    spec = str(write_jsonl(tmp_path / "big.jsonl", [{"text": "a" * 1000}] * 3000))
    _, err = process(spec, tmp_path, limit=1 << 20).communicate(timeout=120)
    assert (
        "the token cache cannot be written" in err
        and "data.cache_dir=" in err
        and "Traceback" not in err
    )
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_meta_is_readable_json(spec, toy):
    meta = json.loads((build_store([DataSource(spec)], toy).path / "meta.json").read_text())
    assert meta["columns"]["ids"] == {"kind": "token", "dtype": "uint16"}
    assert meta["sizes"]["ids.bin"] == 26 and meta["spec"] == spec


class Deadly(ToyEncoder):
    """Ends its process by a signal, or as one that stops a run, instead of encoding one more batch."""

    batches_left: int
    by: str

    def encode(self, batch):
        if self.batches == self.batches_left:
            os.kill(os.getpid(), signal.SIGKILL) if self.by == "kill" else sys.exit(75)
        return super().encode(batch)


@pytest.mark.parametrize(("by", "kill"), [("kill", 1), ("kill", 4), ("kill", 6), ("stop", 6)])
def test_a_killed_build_goes_on_and_gives_the_same_store(tmp_path, monkeypatch, by, kill):
    """Batches of four rows: five of the first source's files, two of the second; what was saved is not encoded again."""
    monkeypatch.setattr(cache_builder, "BATCH_ROWS", 4)
    monkeypatch.setattr(cache, "SAVE_SECONDS", 0)
    records = [{"text": f"{'abc'[i % 3]}{i}/x"} for i in range(26)] + [{"none": 1}, {"text": ""}]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        write_jsonl(folder / f"{i}.jsonl", records[i * 7 : i * 7 + 7])
    more = write_jsonl(tmp_path / "more.jsonl", records[21:])
    sources = [DataSource(str(folder), max_rows=18), DataSource(str(more))]
    how = {"on_bad_row": "skip", "max_bad_rows": 3}
    whole = build_store(sources, ToyEncoder(), cache_dir=tmp_path / "whole", **how)

    child = os.fork()
    if not child:
        encoder = Deadly()
        encoder.batches_left, encoder.by = kill, by
        try:
            build_store(sources, encoder, cache_dir=tmp_path / "cache", **how)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == (signal.SIGKILL if by == "kill" else 0)
    encoder, shown = ToyEncoder(), []
    store = build_store(
        sources,
        encoder,
        cache_dir=tmp_path / "cache",
        progress=lambda *values: shown.append(values),
        **how,
    )
    # At most two batches wait to be written when the process dies.
    assert encoder.batches <= 7 - max(0, kill - 2)
    assert shown[-1][2] == whole.stats["tokens"]
    for file in sorted(whole.path.glob("*.bin")):
        assert (store.path / file.name).read_bytes() == file.read_bytes(), file.name
    metas = [json.loads((path / "meta.json").read_text()) for path in (whole.path, store.path)]
    for meta in metas:
        del meta["stats"]["seconds"]
    assert metas[0] == metas[1] and metas[0]["stats"]["bad_rows"] == 1
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == ["", ".lock"]


PEAK = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
import numpy as np
from finetune.data.cache import build_store
from finetune.data.columns import Column
from finetune.data.mixture import DataSource

class Letters:
    columns = {{"ids": Column("token", "uint16")}}
    def fingerprint(self):
        return "letters"
    def encode(self, batch):
        return [[{{"ids": np.frombuffer(row["text"].encode(), np.uint8)}}] for _, row in batch]

store = build_store([DataSource(sys.argv[1])], Letters(), cache_dir=Path(sys.argv[2]))
print(store.stats["tokens"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    """One compressed file with four times the text: the peak is the same, but for a tenth of what was added."""
    script = PEAK.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parents[2]))
    peaks, row = [], json.dumps({"text": "some text " * 400}) + "\n"
    for mib in (24, 96):
        file = tmp_path / f"{mib}.jsonl.zst"
        with zstandard.open(file, "wt") as out:
            for _ in range(mib << 8):
                out.write(row)
        words = [sys.executable, "-c", script, str(file), str(tmp_path / "cache")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        tokens, peak = map(int, done.stdout.split())
        assert tokens == (mib << 8) * 4000
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 7, peaks
