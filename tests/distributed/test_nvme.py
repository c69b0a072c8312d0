"""Offload to nvme: the same numbers as without it, and checkpoints that go from one to the other.

Needs DeepSpeed's async_io op, which takes libaio with its headers (apt install libaio-dev) and two minutes of compiling
in the first test; skipped where the headers are missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import losses, run_cases
from tests.distributed.test_resume import CUT, STEPS, branch, overrides, tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/usr/include/libaio.h").exists(), reason="libaio-dev is not installed"
    ),
]
OPTIMIZER, WEIGHTS = "zero.offload_optimizer=nvme", "zero.offload_params=nvme"
CASES = {
    "memory": [],
    "optimizer": [OPTIMIZER],
    "weights": [WEIGHTS],
    "both": [OPTIMIZER, WEIGHTS],
    "bf16": ["model.dtype=bf16"],
    "bf16-both": ["model.dtype=bf16", OPTIMIZER, WEIGHTS],
    "lora": ["adapter=lora", "adapter.targets=all-linear"],
    "lora-weights": ["adapter=lora", "adapter.targets=all-linear", WEIGHTS],
}
RESUMED = {
    "optimizer": "optimizer",
    "both": "both",
    "memory-to-both": "both",
    "both-to-memory": "memory",
}
"""Name of the resumed run -> the case whose settings it goes on with; it starts from that before "-to-"."""


@pytest.fixture(scope="module")
def runs(
    pocket_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("nvme")
    (root / "disk").mkdir()

    def case(name: str, settings: str) -> list[str]:
        return overrides(
            pocket_gptj,
            unequal_documents,
            root / name,
            "zero=stage3",
            f"zero.nvme_path={root / 'disk'}",
            "train.probe=true",
            "data.eval=null",
            "train.eval_every=0",
            *CASES[settings],
        )

    run_cases(2, [case(name, name) for name in CASES])
    for name in RESUMED:
        branch(root / name.split("-to-")[0], f"{name}-again")
    run_cases(2, [case(f"{name}-again", settings) for name, settings in RESUMED.items()])
    return root


@pytest.mark.parametrize("name", ["optimizer", "weights", "both", "bf16-both", "lora-weights"])
def test_losses_and_states_are_those_of_memory(runs, name):
    plain = {"bf16-both": "bf16", "lora-weights": "lora"}.get(name, "memory")
    assert (
        losses(runs / name) == pytest.approx(losses(runs / plain), rel=1e-6)
        and len(losses(runs / name)) == STEPS
    )
    found, wanted = tensors(runs / name), tensors(runs / plain)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(runs, name):
    whole, again = runs / name.split("-to-")[0], runs / f"{name}-again"
    assert json.loads((again / "result.json").read_text())["status"] == "done"
    exact = "-to-" not in name
    assert losses(again) == (losses(whole) if exact else pytest.approx(losses(whole), rel=1e-6))
    found, wanted = tensors(again), tensors(whole)
    assert found.keys() == wanted.keys() and CUT < STEPS
    for key, tensor in wanted.items():
        torch.testing.assert_close(
            found[key], tensor, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7
        )


def test_states_count_as_held_and_the_disk_is_left_empty(runs):
    held = {
        name: json.loads((runs / name / "result.json").read_text())["optimizer_bytes_per_rank"]
        for name in CASES
    }
    assert held["optimizer"] == held["both"] == held["memory"] and min(held["memory"]) > 0
    assert list((runs / "disk").iterdir()) == []
