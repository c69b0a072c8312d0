"""Model states at stage 3: every tensor is cut into one part per rank, padded one by one.

Exact like states.py, and read off zero/stage3.py and zero/partition_parameters.py; only what goes to nvme is an
estimate, because it passes through buffers on the host.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from finetune.plan.job import Job, Option, padded
from finetune.plan.states import STEP_BYTES, States

PERSISTENCE_ELEMENTS = 100_000
"""Stage 3 keeps smaller tensors whole on every rank (DeepSpeed's stage3_param_persistence_threshold)."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""Stage 3 updates at most this many elements at once (DeepSpeed's sub_group_size)."""
NVME_BUFFERS = 4
"""Sub-group sized fp32 buffers between host and nvme: weights, gradients and two moments (DeepSpeed's buffer_count)."""

PARAM_BUFFERS = 5
"""Buffers for weights between host and nvme, each with room for a rank's part of the largest (buffer_count)."""


def sharded_states(job: Job, option: Option) -> States:
    """Stage 3: every tensor is cut into `ranks` parts of equal size, padded one by one."""
    ranks, element, accumulation = job.world_size, job.work.element_bytes, job.work.accumulation_bytes
    shards = [[ceil(numel / ranks) for numel in group] for group in job.trainable_groups]
    owned = sum(map(sum, shards))
    weights = element * (owned + sum(ceil(numel / ranks) for numel in job.frozen_numels))
    sub_groups = [size for group in shards for size in _sub_groups(group)]
    largest = max(sub_groups, default=0)
    optimizer, gradients = 12 * owned + STEP_BYTES * len(sub_groups), accumulation * owned
    step = (accumulation + (0 if accumulation == 4 else 4)) * largest
    states = States(weights + _persistent(job), gradients, optimizer, gradients, gradients, step)
    numels = [*job.frozen_numels, *(numel for group in job.trainable_groups for numel in group)]
    # All parts of the largest sub-group pass through one more buffer on their way back from the update.
    buffers = (PARAM_BUFFERS * element * ceil(max(numels) / ranks), element * largest)
    return _offload(states, option, weights, buffers, owned, sub_groups)


def _offload(states: States, option: Option, weights: int, buffers: tuple[int, ...], owned: int,
             sub_groups: list[int]) -> States:
    """Move what the option names to the host or to nvme."""
    if option.offload_params != "none":
        states = _move_weights(states, option.offload_params, weights, buffers)
    return states if option.offload_optimizer == "none" else _move_optimizer(states, option, owned, sub_groups)


def _move_weights(states: States, place: str, weights: int, buffers: tuple[int, ...]) -> States:
    """The parts leave the device, tensors that stay gathered do not."""
    kept = states.weights - weights
    if place == "cpu":
        return replace(states, weights=kept, host_weights=weights, pinned=(*states.pinned, weights))
    return replace(states, weights=kept, nvme_bytes=weights, host_weights=sum(buffers), pinned=(*states.pinned, *buffers))


def _move_optimizer(states: States, option: Option, owned: int, sub_groups: list[int]) -> States:
    """Everything of the update leaves the device: sums of gradients, their fp32 copies, masters and moments."""
    device_free = replace(states, gradients=0, optimizer=0, kept_gradients=0, peak_gradients=0, step_bytes=0)
    if option.offload_optimizer == "cpu":
        blocks = (states.gradients, *(4 * size for size in sub_groups))
        return replace(
            device_free,
            host_gradients=states.gradients + 4 * owned,
            host_optimizer=states.optimizer,
            pinned=(*states.pinned, *blocks),
        )
    buffers = NVME_BUFFERS * (4 * max(sub_groups, default=0),)
    return replace(
        device_free,
        host_gradients=states.gradients,
        host_optimizer=sum(buffers),
        nvme_bytes=states.nvme_bytes + states.optimizer + 4 * owned,
        pinned=(*states.pinned, states.gradients, *buffers),
    )


def _sub_groups(shards: list[int]) -> list[int]:
    """stage3.py `_create_fp16_sub_groups`: tensors are collected until the limit is reached."""
    if sum(shards) <= SUB_GROUP_ELEMENTS:
        return [sum(shards)]
    groups, current = [], 0
    for index, size in enumerate(shards):
        current += size
        if current >= SUB_GROUP_ELEMENTS or index == len(shards) - 1:
            groups.append(current)
            current = 0
    return groups


def _persistent(job: Job) -> int:
    """Small tensors stay gathered after the first step; a single rank gathers nothing."""
    if job.world_size == 1:
        return 0
    numels = [numel for group in job.trainable_groups for numel in group] + job.frozen_numels
    return job.work.element_bytes * sum(padded(n, job.world_size) for n in numels if n <= PERSISTENCE_ELEMENTS)
