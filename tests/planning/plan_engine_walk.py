"""Build real engines on N ranks, train two steps each, and count the bytes of the tensors they hold.

    python plan_engine_walk.py '{"ranks": 2, "cases": [{"stage": 2, "dtype": "bf16", ...}], "out": "folder"}' ...

Each argument is one group of ranks, forked from this process so that torch and DeepSpeed are imported once. Every rank
writes its figures to out/<ranks>-<rank>.json. Storages are counted once, whatever views of them there are.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from plan_cases import config, write_model

from finetune import dist
from finetune.config import FullConfig, LoraConfig
from finetune.gptj import adapters
from finetune.gptj.load import build_model
from finetune.sharding import deepspeed_config, partitions
from finetune.sharding.deepspeed_config import Sharding
from finetune.sharding.engine import Engine, connect_deepspeed, place_partitioned

ADAPTERS = {"full": FullConfig(), "lora": LoraConfig(rank=3, lr_ratio=4.0)}


def main(jobs: list[str]) -> None:
    for text in jobs:
        job = json.loads(text)
        children = [_fork(job, rank) for rank in range(job["ranks"])]
        for child in children:
            child.join()
        assert all(child.exitcode == 0 for child in children), f"a rank of {job['ranks']} failed"


def _fork(job: dict[str, Any], rank: int) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_rank, args=(job, rank))
    process.start()
    return process  # type: ignore[return-value]


def _rank(job: dict[str, Any], rank: int) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": job["ranks"],
        "LOCAL_WORLD_SIZE": job["ranks"],
    }
    os.environ.update({key: str(value) for key, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    world = dist.connect(1)
    connect_deepspeed(world)
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_model(Path(folder)))
        found = [walk(case, path, world) for case in job["cases"]]
    (Path(job["out"]) / f"{job['ranks']}-{rank}.json").write_text(json.dumps(found))
    dist.disconnect()


def walk(case: dict[str, Any], path: str, world: dist.World) -> dict[str, int]:
    """Bytes of one engine: states after the first step, gradients in the second."""
    engine = build(case, path, world)
    accumulation = case["accumulation"]
    step(engine, accumulation, world)
    found = {
        "weights": weights(engine),
        "optimizer": optimizer(engine),
        "host": host(engine),
    }
    for micro in range(accumulation):
        backward(engine, world)
        last = micro == accumulation - 1
        found["gradients" if last else "kept_gradients"] = gradients(engine)
        engine.step(1e-4)
    getattr(engine.wrapper, "destroy", lambda: None)()
    return found


def build(case: dict[str, Any], path: str, world: dist.World) -> Engine:
    kind = ADAPTERS[case["adapter"]]
    keys = {key: case[key] for key in ("stage", "dtype", "accumulation")}
    keys |= {key: case[key] for key in ("quantize", "optimizer") if key in case}
    places = {key: case.get(key, "none") for key in ("offload", "params")}
    cfg = config(kind, path=path, ranks=world.size, **keys, **places)
    sharding = Sharding(case["stage"], cfg.zero.offload_optimizer, cfg.zero.offload_params)
    settings = deepspeed_config.build(cfg, sharding, world.size, cuda=False)
    # Told nothing but the config: on a CPU, zero.Init turns a dtype that it is given into bf16.
    partition = deepspeed.zero.Init(config_dict_or_path=settings) if case["stage"] == 3 else None
    module = build_model(
        cfg.model, "lm", device=world.device, seed=0, partition=partition,
        place=partial(place_partitioned, world) if partition else None, reads=world.main or not partition)  # fmt: skip
    module = adapters.attach(module, kind, "lm", path, 0)
    return Engine(module, settings, cfg.optim, world, getattr(kind, "lr_ratio", 1.0))


def backward(engine: Engine, world: dist.World) -> None:
    ids = torch.arange(16)[None]
    positions = torch.arange(16)[None]
    loss = engine(
        input_ids=ids, position_ids=positions, labels=ids.roll(-1), cu_seqlens=torch.tensor([0, 16])
    )
    engine.backward(loss, 1.0)


def step(engine: Engine, accumulation: int, world: dist.World) -> None:
    for _ in range(accumulation):
        backward(engine, world)
        engine.step(1e-4)


# ---------------------------------------------------------------------- counting


def total(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)
    return sum(storages.values())


def weight_tensors(engine: Engine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        status = getattr(parameter, "ds_status", None)
        if status is None or status.name == "AVAILABLE":
            yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor.data


def weights(engine: Engine) -> int:
    return total(weight_tensors(engine))


def optimizer(engine: Engine) -> int:
    """Masters (where they are not the weights themselves), moments and step counts."""
    own = {tensor.untyped_storage().data_ptr() for tensor in weight_tensors(engine)}
    masters = [
        m.data for m in partitions.masters(engine) if m.untyped_storage().data_ptr() not in own
    ]
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return total([*masters, *states])


def gradients(engine: Engine) -> int:
    return total(gradient_tensors(engine))


def gradient_tensors(engine: Engine) -> Iterator[Any]:
    """Everything that DeepSpeed 0.19's wrappers keep gradients in, except the fp32 copies of offload."""
    for parameter in engine.module.parameters():
        yield from (parameter.grad, getattr(parameter, "grad_accum", None))
    wrapper = engine.wrapper
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(wrapper, name, {}).values():
            yield from group or ()
    yield from getattr(wrapper, "fp32_groups_gradients_flat", ())
    yield getattr(wrapper, "grad_partitions_flat_buffer", None)


def host(engine: Engine) -> int:
    """What offload adds on the host beside masters and moments: fp32 gradients, copies, staging buffers."""
    wrapper = engine.wrapper
    if not (getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False)):
        return 0
    masters = partitions.masters(engine)
    extra = [master.grad for master in masters] + list(
        getattr(wrapper, "param_buffer_of_bit16_for_cpu_offload_groups", ())
    )
    staging = [
        getattr(wrapper, f"temp_grad_buffer_for_{place}_offload", None) for place in ("cpu", "gpu")
    ]
    return total([*extra, *staging])


if __name__ == "__main__":
    main(sys.argv[1:])
