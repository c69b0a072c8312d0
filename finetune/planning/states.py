"""Exact bytes of model states (weights, gradients, optimizer) that DeepSpeed allocates.

Flow: `model_states(job, option)` -> `States`, derived from DeepSpeed 0.19's sources:
  stage 0        fp16/unfused_optimizer.py, or the plain torch optimizer in fp32
  stage 1        bf16_optimizer.py when bf16 gradients are summed in fp32, else zero/stage_1_and_2.py
  stage 2        zero/stage_1_and_2.py
  stage 3        zero/stage3.py and zero/partition_parameters.py: see `sharded_states`
tests/planning/test_planning_states.py compares every number with the tensors of a real engine.
Activations and buffers are only estimated, in activations.py and estimate.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from finetune.planning.job import Job, Option, padded

ALIGNMENT = 2
"""Stages 1 and 2 pad each flat group to this times the ranks (nccl_start_alignment_factor)."""
STEP_BYTES = 4
"""AdamW keeps the step count as one fp32 scalar per tensor that it updates."""


@dataclass(frozen=True)
class States:
    """Bytes of one rank: first on the device, then those that offload moves to host or nvme."""

    weights: int
    """Low precision weights, trained and frozen."""
    gradients: int
    """Gradients at the end of the last backward before the step."""
    optimizer: int
    """fp32 master weights, both moments and step counters."""
    kept_gradients: int = 0
    """What lives on between the micro-steps of a step."""
    peak_gradients: int = 0
    """Gradients at their fullest: while the last backward reduces them."""
    step_bytes: int = 0
    """What the step adds while it converts gradients to fp32."""
    host_weights: int = 0
    host_gradients: int = 0
    host_optimizer: int = 0
    nvme_bytes: int = 0
    pinned: tuple[int, ...] = ()
    """Sizes of the page-locked blocks among the host bytes; torch may round each of them up."""


def model_states(job: Job, option: Option, rank: int = 0) -> States:
    """Return the states of one rank.

    They depend on `rank` only at stages 1 and 2 without fp32 sums.
    """
    if option.stage == 0:
        return _replicated(job)
    if option.stage == 3:
        return sharded_states(job, option)
    return (
        _bf16_stage1(job) if uses_bf16_optimizer(job, option) else _partitioned(job, option, rank)
    )


def uses_bf16_optimizer(job: Job, option: Option) -> bool:
    """Tell whether DeepSpeed picks its BF16 optimizer.

    Conditions of `_do_optimizer_sanity_check` in engine.py: stage 1, bf16 weights, fp32 sums, no
    offload.
    """
    sums_in_fp32 = job.work.dtype == "bf16" and job.work.accumulation > 1
    return option.stage == 1 and sums_in_fp32 and option.offload_optimizer == "none"


def _replicated(job: Job) -> States:
    """Return the states at stage 0.

    In fp32 the optimizer works on the weights themselves; otherwise on fp32 copies, tensor by
    tensor. Gradients are summed in the weights' own precision: DeepSpeed refuses fp32 sums at stage
    0 with bf16 or fp16.
    """
    element = job.work.element_bytes
    groups = job.trainable_groups
    trained, tensors = sum(map(sum, groups)), sum(map(len, groups))
    master = 0 if element == 4 else 4
    return States(
        weights=element * (trained + sum(job.frozen_numels)),
        gradients=element * trained,
        optimizer=(master + 8) * trained + STEP_BYTES * tensors,
        kept_gradients=element * trained if job.work.accumulation > 1 else 0,
        peak_gradients=element * trained,
        step_bytes=0 if element == 4 else 4 * trained,
    )


def _flat(job: Job) -> list[int]:
    """Return the elements of each group's flat buffer at stages 1 and 2, padding included."""
    return [padded(sum(group), ALIGNMENT * job.world_size) for group in job.trainable_groups]


def _largest_group(job: Job) -> int:
    """Return the elements of this rank's largest partition.

    Groups are updated one after another, and each flattens its gradients, then converts them to
    fp32.
    """
    return max(_flat(job), default=0) // job.world_size


