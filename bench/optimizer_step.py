"""Operations and time of the optimizer step of a LoRA of GPT-J's 336 tensors, with DeepSpeed's own step and with ours.

    python bench/optimizer_step.py [--out bench/results/optimizer_step.json]

The tensors are small here, so the time is that of launching operations, which is what a step of so many tensors costs
on a GPU as well. Each line is the median of 20 steps in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from workload import ROOT, free_port, machine

TENSORS, STEPS, WARMUP = 336, 20, 3
PATCHES = ("step_at_once", "let_the_norm_tell", "take_norms_by_rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/optimizer_step.json")
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        measure(int(options.child[0]), options.child[1] == "ours")
        return
    rows = []
    for stage in (0, 1, 2):
        for whose in ("deepspeed", "ours"):
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(stage), whose],
                env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    command = "python bench/optimizer_step.py"
    result = {"command": command, "machine": machine(), "tensors": TENSORS, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(stage: int, ours: bool) -> None:
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    from finetune import dist
    from finetune.compose import compose_train
    from finetune.sharding import deepspeed_config
    from finetune.sharding import engine as sharding
    from finetune.sharding.deepspeed_config import Sharding

    class Counter(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    for name in () if ours else PATCHES:
        setattr(sharding, name, lambda *_: None)
    world = dist.connect(1)
    sharding.connect_deepspeed(world)
    words = ["recipe=clm_pile", "train.micro_batch=1", "train.global_batch=1"]
    cfg = compose_train([*words, "model.dtype=bf16", "optim.grad_clip=1"])
    config = deepspeed_config.build(cfg, Sharding(stage), 1, world.device.type == "cuda")
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(TENSORS)]).bfloat16()
    engine = sharding.Engine(model.to(world.device), config, cfg.optim, world)
    seconds, counter = [], Counter()
    for step in range(WARMUP + STEPS + 1):
        batch = torch.ones(1, 8, dtype=torch.bfloat16, device=world.device)
        engine.backward(engine(input=batch).float().square().sum(), 1.0)
        if step == WARMUP + STEPS:
            with counter:
                engine.step(1e-4)
            break
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        engine.step(1e-4)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    found = {
        "stage": stage,
        "whose": "ours" if ours else "deepspeed",
        "operations": counter.operations,
        "milliseconds": round(1000 * statistics.median(seconds[WARMUP:]), 2),
    }
    print(json.dumps(found))
    dist.disconnect()


if __name__ == "__main__":
    main()
