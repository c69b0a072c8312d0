"""A run directory read back: every file is optional and may be half written.

Flow: `read_run(run_dir)` -> `RunFiles`. The page is made from this alone, so it can be built again at any
time, on another machine, after a crash. Computes nothing.
"""

from __future__ import annotations

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


def read_run(run_dir: Path | str) -> RunFiles:
    """Everything the run has written so far; what is missing or broken is empty."""
    run_dir = Path(run_dir)
    records = read(run_dir / METRICS)
    result = read_object(run_dir / RESULT)
    return RunFiles(
        run_dir=run_dir,
        config=_yaml(run_dir / CONFIG),
        plan=read_object(run_dir / PLAN),
        train=_by_step(records, "train"),
        evals=_by_step(records, "eval"),
        samples=read(run_dir / SAMPLES),
        result=result,
        later=read_object(run_dir / LATER),
        data=read_object(run_dir / DATA),
        env=result.get("env") or read_object(run_dir / ENVIRONMENT),
    )


def _by_step(records: list[Record], kind: str) -> list[Record]:
    """One record a step, the newest: a step that was repeated counts as the repetition."""
    found = {
        record["step"]: record
        for record in records
        if record.get("kind") == kind and isinstance(record.get("step"), int)
    }
    return [found[step] for step in sorted(found)]


def _yaml(path: Path) -> Record:
    try:
        value = read_yaml(path)
    except Exception:
        # A broken config must not cost the page: everything else on it still helps.
        return {}
    return value if isinstance(value, dict) else {}
