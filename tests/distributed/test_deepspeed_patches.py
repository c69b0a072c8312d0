"""Every workaround for DeepSpeed is still needed, and works: a real engine on one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch import nn

from finetune.process import free_port
from finetune.sharding import deepspeed_patches
from tests.distributed.ranks import ROOT

ENGINE = """
import os, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from finetune import dist
from finetune.config import OptimConfig
from finetune.sharding import engine as module
without = sys.argv[1]
if without:
    setattr(module, without, lambda *_: None)

class Wide(TorchDispatchMode):
    "The largest number of fp64 elements in one tensor."
    largest = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            Wide.largest = max(Wide.largest, out.numel())
        return out

world = dist.connect(1)
module.connect_deepspeed(world)
config = {
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": 1,
    "gradient_clipping": 1.0, "bf16": {"enabled": True}, "fp16": {"enabled": False},
    "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
engine = module.Engine(torch.nn.Linear(64, 512).bfloat16(), config, OptimConfig(), world)
loss = engine(input=torch.ones(1, 64, dtype=torch.bfloat16)).float().sum()
with Wide():
    engine.backward(loss, 1.0)
    engine.step(1e-3)
port = os.environ["MASTER_PORT"]
left = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
print("FIGURES", Wide.largest, len(left))
for path in left:
    path.unlink()
dist.disconnect()
"""


def figures(without: str = "") -> tuple[int, int]:
    """Run a step of an engine: elements of the largest fp64 tensor, and shared buffers left."""
    names = {name: "1" for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, without],
        cwd=ROOT,
        env=os.environ | names | ranks | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("FIGURES")), None)
    assert line, done.stderr[-3000:]
    largest, left = line.split()[1:]
    return int(largest), int(left)


@pytest.fixture(scope="module")
def patched() -> tuple[int, int]:
    return figures()


def test_no_gradient_is_converted_to_fp64(patched):
    elements = 64 * 512
    assert patched[0] < elements / 100 and figures("take_norms_by_rows")[0] >= elements


def test_no_shared_memory_is_left(patched):
    assert patched[1] == 0 and figures("unlink_shared_memory")[1] == 1


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
