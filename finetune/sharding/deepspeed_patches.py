"""Workarounds for DeepSpeed 0.19.8, each with its place upstream and the test that fails without it.

When such a test passes without its workaround, the workaround can go.
"""

from __future__ import annotations

import math
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
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402

NORM_PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Elements whose norms are taken at once, in rows of `NORM_ROW`."""
NORM_ROW = 1024
"""So few squares lose nothing in fp32; the rows' norms are added up in fp64."""
SMALL = {"cpu": 2**14, "cuda": 2**22}
"""Gradients of at most so many elements are not divided into rows: fp32 is exact enough for them. A
GPU adds up in a tree, a CPU one after another."""


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
    """Pass row norms instead of gradients to ZeRO's gradient norm, to save memory and time.

    ZeRO converts its input to fp64, which takes 1.7 GB for GPT-J's head alone. And it does so tensor
    by tensor: for a LoRA's hundreds of small ones, launching the operations takes longer than they.

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
        given = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        return whole([norms_of_parts(given)] if given else [], params, norm_type)

    wrapper.get_grad_norm_direct = by_rows


def let_the_norm_tell(wrapper: Any) -> None:
    """Leave out the search of every gradient for values that are not finite at stages 1 and 2.

    It takes ten operations a tensor and an answer from the GPU. Their norm, which is taken anyway, is
    not finite either, and drops the same step. With offload DeepSpeed needs the search.

    Upstream: `step` in runtime/zero/stage_1_and_2.py.
    Test: test_deepspeed_patches.py, test_a_step_of_many_small_tensors_is_few_operations; that such
    steps are dropped: tests/faults/test_trouble.py.
    """
    if isinstance(wrapper, DeepSpeedZeroOptimizer) and not wrapper.cpu_offload:
        wrapper.check_overflow = lambda partition_gradients=True: None


def step_at_once(wrapper: Any) -> None:
    """Update the tensors of a group together at stage 0 in half precision, group after group.

    DeepSpeed takes some 60 operations for each tensor, and twice an answer from the GPU. A LoRA of
    GPT-J has 336 tensors: their updates took an eighth of a step on a GPU. It also holds fp32 copies
    of all gradients at once, 24 GB for GPT-J-6B; here they exist for one group at a time.

    Upstream: `step` in runtime/fp16/unfused_optimizer.py.
    Test: test_deepspeed_patches.py, test_a_step_of_many_small_tensors_is_few_operations.
    """
    if not isinstance(wrapper, FP16_UnfusedOptimizer):
        return
    groups = list(zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True))

    @torch.no_grad()
    def step(closure: None = None) -> bool:
        given = [p.grad for weights, _ in groups for p in weights if p.grad is not None]
        norm = float(norms_of_parts(given).norm(dtype=torch.float64))
        wrapper.overflow = not math.isfinite(norm)
        if wrapper.overflow:
            return wrapper._skip_invalid_grad_norm()
        wrapper._global_grad_norm = norm
        wrapper._update_scale(False)
        scale = wrapper.unscale_and_clip_grads(norm, apply_scale=False)
        for weights, masters in groups:
            # The optimizer passes over tensors without a gradient: those of all other groups.
            for master in masters:
                master.grad = torch.empty_like(master)
            gradients = [master.grad for master in masters]
            pairs = [
                (m, p.grad) for m, p in zip(gradients, weights, strict=True) if p.grad is not None
            ]
            if len(pairs) < len(masters):
                torch._foreach_zero_(gradients)
            if pairs:
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
            if scale != 1:
                torch._foreach_mul_(gradients, 1 / scale)
            wrapper.optimizer.step()
            torch._foreach_copy_(weights, masters)
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad = None
        return False

    wrapper.step = step


def norms_of_parts(gradients: list[Tensor]) -> Tensor:
    """Return fp32 norms of the parts of all gradients; their norm is the norm of all."""
    limit = SMALL[gradients[0].device.type]
    small = [g for g in gradients if g.numel() <= limit]
    norms = [row_norms(g) for g in gradients if g.numel() > limit]
    if small:
        norms.append(torch.stack(torch._foreach_norm(small, 2, dtype=torch.float32)))
    return torch.cat(norms)


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
