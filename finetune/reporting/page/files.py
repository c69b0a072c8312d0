"""A run directory read back: every file is optional and may be half written.

Flow: `read_run(run_dir)` -> `RunFiles`. The page is made from this alone, so it can be built again at
any time, on another machine, after a crash. Computes nothing.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config import read_yaml
from finetune.files import read_object
from finetune.reporting.metrics_log import METRICS, RESULT, SAMPLES, read

CONFIG, PLAN, DATA, ENVIRONMENT = "config.yaml", "plan.json", "data_stats.json", "environment.json"
LATER = "eval.json"

Record = dict[str, Any]


@dataclass
class RunFiles:
    run_dir: Path
    config: Record = field(default_factory=dict)
    plan: Record = field(default_factory=dict)
    train: list[Record] = field(default_factory=list)
    """Records of kind train, by step, each step once."""
    evals: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    result: Record = field(default_factory=dict)
    """Empty while the run has not ended."""
    later: Record = field(default_factory=dict)
    """eval.json: what launch/evaluate.py found afterwards."""
    data: Record = field(default_factory=dict)
    env: Record = field(default_factory=dict)
    """Versions and machine; with `world_size`, and where known `ranks_per_node`, `total_steps` and `overrides`."""

    def last(self, key: str) -> Any:
        """Return a value of the newest training record; None if there is none."""
        return self.train[-1].get(key) if self.train else None

    def peak(self, key: str) -> float:
        """Return the largest `host_bytes` or `gpu_bytes` of a rank; 0 if it was not measured."""
        logged = max((record.get(key) or 0 for record in self.train), default=0)
        return self.result.get(f"peak_{key}") or logged


def read_run(run_dir: Path | str) -> RunFiles:
    """Return everything the run has written so far; what is missing or broken is empty."""
    run_dir = Path(run_dir)
    config = None
    # A broken config must not cost the page: everything else on it still helps.
    with suppress(Exception):
        config = read_yaml(run_dir / CONFIG)
    # One record a step, the newest: a step that was repeated counts as the repetition.
    records: dict[str, dict[int, Record]] = {"train": {}, "eval": {}}
    for record in read(run_dir / METRICS):
        if record.get("kind") in records and isinstance(record.get("step"), int):
            records[record["kind"]][record["step"]] = record
    train, evals = ([steps[step] for step in sorted(steps)] for steps in records.values())
    result = read_object(run_dir / RESULT)
    return RunFiles(
        run_dir=run_dir,
        config=config if isinstance(config, dict) else {},
        plan=read_object(run_dir / PLAN),
        train=train,
        evals=evals,
        samples=read(run_dir / SAMPLES),
        result=result,
        later=read_object(run_dir / LATER),
        data=read_object(run_dir / DATA),
        env=result.get("env") or read_object(run_dir / ENVIRONMENT),
    )
