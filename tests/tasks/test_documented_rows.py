"""The rows that docs/data.md shows for each task are rows of that task."""

from __future__ import annotations

import json
import re
from pathlib import Path

from finetune.config import KINDS
from finetune.tasks.build import build_task

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_each_task_reads_its_row(tokenizer):
    table = DOC.split("### Rows of each task")[1].split("###")[0]
    shown = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(\{.*?\})` \|", table, re.M)
    rows = {kind: json.loads(row) for kinds, row in shown for kind in re.findall(r"\w+", kinds)}
    assert rows.keys() == KINDS["task"].keys()
    for kind, row in rows.items():
        encoder = build_task(KINDS["task"][kind](), tokenizer, False).encoder()
        (examples,) = encoder.encode([("rows.jsonl:1", row)])
        assert isinstance(examples, list) and examples, (kind, examples)
