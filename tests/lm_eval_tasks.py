"""Tasks of lm-eval on a local file: a choice, the likelihood of texts, and generated answers."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

NAMES = ("own_words", "own_text", "own_answer")


def write_tasks(folder: Path, rows: int = 20, answer: str = " nothing") -> Path:
    """Write task files and their rows; `answer` is the reference of the generated ones."""
    data, choices = folder / "rows.jsonl", [" United States", " yellow banana"]
    records = [
        {"q": f"The number {i} of the", "choices": choices, "a": i % 2, "answer": answer}
        for i in range(rows)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}{{choices[a]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    generated = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in zip(NAMES, (choice, text, generated), strict=True):
        values = {"task": name} | common | task
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder
