"""Find the data files that a spec names, and report what is unusual about them.

Flow: file, directory, glob, or several of them with commas -> files in reading order. Reads only
the first bytes of each. Files that would be trained on twice, or that cannot be data, are refused;
files that are left out, or are probably not meant for training, are reported.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path

from finetune.assets.paths import resolve
from finetune.data import hub_datasets
from finetune.data.compressed_files import head_of
from finetune.errors import UserError, command, setting
from finetune.files import refuse_pointer

TEXT_FORMATS = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv", ".txt")
COMPRESSIONS = ("", ".gz", ".zst")
SUFFIXES = (*(text + packed for text in TEXT_FORMATS for packed in COMPRESSIONS), ".parquet")
KNOWN = f"Known are {' '.join(TEXT_FORMATS)}, each also with .gz or .zst behind it, and .parquet."

METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|(readme|licen[cs]e|notice)\.txt", re.IGNORECASE
)
"""Files of a known format that tell about the data."""
BESIDE = re.compile(
    r"_.*|(readme|licen[cs]e|copying|notice|authors|citation|changelog|contributing|makefile|\w+sums?)(\..*)?"
    r"|.*\.(py|sh|ipynb|ya?ml|toml|md5|sha\d+|crc|sig|asc|lock)",
    re.IGNORECASE,
)
"""Files of unknown format that commonly lie beside data: left out without a word."""
NO_DATA_FOLDERS = {"__MACOSX", "__pycache__", "_delta_log", "_temporary"}
HELD_OUT = re.compile(
    r"(^|[/_.-])(test|eval|evaluation|val|valid|validation|dev|held_?out)([/_.-]|\d|$)",
    re.IGNORECASE,
)
SIGNATURES = [
    (
        b"PK\x03\x04",
        "a zip archive or an Excel workbook",
        "Unpack it: unzip {}; save a workbook as CSV.",
    ),
    (
        b"BZh",
        "a bzip2 archive",
        "Unpack it: bzip2 -dc < {} > {}.unpacked, and name it after its format.",
    ),
    (
        b"\xfd7zXZ\0",
        "an xz archive",
        "Unpack it: xz -dc < {} > {}.unpacked, and name it after its format.",
    ),
    (
        b"ARROW1",
        "an Arrow file",
        "Give the folder that `save_to_disk` made, or write it as .parquet.",
    ),
    (
        b"SQLite format 3",
        "an SQLite database",
        "Export its table: sqlite3 -header -csv {} 'select * from TABLE' > table.csv",
    ),
]
PARQUET = b"PAR1"
FULL_HASH_BYTES = 64 << 20
SAMPLE_BYTES = 1 << 20


@dataclass
class Files:
    """The files on this machine that a spec names."""

    paths: list[Path]
    """In reading order."""
    left_out: list[Path] = field(default_factory=list)
    """Of unknown format, beside them."""
    chosen: bool = False
    """The spec names each of them."""


def find_files(spec: str) -> Files | None:
    """Return the files that a spec names; None if nothing of this name exists here.

    Raises:
        UserError: an unknown format, two files with the same data, or a directory or glob without
            data.
    """
    spec = os.path.expanduser(resolve(spec))
    path = Path(spec)
    if path.is_dir():
        files = _in_directory(path)
    elif path.exists():
        files = Files([path], chosen=True)
    elif glob.has_magic(spec) and (
        matches := sorted(p for p in map(Path, glob.glob(spec, recursive=True)) if p.is_file())
    ):
        files = _sorted_out(matches, spec)
    elif "," in spec:
        files = _listed(spec)
    elif glob.has_magic(spec):
        raise UserError(
            "no file matches this pattern",
            spec,
            "Quote it against the shell: 'data.train=corpus/*.jsonl'",
        )
    else:
        return None
    for file in files.paths:
        _refuse_content(file)
    if not files.chosen or len(files.paths) > 1:
        _refuse_packed_twice(files.paths)
    return files


def suffix(path: Path) -> str | None:
    """Return the known format suffix of a file name, e.g. `.jsonl.zst`."""
    name = path.name.lower()
    return next(
        (known for known in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(known)), None
    )


def notes_on(files: Files, training: bool) -> list[str]:
    """Return notes for users on the files that a spec names, one line each."""
    notes = []
    if files.left_out:
        kinds = " ".join(sorted({path.suffix or "no suffix" for path in files.left_out}))
        notes.append(
            f"left out, of unknown format ({kinds}): {_count(files.left_out)}, "
            f"{_names(files.left_out)}"
        )
    for same in _same_content(files.paths):
        if same[0].stat().st_size:
            notes.append(f"read although their content is the same: {_count(same)}, {_names(same)}")
    by_stem: dict[str, set[str]] = {}
    for path in files.paths:
        by_stem.setdefault(str(path)[: -len(suffix(path) or "")], set()).add(suffix(path) or "")
    several = [
        f"{stem}{{{','.join(sorted(kinds))}}}" for stem, kinds in by_stem.items() if len(kinds) > 1
    ]
    if several:
        notes.append(
            f"read although the same name is there in several formats: {', '.join(several[:5])}"
        )
    if training and not files.chosen:
        root = os.path.commonpath([path.parent for path in files.paths])
        held_out = [path for path in files.paths if HELD_OUT.search(str(path.relative_to(root)))]
        if held_out and len(held_out) < len(files.paths):
            notes.append(
                f"trained on although named like held-out data: {_count(held_out)}, "
                f"{_names(held_out)}; name the training files alone to leave them out"
            )
    return notes


def shared(train: list[Path], held_out: list[Path]) -> list[str]:
    """Return a note if evaluation files are also training files, by path or by content."""
    trained = set(train)
    same = {
        path
        for group in _same_content([*train, *held_out])
        if trained & set(group)
        for path in group
    }
    both = [path for path in held_out if path in trained or path in same]
    if not both:
        return []
    return [
        f"trained on as well: {len(both)} of {_count(held_out)}, {_names(both)}; "
        "figures on these rows tell how well the model remembers them, not how well it does on new "
        "ones"
    ]


def nearby(path: Path) -> str:
    """Return the remedy for a path that does not exist."""
    folder = path.parent
    if not folder.is_dir():
        return f"The directory {folder} does not exist either."
    names = sorted(p.name for p in folder.iterdir() if suffix(p))
    close = max(
        names, key=lambda name: SequenceMatcher(None, name, path.name).ratio(), default=None
    )
    return f"Nearest in {folder}: {close}" if close else f"{folder} holds no data file."


def address_error(spec: str) -> UserError:
    """Return the error for a remote address, with the command that copies the data here.

    Data are read from this machine only.
    """
    scheme, _, rest = spec.partition("://")
    remedy = f"Copy it to this machine and give the file. {KNOWN}"
    if scheme == "file":
        path = f"/{rest.partition('/')[2]}"
        remedy = f"Try {command([setting('data.train', path)])}"
    elif scheme == "hf" or (
        id_ := re.fullmatch(r"(www\.)?huggingface\.co/datasets/([\w.-]+/[\w.-]+?)/?", rest)
    ):
        name = re.sub(r"^datasets/", "", rest) if scheme == "hf" else id_[2]
        hub_id = "/".join(name.split("/")[:2])
        remedy = f"Try {command([setting('data.train', hub_id)])}"
    elif scheme in ("http", "https"):
        # A page at these two addresses shows a file; the file itself has another address.
        direct = re.sub(
            r"(huggingface\.co/.*?)/blob/",
            r"\1/resolve/",
            re.sub(r"(github\.com/.*?)/blob/", r"\1/raw/", spec),
        )
        name = Path(rest.partition("?")[0]).name or "data.jsonl"
        download = command(["curl", "-fL", "-o", name, direct])
        remedy = f"Download it: {download}\n  Then {command([setting('data.train', name)])}"
    return UserError("this is an address; data are read from files on this machine", spec, remedy)


def identity(path: Path) -> list:
    """Return values that change whenever a file does.

    These are its path, size, time of modification, and a hash of its content or of its two ends.
    """
    try:
        status = path.stat()
        return [
            str(path.absolute()),
            status.st_size,
            status.st_mtime_ns,
            _sample_hash(path, status.st_size, status.st_ctime_ns),
        ]
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from None


def check_format(path: Path) -> None:
    """Refuse a file of unknown format.

    Raises:
        UserError: the file's name ends with none of the known suffixes.
    """
    if suffix(path) is None:
        raise UserError(
            f"unknown format '{''.join(path.suffixes[-2:]) or 'no suffix'}'", str(path), KNOWN
        )


def _in_directory(path: Path) -> Files:
    return _sorted_out(sorted(_entries(path)), str(path))


def _sorted_out(paths: list[Path], spec: str) -> Files:
    """Select the data among files that were not named one by one."""
    data = [path for path in paths if suffix(path) and not METADATA.fullmatch(path.name)]
    unknown = [
        path
        for path in paths
        if not suffix(path) and not BESIDE.fullmatch(path.name) and path.name[0] != "."
    ]
    if data:
        return Files(data, unknown)
    if unknown and glob.has_magic(spec):
        check_format(unknown[0])
    raise UserError(
        f"no data file in this directory or below ({len(paths)} other entries)", spec, KNOWN
    )


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the visible files in a directory and below it, each of them once.

    Linked directories are followed.

    Raises:
        UserError: a `datasets` folder lies in it.
    """
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in NO_DATA_FOLDERS
        )
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if hub_datasets.is_saved_dataset(Path(root)):
            raise UserError(
                "a `datasets` folder lies in this directory",
                root,
                f"Name it itself: {command([setting('data.train', root)])}",
            )
        yield from (
            path
            for name in files
            if not name.startswith(".") and (path := Path(root) / name).is_file()
        )