def _flat_optimizer(job: Job) -> int:
    """Return the bytes of master weights and moments of this rank's partition of every group."""
    return sum(12 * flat // job.world_size + STEP_BYTES for flat in _flat(job))


def _flat_weights(job: Job) -> int:
    return job.work.element_bytes * (sum(_flat(job)) + sum(job.frozen_numels))


def _bf16_stage1(job: Job) -> States:
    """Return the states at stage 1 with fp32 sums.

    Every rank holds a flat fp32 gradient of all parameters, which is never freed.
    """
    # The low precision gradients are zeroed, not freed, after each addition.
    gradients = 4 * sum(_flat(job)) + job.work.element_bytes * sum(map(sum, job.trainable_groups))
    return States(
        _flat_weights(job),
        gradients,
        _flat_optimizer(job),
        kept_gradients=gradients,
        peak_gradients=gradients,
    )


def _partitioned(job: Job, option: Option, rank: int) -> States:
    """Return the states of stage_1_and_2.py, with or without the optimizer on the host."""
    element = job.work.element_bytes
    partition = sum(_flat(job)) // job.world_size
    sums_in_fp32 = job.work.accumulation_bytes != element
    touched, padding = _touched(job, rank)
    owned = 4 * partition if sums_in_fp32 else element * (touched + padding)
    kept = _kept(job, option, owned if sums_in_fp32 else element * touched)
    step = 0 if sums_in_fp32 else _largest_group(job) * (element + (4 if element == 2 else 0))
    optimizer, weights = _flat_optimizer(job), _flat_weights(job)
    if option.offload_optimizer == "none":
        # Stage 2 sums fp32 into one buffer; otherwise new gradients are allocated beside the kept
        # ones.
        waiting = 0 if option.stage == 2 and sums_in_fp32 else kept
        return States(
            weights, owned, optimizer, kept, owned + max(waiting, _unreduced(job, option)), step
        )
    # The host holds masters and moments, an fp32 gradient, a low precision copy to be sent back to
    # the device, and a staging buffer as large as the largest tensor, which the device mirrors.
    staging = element * job.largest_trainable()
    owned = owned if sums_in_fp32 else 0
    kept = kept if sums_in_fp32 or option.stage == 1 else 0
    waiting = 0 if option.stage == 2 else max(kept, _unreduced(job, option))
    return States(
        weights,
        owned,
        staging,
        kept,
        owned + waiting,
        host_weights=element * partition,
        host_gradients=4 * partition,
        host_optimizer=optimizer + staging,
        pinned=(
            *(
                size
                for flat in _flat(job)
                for size in _pinned_blocks(flat // job.world_size, element)
            ),
            staging,
        ),
    )


def _pinned_blocks(partition: int, element: int) -> tuple[int, int, int]:
    """Return the sizes of one group's page-locked blocks.

    These are master weights, fp32 gradient and low precision copy. The moments are in ordinary
    memory.
    """
    return 4 * partition, 4 * partition, element * partition


def _kept(job: Job, option: Option, owned: int) -> int:
    """Return the bytes of gradients kept for the next micro-step.

    These are all gradients at stage 1, and this rank's share at stage 2.
    """
    if job.work.accumulation == 1:
        return 0
    everything = job.work.accumulation_bytes * sum(map(sum, job.trainable_groups))
    return everything if option.stage == 1 else owned


def _unreduced(job: Job, option: Option) -> int:
    """Return the bytes of gradients that wait for their reduction in a step of one micro-step.

    Stage 2 frees them as they are computed. Stage 1 reduces them all after the backward, or with
    overlapped communication (GPUs) as they are computed, but then keeps those that are larger than
    the bucket and owned by another rank.
    """
    if option.stage == 2 or job.work.accumulation > 1:
        return 0
    numels = [numel for group in job.trainable_groups for numel in group]
    if not job.on_gpu:
        return job.work.element_bytes * sum(numels)
    large = sum(numel for numel in numels if numel > job.bucket_elements)
    return job.work.element_bytes * large * (job.world_size - 1) // job.world_size


def _touched(job: Job, rank: int) -> tuple[int, int]:
    """Return the elements of tensors that overlap this rank's partitions, and the step's padding.

    `copy_grads_in_partition` allocates every such tensor at its full size, even if a neighbour owns
    a part.
    """
    touched = padding = 0
    for group, flat in zip(job.trainable_groups, _flat(job), strict=True):
        size = flat // job.world_size
        start, end, position = rank * size, (rank + 1) * size, 0
        for numel in group:
            if position < end and position + numel > start:
                touched += numel
            position += numel
        padding += max(0, end - max(start, position))
    return touched, padding


# Model states at stage 3: every tensor is cut into one part per rank, padded one by one.
#
# Exact as above, and derived from zero/stage3.py and zero/partition_parameters.py. Only the numbers
# for nvme are estimates, because that data passes through buffers on the host.
PERSISTENCE_ELEMENTS = 100_000
"""Stage 3 keeps smaller tensors whole on every rank (DeepSpeed's stage3_param_persistence_threshold)."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""Stage 3 updates at most this many elements at once (DeepSpeed's sub_group_size)."""
NVME_BUFFERS = 4
"""Sub-group sized fp32 buffers between host and nvme: weights, gradients and two moments (DeepSpeed's buffer_count)."""

PARAM_BUFFERS = 5
"""Buffers for weights between host and nvme, each with room for a rank's part of the largest (buffer_count)."""


def sharded_states(job: Job, option: Option) -> States:
    """Return the states at stage 3: every tensor is cut into one part per rank and padded."""
    ranks, element, accumulation = (
        job.world_size,
        job.work.element_bytes,
        job.work.accumulation_bytes,
    )
    shards = [[ceil(numel / ranks) for numel in group] for group in job.trainable_groups]
    owned = sum(map(sum, shards))
    weights = element * (owned + sum(ceil(numel / ranks) for numel in job.frozen_numels))
    sub_groups = [size for group in shards for size in _sub_groups(group)]
    largest = max(sub_groups, default=0)
    optimizer, gradients = 12 * owned + STEP_BYTES * len(sub_groups), accumulation * owned
    step = (accumulation + (0 if accumulation == 4 else 4)) * largest
    states = States(weights + _persistent(job), gradients, optimizer, gradients, gradients, step)
    numels = [*job.frozen_numels, *(numel for group in job.trainable_groups for numel in group)]
    # All parts of the largest sub-group pass through one more buffer after the update.
    buffers = (PARAM_BUFFERS * element * ceil(max(numels) / ranks), element * largest)
    return _offload(states, option, weights, buffers, owned, sub_groups)


def _offload(
    states: States,
    option: Option,
    weights: int,
    buffers: tuple[int, ...],
    owned: int,
    sub_groups: list[int],
) -> States:
    """Move the states that the option offloads to the host or to nvme."""
    if option.offload_params != "none":
        states = _move_weights(states, option.offload_params, weights, buffers)
    return (
        states
        if option.offload_optimizer == "none"
        else _move_optimizer(states, option, owned, sub_groups)
    )


def _move_weights(states: States, place: str, weights: int, buffers: tuple[int, ...]) -> States:
    """Move the weights' parts off the device; tensors that stay gathered remain there."""
    kept = states.weights - weights
    if place == "cpu":
        return replace(states, weights=kept, host_weights=weights, pinned=(*states.pinned, weights))
    return replace(
        states,
        weights=kept,
        nvme_bytes=weights,
        host_weights=sum(buffers),
        pinned=(*states.pinned, *buffers),
    )


def _move_optimizer(states: States, option: Option, owned: int, sub_groups: list[int]) -> States:
    """Move the states of the update off the device.

    These are the sums of gradients, their fp32 copies, master weights and moments.
    """
    device_free = replace(
        states, gradients=0, optimizer=0, kept_gradients=0, peak_gradients=0, step_bytes=0
    )
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
    """Return the sizes of the sub-groups: tensors are collected until the limit is reached.

    The same as `_create_fp16_sub_groups` in stage3.py.
    """
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
    """Return the bytes of small tensors, which stay gathered after the first step.

    A single rank gathers nothing.
    """
    if job.world_size == 1:
        return 0
    numels = [numel for group in job.trainable_groups for numel in group] + job.frozen_numels
    return job.work.element_bytes * sum(
        padded(n, job.world_size) for n in numels if n <= PERSISTENCE_ELEMENTS
    )
