"""Read folders of `save_to_disk` and hub ids through `datasets`.

Flow: spec -> Dataset (memory-mapped) -> rows. A missing network is reported within seconds instead
of after minutes of retries. Runs no code of a repository and reads no plain files (see `sources`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
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
        # Names of the classes of each ClassLabel, or list of them.
        self._names = {}
        for column, feature in self.dataset.features.items():
            names = getattr(getattr(feature, "feature", feature), "names", None)
            if names:
                self._names[column] = names
        self.dataset = self.dataset.with_format("arrow")
        self.total_bytes = max(1, int(self.dataset.data.nbytes))
        self.identity = [spec, split, self.dataset._fingerprint, len(self.dataset)]

    @property
    def part_bytes(self) -> list[int]:
        """Return one size: all rows are one part."""
        return [self.total_bytes]

    def part(self, index: int, count: Count | None = None) -> Iterator[Row]:
        return self.rows(count)

    def rows(self, count: Count | None = None) -> Iterator[Row]:
        n = len(self.dataset)
        for start in range(0, n, ROWS):
            stop = min(n, start + ROWS)
            for row in arrow_rows(self.dataset[start:stop], self.spec, start):
                if not isinstance(row, UserError):
                    # Class names in place of ids, as an export should know them.
                    for column, names in self._names.items():
                        row[1][column] = _class_name(row[1].get(column), names)
                yield row
            if count:
                count(self.total_bytes * stop // n - self.total_bytes * start // n)


def _class_name(value: Any, names: list[str]) -> Any:
    """Return the name of a class id; None for -1, which marks a row without a label."""
    if isinstance(value, list):
        return [_class_name(item, names) for item in value]
    if value == -1:
        return None
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _from_disk(spec: str, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(spec)
    # pyarrow, json, OSError and KeyError all appear for a damaged folder.
    except Exception as error:
        problem = f"this datasets folder cannot be opened ({_first_line(error)})"
        raise UserError(problem, spec) from None
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split in loaded:
        return loaded[split]
    splits = [str(name) for name in loaded]
    key = "data.split" if split != "validation" else "data.eval_split"
    raise UserError(
        f"there is no split '{split}'; there is {', '.join(splits)}",
        spec,
        f"Try {command([setting(key, splits[0])])}.",
    )


def _from_hub(spec: str, split: str, config: str | None) -> Any:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    on = ("1", "TRUE", "YES", "ON")
    offline = next((f for f in OFFLINE_FLAGS if os.environ.get(f, "").upper() in on), None)
    reachable = not offline and _reachable()

    import datasets
    import datasets.config
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    # Offline mode loads what is cached, at once; online mode would retry for minutes first.
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = not reachable
    try:
        return datasets.load_dataset(spec, config, split=split)
    # The classes of the hub, requests and datasets have no common base.
    except Exception as error:
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            reason = " ".join(str(error).split())[:300]
            problem = f"this data set has several configurations, or not this one ({reason})"
            remedy = "Try data.config=NAME."
        elif "Unknown split" in str(error):
            problem = f"there is no split '{split}' ({_first_line(error)})"
            remedy = "Try data.split=... (training) or data.eval_split=... (evaluation)."
        elif offline:
            problem = (
                "there is no such file here, and as a hub id it is not in the cache while "
                f"{offline} is set"
            )
            remedy = f"Unset {offline}, or: {LOCAL}"
        elif not reachable:
            problem = (
                "there is no such file here, and the Hugging Face hub cannot be reached to "
                "look for it there"
            )
            remedy = LOCAL
        else:
            problem = (
                "there is no such file here, and the hub has no such data set "
                f"({_first_line(error)})"
            )
            remedy = "Check the spelling; private data sets need `hf auth login`."
        raise UserError(problem, spec, remedy) from None
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _reachable() -> bool:
    """Tell whether the hub answers; a configured proxy is assumed to work."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (80 if url.scheme == "http" else 443)
    answers: list[bool] = []

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((url.hostname, port), timeout=PROBE_SECONDS).close()
            answers.append(True)

    # In a thread, since name lookup has no time limit.
    probe = Thread(target=connect, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 1)
    return bool(answers)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
