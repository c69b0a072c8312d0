"""metrics.jsonl, samples.jsonl and result.json: the files that every other view of a run is made from.

Flow: `truncate` (a resumed run, before its first step) -> `MetricsLog` appends one flushed line per record ->
`write_result` at the end. `read` is for everyone else, also while the run is still writing.
Every line is strict JSON: a NaN or infinite number is written as null. Draws nothing and judges nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from finetune.files import dumps, write_atomic, write_json
from finetune.reporting.callbacks import Callback

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RESULT = "result.json"


class MetricsLog(Callback):
    """Appends each record to run_dir/metrics.jsonl and each sample to run_dir/samples.jsonl."""

    def __init__(self, run_dir: Path | str):
        self.run_dir = Path(run_dir)
        self.files: dict[str, TextIO] = {}

    def train_step(self, record: dict[str, Any]) -> None:
        self._append(METRICS, record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._append(METRICS, record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def finish(self, result: dict[str, Any]) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if name not in self.files:
            self.files[name] = _open_for_append(self.run_dir / name)
        # One write call per line, so that a reader or a kill never sees half of two records.
        self.files[name].write(dumps(record) + "\n")
        self.files[name].flush()


def read(path: Path | str) -> list[dict[str, Any]]:
    """The records of a jsonl file, [] when it does not exist; lines torn by a kill are left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [record for record in map(_parse, lines) if record is not None]


def newest(run_dir: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest training record, and the newest evaluation's metrics, of a run or of one of its steps."""
    lines = [line for line in read(run_dir / METRICS) if step is None or line.get("step") == step]
    trained, evaluated = (
        next((line for line in reversed(lines) if line.get("kind") == kind), {})
        for kind in ("train", "eval")
    )
    return trained, {key: value for key, value in evaluated.items() if key not in ("kind", "step")}


def training_seconds(run_dir: Path) -> float:
    """Seconds that the logged steps took, evaluations and saves left out, by their own rates."""
    lines = [line for line in read(run_dir / METRICS) if line.get("kind") == "train"]
    totals = [line.get("tokens") or 0 for line in lines]
    return sum(
        (now - before) / line["tokens_per_second"]
        for before, now, line in zip([0, *totals], totals, lines, strict=False)
        if line.get("tokens_per_second")
    )


def truncate(path: Path | str, last_step: int, evaluates: bool = False) -> int:
    """Drop torn lines and records beyond `last_step`; returns how many lines went.

    Called before a resumed run writes, so that each step is there once. Atomic: a kill leaves the old file
    or the new one.

    Args:
        evaluates: whether the run begins with the evaluation of `last_step`: a record of it goes too.
    """
    path = Path(path)
    if not path.exists():
        return 0
    n_lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    kept = [
        record
        for record in read(path)
        if (record.get("step") or 0) <= last_step
        and not (evaluates and record.get("kind") == "eval" and record.get("step") == last_step)
    ]
    write_atomic(path, "".join(dumps(record) + "\n" for record in kept))
    return n_lines - len(kept)


def truncate_run(run_dir: Path, last_step: int, evaluates: bool) -> None:
    """Drop the records of a run beyond the step that it continues from; see `truncate`."""
    for name in (METRICS, SAMPLES):
        truncate(run_dir / name, last_step, evaluates)


def write_result(run_dir: Path | str, result: dict[str, Any]) -> Path:
    """Write run_dir/result.json atomically."""
    return write_json(Path(run_dir) / RESULT, result)


def _open_for_append(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if torn:
        # Without this the first new record would be glued to the torn one, and both would be lost.
        file.write("\n")
    return file


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
