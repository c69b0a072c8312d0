"""metrics.jsonl, samples.jsonl and result.json: the files that every other view of a run is made from.

Flow: `truncate_run` (a resumed run, before its first step) -> `MetricsLog` appends one flushed line
per record -> `write_result` at the end. `read` is for everyone else, also while the run is still
writing. Every line is strict JSON: a NaN or infinite number is written as null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from finetune.files import dumps, write_atomic, write_json
from finetune.reporting.callbacks import Callback

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RESULT = "result.json"


class MetricsLog(Callback):
    """Append each record to run_dir/metrics.jsonl and each sample to run_dir/samples.jsonl."""

    def __init__(self, run_dir: Path | str):
        self.run_dir = Path(run_dir)
        self.files: dict[str, TextIO] = {}

    def train_step(self, record: dict[str, Any]) -> None:
        self._append(METRICS, record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._append(METRICS, record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def answers(self, step: int, rows: list[dict[str, str]]) -> None:
        for row in rows:
            self._append(SAMPLES, {"kind": "eval", "step": step, **row})

    def finish(self, result: dict[str, Any]) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if name not in self.files:
            path = self.run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and not (path.read_bytes() or b"\n").endswith(b"\n")
            self.files[name] = path.open("a", encoding="utf-8")
            if torn:
                # Without this the first new record would be glued to the torn one: both lost.
                self.files[name].write("\n")
        # One write call per line, so that a reader or a kill never sees half of two records.
        self.files[name].write(dumps(record) + "\n")
        self.files[name].flush()


def is_number(value: Any) -> TypeGuard[float]:
    """Tell a finite number from the null, text or NaN that a record may hold in its place."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read(path: Path | str) -> list[dict[str, Any]]:
    """Return the records of a jsonl file; [] if it does not exist. Lines torn by a kill are left out."""
    path = Path(path)
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def newest(run_dir: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the newest training record and the newest evaluation's metrics, of a run or of one step."""
    last: dict[Any, dict[str, Any]] = {}
    for record in read(run_dir / METRICS):
        if step is None or record.get("step") == step:
            last[record.get("kind")] = record
    evaluated = last.get("eval", {})
    return last.get("train", {}), {k: v for k, v in evaluated.items() if k not in ("kind", "step")}


def training_seconds(run_dir: Path) -> float:
    """Return the seconds that the logged steps took by their own rates, without evaluations and saves."""
    seconds, before = 0.0, 0
    for record in read(run_dir / METRICS):
        if record.get("kind") == "train":
            tokens = record.get("tokens") or 0
            if rate := record.get("tokens_per_second"):
                seconds += (tokens - before) / rate
            before = tokens
    return seconds


def truncate(path: Path | str, last_step: int, evaluates: bool = False) -> int:
    """Drop torn lines and records beyond `last_step`; return the number of dropped lines.

    Called before a resumed run writes, so that each step is there once. Atomic: after a kill there is
    the old file or the new one.

    Args:
        evaluates: the run begins with the evaluation of `last_step`: a record of it is dropped too.
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
