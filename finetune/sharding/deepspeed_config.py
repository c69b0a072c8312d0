"""Translate (Config, plan's choice, world size) to DeepSpeed's dictionary.

The function is pure and the dictionary complete, without "auto". This is the only module that knows
DeepSpeed's keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.config import Config, Dtype, Offload
from finetune.planning.estimate import LIVE_ELEMENTS
from finetune.planning.job import accumulation
from finetune.planning.states import PERSISTENCE_ELEMENTS

NO_CLIPPING = 1e30
"""DeepSpeed reports the gradient norm only where it clips; a bound that nothing reaches keeps the figure."""


@dataclass(frozen=True)
class Sharding:
    """The sharding that the planner or the user chose."""

    stage: int
    offload_optimizer: Offload = Offload.none
    offload_params: Offload = Offload.none
    nvme_folder: Path | None = None
    """Folder in which nvme offload keeps this run's states and weights."""
    largest_tensor: int = 0
    """Elements of the model's largest weight: a buffer between nvme and host must hold a rank's part of it."""

    @property
    def on_nvme(self) -> bool:
        return Offload.nvme in (self.offload_optimizer, self.offload_params)


def build(cfg: Config, sharding: Sharding, world_size: int, cuda: bool) -> dict:
    """Return DeepSpeed's configuration of one run."""
    steps = accumulation(int(cfg.train.micro_batch), cfg.train.global_batch, world_size)
    bf16, fp16 = cfg.model.dtype is Dtype.bf16, cfg.model.dtype is Dtype.fp16
    half_accumulates = bf16 and steps > 1 and sharding.stage > 0
    return {
        "train_micro_batch_size_per_gpu": int(cfg.train.micro_batch),
        "gradient_accumulation_steps": steps,
        "train_batch_size": cfg.train.global_batch,
        "gradient_clipping": cfg.optim.grad_clip or NO_CLIPPING,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": fp16, "initial_scale_power": 16, "loss_scale_window": 1000},
        # Under bf16, DeepSpeed accumulates micro-batches in bf16 by default; stage 0 must do so.
        "data_types": {"grad_accum_dtype": "fp32"} if half_accumulates else {},
        "zero_optimization": _zero(cfg, sharding, world_size, cuda),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _zero(cfg: Config, sharding: Sharding, world_size: int, cuda: bool) -> dict:
    bucket = cfg.zero.bucket_elements
    zero = {
        "stage": sharding.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        "overlap_comm": cuda,
        # gloo reduces to everyone faster than to each owner in turn.
        "reduce_scatter": cuda,
        "round_robin_gradients": False,
    }
    if sharding.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENCE_ELEMENTS,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if sharding.stage > 0 and sharding.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = _offload(sharding.offload_optimizer, sharding, cuda)
    if sharding.stage == 3 and sharding.offload_params is not Offload.none:
        zero["offload_param"] = _offload(sharding.offload_params, sharding, cuda)
        if sharding.offload_params is Offload.nvme:
            # DeepSpeed's defaults keep the first 10^9 trained weights on the host, and have room
            # for 10^8 in a buffer.
            zero["offload_param"] |= {
                "max_in_cpu": 0,
                "buffer_size": -(-sharding.largest_tensor // world_size),
            }
    return zero


def _offload(where: Offload, sharding: Sharding, cuda: bool) -> dict:
    section: dict = {"device": where.value, "pin_memory": cuda}
    if where is Offload.nvme:
        section["nvme_path"] = str(sharding.nvme_folder)
    return section
