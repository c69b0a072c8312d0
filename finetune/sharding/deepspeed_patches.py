"""Workarounds for DeepSpeed 0.19.8, each with its place upstream and the test that fails without it.

When such a test passes without its workaround, the workaround can go.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# DeepSpeed's autotuner, which nothing here uses, imports mlflow where it is installed: two seconds
# of every start. It does without if the import fails.
_mlflow = sys.modules.get("mlflow")
sys.modules["mlflow"] = _mlflow  # type: ignore[assignment]  # None: its import fails
import deepspeed  # noqa: E402, F401

if _mlflow is None:
    del sys.modules["mlflow"]

NORM_PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Elements whose norms are taken at once, in rows of `NORM_ROW`."""
NORM_ROW = 1024
"""So few squares lose nothing in fp32; the rows' norms are added up in fp64."""


def unlink_shared_memory(rank: int) -> None:
    """Unlink DeepSpeed's shared buffer: 66 MiB per rank that would stay in memory after the run.

    Call it once every rank has mapped the buffer, that is after the first barrier.

    Upstream: csrc/cpu/comm/shm.cpp, whose `shared_close` nobody calls. The buffers of each rank come
    from https://github.com/deepspeedai/DeepSpeed/pull/5320; no issue is known.
    Test: test_deepspeed_patches.py, test_no_shared_memory_is_left.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(
        missing_ok=True
    )


def read_once(module: nn.Module) -> None:
    """Read a weight on nvme once if DeepSpeed's prefetch lists it twice.

    DeepSpeed itself rejects such a list: "Some params are already available or in flight", or too
    few buffers.

    Upstream: runtime/swap_tensor/partitioned_param_swapper.py, `swap_in`; no issue is known.
    Test: test_deepspeed_patches.py, test_a_weight_that_is_listed_twice_is_read_once.
    """

    def swap_in_once(swap_in, params: list[nn.Parameter], *args, **kwargs):
        return swap_in(list({id(p): p for p in params}.values()), *args, **kwargs)

    swappers = [getattr(p, "nvme_swapper", None) for p in module.parameters()]
    for swapper in {id(swapper): swapper for swapper in swappers if swapper}.values():
        swapper.swap_in = partial(swap_in_once, swapper.swap_in)


def take_norms_by_rows(wrapper: Any) -> None:
    """Pass row norms instead of gradients to ZeRO's gradient norm, to save memory.

    ZeRO converts its input to fp64, which takes 1.7 GB for GPT-J's head alone.

    Upstream: `get_grad_norm_direct` in runtime/zero/stage_1_and_2.py and stage3.py; the norm can
    only be left out, by https://github.com/deepspeedai/DeepSpeed/pull/8331.
    Test: test_deepspeed_patches.py, test_no_gradient_is_converted_to_fp64.
    """
    whole = getattr(wrapper, "get_grad_norm_direct", None)
    if whole is None:
        return

    def by_rows(gradients, params, norm_type=2):
        if norm_type != 2:
            return whole(gradients, params, norm_type)
        norms = [row_norms(g) for g in gradients if not getattr(g, "_zero_padding", False)]
        return whole(norms, params, norm_type)

    wrapper.get_grad_norm_direct = by_rows


def row_norms(gradient: Tensor) -> Tensor:
    """Return fp32 norms of consecutive parts of a flattened gradient.

    The norm of these norms is the norm of the gradient.
    """
    flat = gradient.reshape(-1)
    whole = len(flat) // NORM_ROW * NORM_ROW
    rows = flat[:whole].view(-1, NORM_ROW).split(NORM_PIECE[flat.device.type] // NORM_ROW)
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in rows]
    return torch.cat(
        [*parts, torch.linalg.vector_norm(flat[whole:], dtype=torch.float32).reshape(1)]
    )
