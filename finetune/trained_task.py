"""Which task a run or an export was trained for, read from its small files: the command line is composed with it."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from finetune.assets_path import resolve

HEADS = {"GPTJForSequenceClassification": "classify", "GPTJForQuestionAnswering": "qa"}


def trained_task(words: list[str]) -> list[str]:
    """`["task=qa"]` for words that name a run or an export with that task, and no task themselves; [] otherwise."""
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    if "task" in typed:
        return []
    try:
        kind = _of_run(_path(typed["run"])) if "run" in typed else _of_export(_path(typed["export_dir"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):  # nothing there, or not ours: said elsewhere
        return []
    return [f"task={kind}"]


def _path(value: str) -> Path:
    return Path(resolve(value.strip("'\""))).expanduser()


def _of_run(folder: Path) -> str:
    """Of a run directory, or of one of its checkpoints/step-N."""
    found = next(place for place in (folder, *folder.parents[:2]) if (place / "config.yaml").is_file())
    return str(OmegaConf.load(found / "config.yaml").task.kind)


def _of_export(folder: Path) -> str:
    if (folder / "finetune.json").is_file():
        return json.loads((folder / "finetune.json").read_text(encoding="utf-8"))["settings"]["kind"]
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return HEADS.get((values.get("architectures") or [""])[0], "clm")
