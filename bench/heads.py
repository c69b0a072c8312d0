"""Table of what each head learns on the shipped tiny GPT-J and data, beside what costs nothing.

    OMP_NUM_THREADS=2 python bench/heads.py [--only classify-lora,qa-full] [--out bench/results/heads.json]

Every case is one run of launch/train.py with a recipe of GPT-J-6B on `gptj_tiny`, evaluated on held-out rows before the
first step and at the end. Trivial baselines:

    classify   always the training data's most frequent label: accuracy
    qa         a random valid span, the expectation over 200 draws; and never answering: exact match and F1
    instruct   the base model itself, at step 0: loss
    year       regression: a piece of a State of the Union address to (year - 2000) / 10; always the mean: squared error
    tags       multi-label: a piece of text to its source and, if a speech, its decade; always the most frequent: macro F1

The last two are made from the shipped texts, cut into pieces, and their metadata. Also measured: how much of the packed
positions the instructions fill.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from finetune.data.sources import read  # noqa: E402
from finetune.tasks.squad_metrics import score, summarise  # noqa: E402

DATA = ROOT / "finetune/assets/data"
COMMON = [
    "model=gptj_tiny",
    "train.activation_checkpointing=false",
    "train.eval_at_start=true",
    "train.eval_batch=16",
]
LORA, FULL = ["adapter.targets=all-linear", "adapter.rank=16", "adapter.alpha=32"], ["adapter=full"]
CLASSIFY = ["recipe=classify_lora", "data=classify_sample", *COMMON, "train.eval_every=125"]
QA = ["recipe=qa_lora", "data=qa_sample", *COMMON, "train.global_batch=16", "train.eval_every=80"]
INSTRUCT = [
    "recipe=instruct_lora",
    "data=instruct_sample",
    *COMMON,
    "train.global_batch=4",
    "train.eval_every=20",
]
MADE = [
    "recipe=classify_lora",
    *COMMON,
    "train.eval_every=100",
    "task.max_length=256",
    "train.epochs=4",
    *FULL,
    "optim.lr=1e-3",
]
CASES = {
    "classify-lora": [*CLASSIFY, *LORA, "optim.lr=5e-3"],
    "classify-full": [*CLASSIFY, *FULL, "optim.lr=1e-3"],
    "qa-lora": [*QA, *LORA, "optim.lr=5e-3", "train.epochs=4"],
    "qa-full": [*QA, *FULL, "optim.lr=1e-3", "train.epochs=4"],
    "instruct-lora": [*INSTRUCT, *LORA, "optim.lr=5e-3", "train.epochs=20"],
    "instruct-full": [*INSTRUCT, *FULL, "optim.lr=1e-3", "train.epochs=20"],
    "year-full": [
        *MADE,
        "task.problem=regression",
        "data.train=DATA/year-train.jsonl",
        "data.eval=DATA/year-eval.jsonl",
    ],
    "tags-full": [
        *MADE,
        "task.problem=multi_label",
        "data.train=DATA/tags-train.jsonl",
        "data.eval=DATA/tags-eval.jsonl",
    ],
}
SHOWN = ("loss", "perplexity", "accuracy", "f1", "exact_match", "mse", "pearson")
NESTED = ("has_answer_f1", "no_answer_f1")
DRAWS = 200
WORDS = 80
"""Of one piece."""


def train(words: list[str]) -> dict:
    """One run: the first and last evaluation, seconds of the whole command, rows filled."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir, started = Path(folder) / "run", time.perf_counter()
        made_rows(Path(folder))
        told = [word.replace("DATA/", f"{folder}/") for word in words]
        command = [sys.executable, "launch/train.py", *told, f"run_dir={run_dir}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        evals = [
            {key: line[key] for key in ("step", *SHOWN) if key in line} | _by_kind(line)
            for line in lines
            if line["kind"] == "eval"
        ]
        data = json.loads((run_dir / "data_stats.json").read_text())
        return {
            "command": " ".join(["python launch/train.py", *words]),
            "before": evals[0],
            "after": evals[-1],
            "seconds": round(time.perf_counter() - started, 1),
            "packing_efficiency": data["train"]["packing_efficiency"],
        }


def _by_kind(line: dict) -> dict:
    """F1 of answerable and of unanswerable questions, so that silence cannot pass for knowledge."""
    return {f"{kind}_f1": line[kind]["f1"] for kind in ("has_answer", "no_answer") if kind in line}


