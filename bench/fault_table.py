"""The fault matrix as a table in docs/reliability.md, from what the tests found.

FAULTS=all FAULT_RESULTS=bench/results/faults.json pytest tests/faults
python bench/fault_table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench/results/faults.json", ROOT / "docs/reliability.md"
MARKS = re.compile(r"(<!-- faults -->\n).*?(<!-- /faults -->)", re.S)


def table(found: dict) -> str:
    """Markdown rows: what happens, what the run does, cases that passed of those tried."""
    lines = ["| what happens | what the run does | held |", "|---|---|--:|"]
    for row in found["rows"]:
        tried = row["passed"] + row["failed"]
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        lines.append(f"| {row['happens']} | {row['then']} | {row['passed']} of {tried}{skipped} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert MARKS.search(text), f"{PAGE} has no place for the table"
    PAGE.write_text(
        MARKS.sub(lambda match: match[1] + table(found) + match[2], text), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
