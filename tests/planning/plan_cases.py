"""A small GPT-J with awkward sizes, and configs and jobs for it: what the tests of this folder share.

No tensor divides evenly by 2 or 4 ranks, and some are above and some below stage 3's persistence threshold, so that
padding and persistence show.
"""

from __future__ import annotations

import json
from pathlib import Path

from finetune.config import (
    AdapterConfig,
    Config,
    Dtype,
    Init,
    ModelConfig,
    Offload,
    OptimConfig,
    OptimName,
    Quantize,
    TaskConfig,
    TrainConfig,
    ZeroConfig,
)
from finetune.planning.choose import build_job
from finetune.planning.job import Job
from finetune.planning.machine import Machine
from finetune.planning.shape import ModelShape

TINY = {
    "model_type": "gptj", "vocab_size": 2503, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3,
    "n_inner": 2101, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "activation_function": "gelu_new",
}  # fmt: skip
GIB = 2**30
CPU = Machine(gpus=0, gpus_per_node=1, gpu_bytes=0, host_bytes=64 * GIB, disk_bytes=500 * GIB)


def gpu_machine(gpus: int, gib: float, host_gib: float = 512) -> Machine:
    return Machine(gpus, min(gpus, 8), int(gib * GIB), int(host_gib * GIB), 5000 * GIB)


def write_model(folder: Path, values: dict | None = None) -> Path:
    """A checkpoint directory with a config and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values or TINY))
    return folder


def config(
    adapter: AdapterConfig,
    *,
    path: str = "",
    stage: int | str = "auto",
    dtype: str = "bf16",
    accumulation: int = 1,
    ranks: int = 1,
    micro_batch: int | str = 1,
    length: int = 16,
    offload: str = "none",
    params: str = "none",
    checkpointing: bool | str = False,
    quantize: str = "none",
    optimizer: str = "adamw",
) -> Config:
    """A config whose global batch makes the wanted accumulation."""
    micro = micro_batch if isinstance(micro_batch, int) else 1
    return Config(
        model=ModelConfig(path=path, dtype=Dtype(dtype), init=Init.random, quantize=Quantize(quantize)),
        task=TaskConfig(max_length=length),
        adapter=adapter, optim=OptimConfig(name=OptimName(optimizer)),
        zero=ZeroConfig(stage=stage, offload_optimizer=Offload(offload), offload_params=Offload(params),
                        bucket_elements=100_000),
        train=TrainConfig(steps=1, micro_batch=micro_batch, global_batch=micro * ranks * accumulation,
                          activation_checkpointing=checkpointing))  # fmt: skip


def job(cfg: Config, machine: Machine = CPU, ranks: int = 1, head: str = "lm") -> Job:
    return build_job(cfg, machine, ModelShape.from_config(TINY, head), ranks)
