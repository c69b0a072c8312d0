"""The two messy sources of docs/chat_example.md, made of instructions that ship with the project.

python docs/make_chat.py chats.jsonl faq.csv
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from finetune.assets.paths import asset
from finetune.data.sources import read


def main(chats: str, faq: str) -> None:
    rows = [row for _, row in read(str(asset("data") / "instruct/train.jsonl"), "train")]

    # Conversations of two turns, in the layout of ShareGPT: one line is cut off, one ends with a question.
    lines = []
    for first, second in zip(rows[0:40:2], rows[1:40:2], strict=True):
        turns = [
            {"from": speaker, "value": row[field]}
            for row in (first, second)
            for speaker, field in (("human", "prompt"), ("gpt", "completion"))
        ]
        lines.append(json.dumps({"conversations": turns}))
    lines[3] = lines[3][:60]
    lines[7] = json.dumps({"conversations": [{"from": "human", "value": "Are you there?"}]})
    Path(chats).write_text("\n".join(lines) + "\n", encoding="utf-8")

    # A table in the layout of Alpaca: one row has no answer.
    with Path(faq).open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["instruction", "input", "output"])
        writer.writerows([row["prompt"], "", row["completion"]] for row in rows[40:80])
        writer.writerow(["What does it cost?", "", ""])


if __name__ == "__main__":
    main(*sys.argv[1:])
