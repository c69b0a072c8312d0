"""Every workaround for DeepSpeed is still needed, and works: a real engine on one rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.sharding import deepspeed_patches
from tests.distributed.ranks import on_ranks

TENSORS = 60


class Counter(TorchDispatchMode):
    """Operations, and the largest number of fp64 elements in one tensor."""

    operations = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.largest = max(self.largest, out.numel())
        return out


def measure(without: str, stage: int, file: Path) -> None:
    """Take three steps of an engine, the second with a gradient that is not finite."""
    from finetune import dist
    from finetune.compose import compose_train
    from finetune.sharding import deepspeed_config
    from finetune.sharding import engine as module
    from finetune.sharding.deepspeed_config import Sharding

    if without:
        setattr(module, without, lambda *_: None)
    world = dist.connect(1)
    module.connect_deepspeed(world)
    words = ["recipe=clm_pile", "train.micro_batch=1", "train.global_batch=1"]
    cfg = compose_train([*words, "model.dtype=bf16", "optim.grad_clip=1"])
    config = deepspeed_config.build(cfg, Sharding(stage), 1, world.device.type == "cuda")
    torch.manual_seed(0)
    small = [nn.Linear(8, 8, bias=False) for _ in range(TENSORS)]
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 8), *small).bfloat16()
    engine = module.Engine(model, config, cfg.optim, world)
    gradients, update = [], engine.optimizer.step

    def counted() -> None:
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        gradients.append(sum(p.numel() for p in parameters if p.grad is not None))
        update()

    engine.optimizer.step = counted
    norms = []
    for factor in (1.0, float("nan"), 1.0):
        loss = engine(input=torch.ones(1, 64, dtype=torch.bfloat16)).float().square().sum()
        engine.backward(loss * factor, 1.0)
        with Counter() as counter:
            engine.step(1e-2)
        norms.append(engine.grad_norm())
    port = os.environ["MASTER_PORT"]
    left = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    for path in left:
        path.unlink()
    found = {
        "operations": counter.operations,
        "fp64": counter.largest,
        "gradients": max(gradients),
        "left": len(left),
        "norms": [norm for norm in norms if norm == norm],
        "skipped": engine.skipped,
        "weights": [float(p.double().sum()) for p in model.parameters()],
    }
    file.write_text(json.dumps(found))
    dist.disconnect()


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory):
    found: dict[tuple[str, int], dict[str, Any]] = {}

    def of(without: str = "", stage: int = 2) -> dict[str, Any]:
        if (without, stage) not in found:
            file = tmp_path_factory.mktemp("figures") / "figures.json"
            on_ranks(1, measure, without, stage, file)
            found[without, stage] = json.loads(file.read_text())
        return found[without, stage]

    return of


def test_no_gradient_is_converted_to_fp64(figures):
    elements = 64 * 512
    assert figures()["fp64"] < elements / 100
    assert figures("take_norms_by_rows")["fp64"] >= elements


def test_no_shared_memory_is_left(figures):
    assert figures()["left"] == 0 and figures("unlink_shared_memory")["left"] == 1


@pytest.mark.parametrize(
    ("stage", "name"), [(0, "step_at_once"), (1, "let_the_norm_tell"), (2, "take_norms_by_rows")]
)
def test_a_step_of_many_small_tensors_is_few_operations(figures, stage, name):
    """With the same weights, norms and skipped steps as DeepSpeed's own."""
    ours, theirs = figures(stage=stage), figures(name, stage)
    assert ours["operations"] < theirs["operations"] - TENSORS
    assert ours["skipped"] == theirs["skipped"] == 1 and len(ours["norms"]) == 2
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert ours["weights"] == pytest.approx(theirs["weights"], rel=1e-5)


def test_one_group_has_fp32_gradients_at_a_time(figures):
    matrices, vectors = 64 * 512 + 512 * 8 + TENSORS * 8 * 8, 512 + 8
    assert figures(stage=0)["gradients"] == matrices
    assert figures("step_at_once", 0)["gradients"] == matrices + vectors


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_operations_of_a_step(figures, stage):
    """At stage 0 the memory of each gradient, and a few for all of them."""
    assert figures(stage=stage)["operations"] < (2 if stage == 0 else 8) * TENSORS


def test_a_weight_that_is_listed_twice_is_read_once():
    """DeepSpeed's own `swap_in` takes one buffer for each entry of the list."""
    reads = []
    module = nn.Linear(2, 2)
    swapper = SimpleNamespace(swap_in=lambda params, **options: reads.append((params, options)))
    for parameter in module.parameters():
        parameter.nvme_swapper = swapper
    deepspeed_patches.read_once(module)
    swapper.swap_in([module.weight, module.bias, module.weight], async_op=False)
    ((params, options),) = reads
    assert [id(p) for p in params] == [id(module.weight), id(module.bias)]
    assert options == {"async_op": False}
