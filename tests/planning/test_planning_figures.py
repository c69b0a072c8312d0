"""Predictions for GPT-J-6B equal the recorded ones to the byte: a change of a rule must show here.

After an intended change: python tests/planning/test_planning_figures.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import gpu_machine

from finetune.config import (
    Config,
    Dtype,
    FullConfig,
    LoraConfig,
    ModelConfig,
    PrefixConfig,
    TaskConfig,
    TrainConfig,
)
from finetune.planning.choose import plan
from finetune.planning.machine import Machine
from finetune.planning.shape import load_shape

RECORD = Path(__file__).with_name("gptj_6b_figures.json")
GIB = 2**30
CPU = Machine(gpus=0, gpus_per_node=1, gpu_bytes=0, host_bytes=512 * GIB, disk_bytes=5000 * GIB)
DORA = LoraConfig(targets="all-linear", dora=True, dropout=0.1)
CASES = {
    "full on 1 x 80": (gpu_machine(1, 80), FullConfig(), {"activation_checkpointing": True}),
    "full on 4 x 80": (gpu_machine(4, 80), FullConfig(), {"activation_checkpointing": "selective"}),
    "full on 8 x 40, one micro-step": (gpu_machine(8, 40), FullConfig(), {"global_batch": 8}),
    "full on 8 x 80, offloaded inputs": (
        gpu_machine(8, 80),
        FullConfig(),
        {"activation_checkpointing": "offload", "micro_batch": 8},
    ),
    "full on 16 x 24": (gpu_machine(16, 24), FullConfig(), {"micro_batch": 2}),
    "LoRA on 1 x 24": (gpu_machine(1, 24), LoraConfig(), {"micro_batch": "auto"}),
    "DoRA on 2 x 40": (gpu_machine(2, 40), DORA, {"activation_checkpointing": "selective"}),
    "prefix on 1 x 24": (gpu_machine(1, 24), PrefixConfig(), {}),
    "full on 2 CPU ranks": (CPU, FullConfig(), {}),
    "LoRA on 2 CPU ranks": (CPU, LoraConfig(), {"micro_batch": 4}),
}


def figures(name: str, dtype: Dtype) -> dict[str, object]:
    """Every figure of the plan for one case."""
    machine, adapter, train = CASES[name]
    machine = replace(machine, nvme_bytes=4000 * GIB)
    cfg = Config(
        model=ModelConfig(path="asset:gptj_6b", dtype=dtype),
        task=TaskConfig(),
        adapter=adapter,
        train=TrainConfig(**{"micro_batch": 1, "global_batch": 64} | train),
    )
    cfg.data.eval, cfg.zero.nvme_path, cfg.checkpoint.every = "eval.jsonl", "/nvme", 100
    values = plan(cfg, machine, load_shape("asset:gptj_6b"), machine.gpus or 2).to_json()
    options = {
        f"{o['zero']} {o['offload_optimizer']} {o['offload_params']}": [
            o["gpu_bytes"],
            o["host_bytes"],
            o["disk_bytes"],
            o["tensor_bytes"],
            *o["parts"].values(),
            *o["host_parts"].values(),
            o["short"],
        ]
        for o in values["options"]
    }
    keys = ("chosen", "parameters", "micro_batch", "accumulation", "max_micro_batch", "advice")
    sizes = ("checkpoint_bytes", "export_bytes", "load_host_bytes")
    return {"options": options, **{key: values[key] for key in (*keys, *sizes)}}


@pytest.mark.parametrize("dtype", [Dtype.bf16, Dtype.fp32], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("name", CASES)
def test_figures_are_the_recorded_ones(
    name: str, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    recorded = json.loads(RECORD.read_text())[f"{name}, {dtype.value}"]
    assert figures(name, dtype) == recorded


if __name__ == "__main__":
    both = (Dtype.bf16, Dtype.fp32)
    record = {f"{name}, {d.value}": figures(name, d) for name in CASES for d in both}
    lines = (f"{json.dumps(name)}: {json.dumps(record[name])}" for name in sorted(record))
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