def made_rows(folder: Path) -> dict[str, list]:
    """year-*.jsonl and tags-*.jsonl in `folder`, from pieces of the shipped texts; their labels, by file's stem."""
    labels = {}
    for name in ("train", "eval"):
        year, tags = [], []
        for _, row in read(str(DATA / f"pile_sample/{name}.jsonl.zst"), name):
            about = row["meta"]
            decade = [f"{about['year'] // 10 * 10}s"] if "year" in about else []
            words = row["text"].split()
            for piece in (
                " ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)
            ):
                tags.append({"text": piece, "label": [about["pile_set_name"], *decade]})
                if decade:
                    year.append({"text": piece, "label": (about["year"] - 2000) / 10})
        for kind, rows in (("year", year), ("tags", tags)):
            (folder / f"{kind}-{name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
            labels[f"{kind}-{name}"] = [row["label"] for row in rows]
    return labels


def _trivial(labels: dict[str, list]) -> dict:
    """Always the training mean; always the labels that more than half of the training rows have."""
    mean = sum(labels["year-train"]) / len(labels["year-train"])
    error = sum((value - mean) ** 2 for value in labels["year-eval"]) / len(labels["year-eval"])
    counts = Counter(tag for row in labels["tags-train"] for tag in row)
    always = {tag for tag, count in counts.items() if count > len(labels["tags-train"]) / 2}
    rows = labels["tags-eval"]
    held = Counter(tag for row in rows for tag in row)
    f1 = [2 * held[tag] / (len(rows) + held[tag]) if tag in always else 0.0 for tag in counts]
    return {
        "year": {"mse of the mean": error},
        "tags": {"macro F1 of the most frequent": sum(f1) / len(f1)},
        "rows": {name: len(found) for name, found in labels.items()},
    }


def baselines() -> dict:
    """Score what costs nothing on the evaluation data; the base model's loss is in each run's first evaluation."""
    labels = {
        name: [
            json.loads(line)["label"]
            for line in (DATA / f"classify/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "eval")
    }
    majority = Counter(labels["train"]).most_common(1)[0][0]
    with tempfile.TemporaryDirectory() as folder:
        made = _trivial(made_rows(Path(folder)))
    return {
        "classify": {"majority accuracy": labels["eval"].count(majority) / len(labels["eval"])},
        "qa": _spans(),
        **made,
    }


def _spans() -> dict:
    articles = json.loads((DATA / "qa/eval.json").read_text())["data"]
    asked = [
        (p["context"], [a["text"] for a in q["answers"]])
        for article in articles
        for p in article["paragraphs"]
        for q in p["qas"]
    ]
    rng, answerable = random.Random(0), [bool(answers) for _, answers in asked]
    draws = [
        summarise(
            [score(_random_span(context, rng), answers) for context, answers in asked], answerable
        )
        for _ in range(DRAWS)
    ]
    silent = summarise([score("", answers) for _, answers in asked], answerable)
    mean = {
        key: sum(draw["has_answer"][key] for draw in draws) / DRAWS for key in ("exact_match", "f1")
    }
    return {
        "random span": {
            key: sum(draw[key] for draw in draws) / DRAWS for key in ("exact_match", "f1")
        },
        "random span, answerable questions": mean,
        "never answering": {k: silent[k] for k in ("exact_match", "f1")},
    }


def _random_span(context: str, rng: random.Random) -> str:
    words = context.split()
    first = rng.randrange(len(words))
    return " ".join(words[first : first + rng.randint(1, 20)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", help="cases, separated by commas; others keep the figures that --out holds"
    )
    parser.add_argument("--out", default=str(ROOT / "bench/results/heads.json"))
    arguments = parser.parse_args()
    out = Path(arguments.out)
    kept = json.loads(out.read_text()) if out.is_file() else {}
    names = arguments.only.split(",") if arguments.only else list(CASES)
    runs = kept.get("runs", {}) | {name: train(CASES[name]) for name in names}
    import torch

    out.write_text(
        json.dumps(
            {
                "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
                "threads": os.environ.get("OMP_NUM_THREADS", "default"),
                "baselines": baselines(),
                "runs": {name: runs[name] for name in CASES if name in runs},
            },
            indent=2,
        )
        + "\n"
    )
    for name, run in runs.items():
        changed = ", ".join(
            f"{key} {run['before'][key]:.4f} -> {value:.4f}"
            for key, value in run["after"].items()
            if key in (*SHOWN, *NESTED)
        )
        print(f"{name:14} {run['seconds']:6.1f} s  {changed}")
    print(json.dumps(baselines()))


if __name__ == "__main__":
    main()
