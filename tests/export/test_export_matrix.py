"""An export is what was trained, whatever head, adapter, stage and number of ranks: reopened by plain transformers.

The judge is Hugging Face's eager GPT-J with peft's own adapters. `pytest tests/export/test_export_matrix.py
--export-matrix=full` runs all 90 combinations and writes bench/results/export_matrix.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from finetune.cli.app import compose_config
from finetune.cli.export import run as export
from finetune.export.reopen import about_of_run, checkpoint_of, load_config, load_run
from tests.conftest import ROOT

AUTO = {
    "lm": "AutoModelForCausalLM",
    "classify": "AutoModelForSequenceClassification",
    "qa": "AutoModelForQuestionAnswering",
}
TOLERANCE = 1e-5
RESULT = ROOT / "bench/results/export_matrix.json"
OUT = f"out-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
"""Tests of other files export from the same runs, at the same time in another worker."""


def exported(run: Path, kind: str, *words: str) -> Path:
    """Export by the program, once for all tests."""
    out = run / "-".join([OUT, kind, *(word.split("=")[1] for word in words)])
    if not out.exists():
        line = [f"run={run}", f"kind={kind}", f"out={out}", "verify=tensors", *words]
        assert export(compose_config(line, "export")) == 0
    return out


def reopened(folder: Path, head: str, dtype: torch.dtype):
    """The export as a stranger loads it, by its own files alone."""
    auto = getattr(transformers, AUTO[head])
    if not (folder / "adapter_config.json").exists():
        return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = {} if head == "lm" else {"config": transformers.AutoConfig.from_pretrained(folder)}
    model = auto.from_pretrained(base, dtype=dtype, attn_implementation="eager", **config)
    return PeftModel.from_pretrained(model, folder).eval()


def outputs(model, head: str, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=ids)
    return (
        torch.stack([out.start_logits, out.end_logits], -1).float()
        if head == "qa"
        else out.logits.float()
    )


def difference(folder: Path, head: str, ids: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((outputs(reopened(folder, head, torch.float32), head, ids) - wanted).abs().max())


def trained(run: Path, head: str, ids: torch.Tensor) -> torch.Tensor:
    """Outputs of this project's model with the checkpoint's weights; of a classifier at the last token."""
    folder, checkpoint = checkpoint_of(run)
    labels = about_of_run(folder).get("num_labels")
    module = load_run(load_config(folder), checkpoint, head, labels, torch.device("cpu"))
    with torch.no_grad():
        out = module(input_ids=ids)
    return out[:, -1] if head == "classify" else out.float()


@pytest.fixture(scope="module")
def figures(runs, cases) -> dict[str, dict]:
    """Case -> largest differences of each export, and what rounding the weights to bf16 does to the outputs (mean
    difference over their spread, in fp32 arithmetic)."""
    found = {}
    for case in cases:
        run = runs / case.name
        ids = torch.tensor([json.loads((run / "reference.json").read_text())[0]])
        wanted = trained(run, case.head, ids)
        kinds = ["full"] if case.adapter == "full" else ["adapter", "merged"]
        row = {}
        for kind in kinds:
            row[kind] = difference(exported(run, kind), case.head, ids, wanted)
        row["engine"] = difference(run / "export", case.head, ids, wanted)
        if case.head == "lm" or len(cases) > 20:
            folder = exported(run, kinds[-1], "dtype=bf16")
            half = reopened(folder, case.head, torch.bfloat16).float()
            spread = wanted.std() if wanted.numel() > 2 else wanted.abs().mean()
            row["bf16"] = float((outputs(half, case.head, ids) - wanted).abs().mean() / spread)
        base = reopened_base(run, case.head, ids)
        row["moved"] = None if base is None else float((wanted - base).abs().max())
        found[case.name] = row
    if len(cases) > 20:
        command = "pytest tests/export/test_export_matrix.py --export-matrix=full"
        RESULT.write_text(
            json.dumps({"command": command, "tolerance": TOLERANCE, "cases": found}, indent=1)
            + "\n"
        )
    return found


def reopened_base(run: Path, head: str, ids: torch.Tensor) -> torch.Tensor | None:
    """Outputs before training; of heads that training made from nothing there are none."""
    if head != "lm":
        return None
    path = load_config(run).model.path
    return outputs(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), head, ids
    )


@pytest.mark.slow
def test_every_export_equals_what_was_trained(figures):
    wrong = {
        name: row
        for name, row in figures.items()
        if any(row.get(kind, 0.0) > TOLERANCE for kind in ("adapter", "merged", "full", "engine"))
    }
    assert figures and not wrong, wrong


@pytest.mark.slow
def test_bf16_is_rounding_and_nothing_else(figures):
    """bf16 has 8 bits: an error of 2^-9 in each weight, which sums leave at that size."""
    found = {name: row["bf16"] for name, row in figures.items() if "bf16" in row}
    assert found and {name: value for name, value in found.items() if value > 0.02} == {}


@pytest.mark.slow
def test_training_changed_the_outputs(figures):
    """Otherwise equality would be that of the untouched base."""
    moved = [row["moved"] for row in figures.values() if row["moved"] is not None]
    assert moved and min(moved) > 100 * TOLERANCE


@pytest.mark.slow
def test_the_engine_and_the_checkpoint_export_the_same_tensors(runs, cases):
    for case in cases:
        file = "model.safetensors" if case.adapter == "full" else "adapter_model.safetensors"
        kind = "full" if case.adapter == "full" else "adapter"
        a, b = (
            load_file(runs / case.name / "export" / file),
            load_file(runs / case.name / f"{OUT}-{kind}" / file),
        )
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), case.name


def test_the_part_covers_everything_once():
    from tests.export.matrix import ADAPTERS, HEADS, PART, RANKS, STAGES

    assert {(c.head, c.adapter) for c in PART} == {(h, a) for h in HEADS for a in ADAPTERS}
    assert {(c.stage, c.ranks) for c in PART} == {(s, r) for s in STAGES for r in RANKS}
