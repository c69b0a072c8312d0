"""The csv of docs/worked_example.md: instructions that ship with the project, as questions and answers.

python docs/make_csv.py support.csv support_eval.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from finetune.assets.paths import asset
from finetune.data.sources import read


def main(files: list[str]) -> None:
    for split, file in zip(("train", "eval"), files, strict=True):
        rows = [row for _, row in read(str(asset("data") / f"instruct/{split}.jsonl"), "train")]
        with Path(file).open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["question", "answer"])
            writer.writerows([row["prompt"], row["completion"]] for row in rows)


if __name__ == "__main__":
    main(sys.argv[1:])
