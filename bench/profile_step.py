"""Profile of one training step: torch's profiler over a few steps of this project's own engine.

    python bench/profile_step.py [--model DIR] [--length 1024] [--micro 2] [--stage 2] [--lora] [--steps 3] [k=v ...]

One rank, random tokens; without --model that of `bench/peers.py` (n_embd 512, 6 layers), bf16. Further k=v words change the config.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from workload import Size, make_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint directory")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--shapes", action="store_true", help="tell calls apart by their shapes")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace here")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        profile(args, args.model or make_model(Path(name) / "model", Size()))


def profile(args: argparse.Namespace, model: Path) -> None:
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from finetune import dist
    from finetune.compose import compose_train
    from finetune.gptj import adapters
    from finetune.gptj.load import build_model
    from finetune.planning import machine
    from finetune.sharding import deepspeed_config
    from finetune.sharding.deepspeed_config import Sharding
    from finetune.sharding.engine import Engine, connect_deepspeed

    words = [
        "recipe=clm_pile",
        f"model.path={model}",
        "model.dtype=bf16",
        f"task.max_length={args.length}",
        f"train.micro_batch={args.micro}",
        f"train.global_batch={args.micro}",
        "train.activation_checkpointing=false",
        f"adapter={'lora' if args.lora else 'full'}",
    ]
    cfg = compose_train([*words, *args.words])
    world = dist.connect()
    connect_deepspeed(world)
    module = adapters.attach(
        build_model(cfg.model, "lm", device=world.device, seed=0), cfg.adapter, "lm", str(model), 0
    )
    engine = Engine(
        module,
        deepspeed_config.build(cfg, Sharding(args.stage), 1, world.device.type == "cuda"),
        cfg.optim,
        world,
    )
    engine.train()
    tokens = args.length * args.micro
    ids = torch.randint(0, 50000, (1, tokens), device=world.device)
    positions = torch.arange(args.length, device=world.device).repeat(args.micro)[None]
    boundaries = torch.arange(args.micro + 1, dtype=torch.int32) * args.length
    parts, cuda = {"forward": 0.0, "backward": 0.0, "step": 0.0}, world.device.type == "cuda"

    def timed(part: str, work):
        clock = time.perf_counter()
        result = work()
        if cuda:
            torch.cuda.synchronize()
        parts[part] += time.perf_counter() - clock
        return result

    def step() -> None:
        loss = timed(
            "forward",
            lambda: engine(
                input_ids=ids, position_ids=positions, cu_seqlens=boundaries, labels=ids.roll(-1, 1)
            ),
        )
        timed("backward", lambda: engine.backward(loss, 1 / tokens))
        timed("step", lambda: engine.step(1e-4))

    for _ in range(2):
        step()
    parts.update(dict.fromkeys(parts, 0.0))
    clock = time.perf_counter()
    for _ in range(args.steps):
        step()
    seconds = (time.perf_counter() - clock) / args.steps
    print(
        f"{tokens / seconds:.0f} tok/s, {seconds:.3f} s a step: "
        + ", ".join(f"{name} {value / args.steps:.3f} s" for name, value in parts.items())
    )
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    print(f"peak resident memory {machine.peak_host_bytes() / 2**20:.0f} MiB")
    with torch_profile(activities=activities, record_shapes=args.shapes) as prof:
        for _ in range(args.steps):
            step()
    print(
        prof.key_averages(group_by_input_shape=args.shapes).table(
            sort_by="self_device_time_total" if cuda else "self_cpu_time_total",
            row_limit=args.rows,
            max_name_column_width=60,
        )
    )
    if args.trace:
        prof.export_chrome_trace(str(args.trace))
    dist.disconnect()


if __name__ == "__main__":
    main()