def _listed(spec: str) -> Files:
    """Find the files of several specs with commas between them, each of which must exist here."""
    together = Files([], chosen=True)
    for part in filter(None, map(str.strip, spec.split(","))):
        files = find_files(part)
        if files is None:
            raise UserError(
                f"there is no such file or directory: {part}",
                spec,
                f"{nearby(Path(os.path.expanduser(resolve(part))))} Commas separate several files.",
            )
        together.paths += files.paths
        together.left_out += files.left_out
        together.chosen = together.chosen and files.chosen
    twice = sorted({str(path) for path in together.paths if together.paths.count(path) > 1})
    if twice or not together.paths:
        raise UserError(
            f"{twice[0]} is named twice" if twice else "no file is named",
            spec,
            "Name each file once.",
        )
    return together


def _refuse_content(path: Path) -> None:
    """Refuse a file that cannot be data, whatever its name says.

    Raises:
        UserError: unknown format, a git-lfs pointer, an archive, a database or a web page.
    """
    check_format(path)
    refuse_pointer(path)
    head = head_of(path)
    for start, kind, remedy in SIGNATURES:
        if head.startswith(start):
            raise UserError(
                f"this file is {kind}, not {suffix(path)}",
                str(path),
                remedy.replace("{}", shlex.quote(str(path))),
            )
    page = re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)\b", head, re.IGNORECASE)
    if page and not (suffix(path) or "").startswith(".txt"):
        raise UserError(
            "this file is a web page (HTML), not data",
            str(path),
            "Download the file itself, not the page that shows it.",
        )


