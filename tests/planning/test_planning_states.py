"""Predicted model states against the tensors of real DeepSpeed engines, to the byte, on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from plan_cases import config, job
from plan_engine_walk import ADAPTERS

from finetune.planning.job import Option
from finetune.planning.states import States, model_states
from finetune.process import free_port

HERE = Path(__file__).parent
Walked = dict[int, list[list[dict[str, int]]]]
SETTINGS = [
    ("bf16", 1, "full"),
    ("bf16", 2, "full"),
    ("bf16", 2, "lora"),
    ("fp32", 1, "lora"),
    ("fp32", 2, "full"),
]
PLAIN = [
    {"stage": stage, "dtype": dtype, "accumulation": accumulation, "adapter": adapter}
    for stage, (dtype, accumulation, adapter) in product((0, 1, 2, 3), SETTINGS)
]
QUANTIZED = [
    {
        "stage": stage,
        "dtype": dtype,
        "accumulation": 1,
        "adapter": "lora",
        "quantize": quantize,
    }
    for stage, dtype, quantize in (
        (0, "fp32", "nf4"),
        (2, "bf16", "int8"),
        (3, "bf16", "nf4"),
        (3, "fp32", "int8"),
    )
]
SMALL_STATES = [
    {
        "stage": stage,
        "dtype": dtype,
        "accumulation": accumulation,
        "adapter": adapter,
        "optimizer": optimizer,
    }
    for stage, dtype, accumulation, adapter, optimizer in (
        (0, "fp32", 1, "full", "adamw8bit"),
        (1, "bf16", 2, "full", "adamw8bit"),
        (2, "bf16", 1, "lora", "adamw8bit"),
        (3, "bf16", 2, "full", "adamw8bit"),
        (0, "bf16", 1, "full", "adafactor"),
        (0, "fp32", 2, "lora", "adafactor"),
    )
]
PLAIN += QUANTIZED + SMALL_STATES
OFFLOADED = [
    {
        "stage": stage,
        "dtype": "bf16",
        "accumulation": accumulation,
        "adapter": "full",
        "offload": "cpu",
    }
    for stage, accumulation in product((1, 2, 3), (1, 2))
] + [
    {
        "stage": 3,
        "dtype": "bf16",
        "accumulation": 2,
        "adapter": "full",
        "offload": "cpu",
        "params": "cpu",
    },
    {"stage": 3, "dtype": "bf16", "accumulation": 2, "adapter": "lora", "params": "cpu"},
]
FEW = [
    case for case in PLAIN if (case["dtype"], case["accumulation"]) in (("bf16", 2), ("fp32", 1))
]
WORLDS = {1: FEW + OFFLOADED[1::3], 2: PLAIN + OFFLOADED, 4: FEW}
CASES = [(ranks, case) for ranks, cases in WORLDS.items() for case in cases]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """Figures of all engines: [ranks][rank][case]."""
    out = tmp_path_factory.mktemp("walk")
    jobs = [
        {"ranks": n, "cases": cases, "out": str(out), "port": free_port()}
        for n, cases in WORLDS.items()
    ]
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    ran = subprocess.run(
        [sys.executable, str(HERE / "plan_engine_walk.py"), *map(json.dumps, jobs)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, timeout=900)  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return {
        n: [json.loads((out / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in WORLDS
    }


def predicted(case: dict[str, Any], ranks: int, rank: int) -> States:
    keys = {key: case[key] for key in ("stage", "dtype", "accumulation")}
    keys |= {key: case[key] for key in ("quantize", "optimizer") if key in case}
    cfg = config(ADAPTERS[case["adapter"]], ranks=ranks, **keys)
    option = Option(case["stage"], case.get("offload", "none"), case.get("params", "none"))
    return model_states(job(cfg, ranks=ranks), option, rank)


def name(value: int | dict[str, Any]) -> str:
    return (
        f"{value}ranks"
        if isinstance(value, int)
        else "-".join(str(part) for part in value.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks, case", [(n, case) for n, case in CASES if case in PLAIN], ids=name)
def test_states_equal_the_engine_s_tensors(
    ranks: int, case: dict[str, Any], walked: Walked
) -> None:
    for rank, figures in enumerate(walked[ranks]):
        found, states = figures[WORLDS[ranks].index(case)], predicted(case, ranks, rank)
        wanted = {
            "weights": states.weights,
            "optimizer": states.optimizer,
            "gradients": states.gradients,
            "host": 0,
        }
        if case["accumulation"] > 1:
            wanted["kept_gradients"] = states.kept_gradients
        assert found == wanted, f"rank {rank}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, case", [(n, case) for n, case in CASES if case in OFFLOADED], ids=name
)
def test_offloaded_states_equal_the_engine_s_tensors(
    ranks: int, case: dict[str, Any], walked: Walked
) -> None:
    """On a CPU host and device are one memory: the sums must agree, wherever a tensor is booked."""
    for rank, figures in enumerate(walked[ranks]):
        found, states = figures[WORLDS[ranks].index(case)], predicted(case, ranks, rank)
        host = states.host_weights + states.host_gradients + states.host_optimizer
        device = states.weights + states.optimizer + states.gradients
        gradients = found["gradients"]
        if case["stage"] == 1 and case["accumulation"] > 1:
            # Views of other ranks' gradients still hold the bucket; the peak, which counts, was before.
            assert gradients >= states.gradients and states.peak_gradients >= gradients
            gradients = states.gradients
        assert found["weights"] + found["optimizer"] + found["host"] + gradients == host + device, (
            f"rank {rank}"
        )
