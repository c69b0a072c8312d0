"""Read folders of `save_to_disk` and hub ids through `datasets`.

Flow: spec -> Dataset (memory-mapped) -> rows. A missing network is reported within seconds instead
of after minutes of retries. Runs no code of a repository and reads no plain files (see `sources`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlparse

from finetune.data.compressed_files import Count
from finetune.data.formats import Row, arrow_rows
from finetune.errors import UserError, command, setting

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PROBE_SECONDS = 5.0
ROWS = 256
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
LOCAL = "Download it where there is a network and give the file, e.g. data.train=corpus/*.jsonl.zst"


def looks_like_hub_id(spec: str) -> bool:
    return HUB_ID.fullmatch(spec) is not None and ".." not in spec


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder was made by `save_to_disk`."""
    single = all((path / name).is_file() for name in ("state.json", "dataset_info.json"))
    return single or (path / "dataset_dict.json").is_file()


class DatasetSource:
    """One split of a `datasets` folder or hub id."""

    def __init__(self, spec: str, split: str, config: str | None = None):
        self.spec = spec
        self.dataset = (
            _from_disk(spec, split) if Path(spec).exists() else _from_hub(spec, split, config)
        )
        if len(self.dataset) == 0:
            raise UserError(f"split '{split}' is empty", spec)
        self._names = {
            name: names
            for name, feature in self.dataset.features.items()
            if (names := _class_names(feature))
        }
        self.dataset = self.dataset.with_format("arrow")
        self.total_bytes = max(1, int(self.dataset.data.nbytes))
        self.identity = [spec, split, self.dataset._fingerprint, len(self.dataset)]

    def _named(self, row: Row) -> Row:
        """Replace class ids by class names, as an export should know them.

        The id -1 marks a row without a label.
        """
        if isinstance(row, UserError):
            return row
        where, record = row
        for column, names in self._names.items():
            value = record.get(column)
            if isinstance(value, list):
                record[column] = [_class_name(item, names) for item in value]
            else:
                record[column] = _class_name(value, names)
        return where, record

    def rows(self, count: Count | None = None) -> Iterator[Row]:
        n = len(self.dataset)
        for start in range(0, n, ROWS):
            stop = min(n, start + ROWS)
            rows = arrow_rows(self.dataset[start:stop], self.spec, start)
            yield from map(self._named, rows) if self._names else rows
            if count:
                count(self.total_bytes * stop // n - self.total_bytes * start // n)


def _class_names(feature: Any) -> list[str] | None:
    """Return the class names of a ClassLabel, or of a list of them."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _class_name(value: Any, names: list[str]) -> Any:
    if value == -1:
        return None
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _from_disk(spec: str, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(spec)
    except (
        Exception
    ) as error:  # pyarrow, json, OSError and KeyError all appear for a damaged folder
        raise UserError(
            f"this datasets folder cannot be opened ({_first_line(error)})", spec
        ) from None
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise _no_split(spec, split, [str(name) for name in loaded])
    return loaded[split]


def _from_hub(spec: str, split: str, config: str | None) -> Any:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    offline = _offline_flag()
    reachable = not offline and _reachable()
    try:
        return _load(spec, config, split, reachable)
    except Exception as error:  # the classes of the hub, requests and datasets have no common base
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            reason = " ".join(str(error).split())
            raise UserError(
                f"this data set has several configurations, or not this one ({reason[:300]})",
                spec,
                "Try data.config=NAME.",
            ) from None
        if "Unknown split" in str(error):
            raise UserError(
                f"there is no split '{split}' ({_first_line(error)})",
                spec,
                "Try data.split=... (training) or data.eval_split=... (evaluation).",
            ) from None
        raise _hub_error(spec, error, offline, reachable) from None


def _load(spec: str, config: str | None, split: str, online: bool) -> Any:
    import datasets
    import datasets.config
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    # Offline mode loads what is cached, at once; online mode would retry for minutes first.
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = not online
    try:
        return datasets.load_dataset(spec, config, split=split)
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _offline_flag() -> str | None:
    on = ("1", "TRUE", "YES", "ON")
    return next((flag for flag in OFFLINE_FLAGS if os.environ.get(flag, "").upper() in on), None)


def _reachable() -> bool:
    """Tell whether the hub answers; a configured proxy is assumed to work.

    Runs in a thread, since name lookup has no time limit.
    """
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    answers: list[bool] = []
    probe = Thread(
        target=_connect,
        args=(url.hostname, url.port or (80 if url.scheme == "http" else 443), answers),
        daemon=True,
    )
    probe.start()
    probe.join(PROBE_SECONDS + 1)
    return bool(answers)


def _connect(host: str, port: int, answers: list[bool]) -> None:
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
        answers.append(True)
    except OSError:
        pass


def _hub_error(spec: str, error: Exception, offline: str | None, reachable: bool) -> UserError:
    if offline:
        return UserError(
            f"there is no such file here, and as a hub id it is not in the cache while {offline} is set",
            spec,
            f"Unset {offline}, or: {LOCAL}",
        )
    if not reachable:
        return UserError(
            "there is no such file here, and the Hugging Face hub cannot be reached to look for it there",
            spec,
            LOCAL,
        )
    return UserError(
        f"there is no such file here, and the hub has no such data set ({_first_line(error)})",
        spec,
        "Check the spelling; private data sets need `hf auth login`.",
    )


def _no_split(spec: str, split: str, splits: list[str]) -> UserError:
    key = "data.split" if split != "validation" else "data.eval_split"
    return UserError(
        f"there is no split '{split}'; there is {', '.join(splits)}",
        spec,
        f"Try {command([setting(key, splits[0])])}.",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