def _refuse_packed_twice(paths: list[Path]) -> None:
    """Refuse a file beside its own compressed copy, which would be trained on twice."""
    plain: dict[str, Path] = {}
    for path in paths:
        name = re.sub(r"\.(gz|zst)$", "", str(path), flags=re.IGNORECASE)
        if name in plain:
            one, other = plain[name], path
            raise UserError(
                f"{one.name} and {other.name} are probably the same data, which would be read "
                "twice",
                str(path.parent),
                f"Keep one of them here, e.g.: {command(['mv', other, f'{other}.bak'])}",
            )
        plain[name] = path


def _same_content(paths: list[Path]) -> list[list[Path]]:
    """Return groups of files with the same content; only files of equal size are read."""
    by_size: dict[int, list[Path]] = {}
    for path in dict.fromkeys(paths):
        by_size.setdefault(path.stat().st_size, []).append(path)
    by_content: dict[tuple[int, str], list[Path]] = {}
    for size, alike in by_size.items():
        for path in alike if len(alike) > 1 else ():
            by_content.setdefault((size, identity(path)[-1]), []).append(path)
    return [group for group in by_content.values() if len(group) > 1]


@lru_cache(maxsize=100_000)
def _sample_hash(path: Path, size: int, changed: int) -> str:
    """Return a hash of the whole file, or of both ends of a large one.

    `changed` only tells versions of the file apart in the cache.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if size <= FULL_HASH_BYTES:
            while piece := file.read(SAMPLE_BYTES):
                digest.update(piece)
        else:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(-SAMPLE_BYTES, os.SEEK_END)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _names(paths: list[Path]) -> str:
    shown = ", ".join(map(str, paths[:5]))
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown


def _count(paths: list[Path]) -> str:
    return "1 file" if len(paths) == 1 else f"{len(paths)} files"
