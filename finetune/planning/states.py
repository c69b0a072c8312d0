"""Exact bytes of model states (weights, gradients, optimizer) that DeepSpeed allocates.

Flow: `model_states(job, option)` -> `States`, derived from DeepSpeed 0.19's sources:
  stage 0        fp16/unfused_optimizer.py, or the plain torch optimizer in fp32
  stage 1        bf16_optimizer.py if bf16 gradients are summed in fp32, else zero/stage_1_and_2.py
  stage 2        zero/stage_1_and_2.py
  stage 3        zero/stage3.py and zero/partition_parameters.py
tests/planning/test_planning_states.py compares every number with the tensors of a real engine.
Activations and buffers are only estimated, in activations.py and estimate.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from finetune.config import OptimName
from finetune.planning.job import Job, Option, padded

ALIGNMENT = 2
"""Stages 1 and 2 pad each flat group to this times the ranks (nccl_start_alignment_factor)."""
STEP_BYTES = 4
"""AdamW keeps the step count as one fp32 scalar per tensor that it updates."""
BITS8_BLOCK, BITS8_TABLES, BITS8_LEAST = 256, 2048, 4096
"""AdamW in 8 bits: values that share an fp32 scale, bytes of the tables of codes, and the size below
which bitsandbytes keeps a tensor's moments in fp32 (min_8bit_size)."""
PERSISTENCE_ELEMENTS = 100_000
"""Stage 3 keeps smaller tensors whole on every rank (stage3_param_persistence_threshold)."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""Stage 3 updates at most this many elements at once (DeepSpeed's sub_group_size)."""
NVME_BUFFERS = 4
"""Sub-group sized fp32 buffers between host and nvme: weights, gradients and two moments
(DeepSpeed's buffer_count)."""
PARAM_BUFFERS = 5
"""Buffers for weights between host and nvme, each with room for a rank's part of the largest
(buffer_count)."""


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
    """Gradients kept between the micro-steps of a step."""
    peak_gradients: int = 0
    """Gradients at their fullest: while the last backward reduces them."""
    step_bytes: int = 0
    """Memory that the step adds while it converts gradients to fp32."""
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
    return _sharded(job, option) if option.stage == 3 else _partitioned(job, option, rank)


def moment_bytes(job: Job, numels: list[int]) -> int:
    """Return the bytes of AdamW's moments and step counters for tensors of `numels` elements."""
    if job.optimizer is not OptimName.adamw8bit:
        return sum(8 * numel + STEP_BYTES for numel in numels)
    large = [numel for numel in numels if numel >= BITS8_LEAST]
    coded = sum(2 * numel + 8 * ceil(numel / BITS8_BLOCK) for numel in large)
    return coded + (BITS8_TABLES if large else 0) + 8 * (sum(numels) - sum(large))


def adafactor_elements(job: Job) -> int:
    """Return the elements of Adafactor's means: a matrix has one per row and one per column."""
    return sum(sum(shape) for _, shape in job.shape.trainable_tensors(job.adapter))


def update_bytes(job: Job, numels: list[int]) -> int:
    """Return the fp32 copies that an update makes of its largest tensor, beyond its states."""
    if job.optimizer is OptimName.adafactor:
        return 8 * max(numels, default=0)
    on_host = job.optimizer is OptimName.adamw8bit and not job.on_gpu  # on GPUs it is one kernel
    return 16 * max(numels, default=0) if on_host else 0


def uses_bf16_optimizer(job: Job, option: Option) -> bool:
    """Tell whether DeepSpeed picks its BF16 optimizer.

    Conditions of `_do_optimizer_sanity_check` in engine.py: stage 1, bf16 weights, fp32 sums, no
    offload.
    """
    sums_in_fp32 = job.work.dtype == "bf16" and job.work.accumulation > 1
    return option.stage == 1 and sums_in_fp32 and option.offload_optimizer == "none"


def _replicated(job: Job) -> States:
    """Return the states at stage 0.

    In fp32 the optimizer works on the weights themselves; otherwise on fp32 copies, with fp32
    gradients for one group at a time. Gradients are summed in the weights' own precision: DeepSpeed
    refuses fp32 sums at stage 0 with bf16 or fp16.
    """
    element, trained = job.work.element_bytes, sum(job.trained_numels)
    copies = 0 if element == 4 else 4
    moments = moment_bytes(job, job.trained_numels)
    if job.optimizer is OptimName.adafactor:
        moments = 4 * adafactor_elements(job) + STEP_BYTES * len(job.trained_numels)
    return States(
        weights=element * (trained + sum(job.frozen_numels)),
        gradients=element * trained,
        optimizer=copies * trained + moments,
        kept_gradients=element * trained if job.work.accumulation > 1 else 0,
        peak_gradients=element * trained,
        step_bytes=copies * max(map(sum, job.trainable_groups), default=0)
        + update_bytes(job, job.trained_numels),
    )


def _partitioned(job: Job, option: Option, rank: int) -> States:
    """Return the states at stages 1 and 2, with the optimizer on the device or on the host.

    Each parameter group is one flat, padded buffer. A rank has masters and moments of its partition
    of each.
    """
    element, ranks = job.work.element_bytes, job.world_size
    flat = [padded(sum(group), ALIGNMENT * ranks) for group in job.trainable_groups]
    parts = [elements // ranks for elements in flat]
    weights = element * (sum(flat) + sum(job.frozen_numels))
    optimizer = 4 * sum(parts) + moment_bytes(job, parts)
    if uses_bf16_optimizer(job, option):
        # Every rank holds a flat fp32 gradient of all parameters, which is never freed. The low
        # precision gradients are zeroed, not freed, after each addition.
        gradients = 4 * sum(flat) + element * sum(job.trained_numels)
        return States(weights, gradients, optimizer, gradients, gradients)

    owned, kept, unreduced = _partition_gradients(job, option, flat, rank)
    sums_in_fp32 = job.work.accumulation_bytes != element
    if option.offload_optimizer == "none":
        # Stage 2 sums fp32 into one buffer; otherwise new gradients are allocated beside the kept
        # ones. Groups are updated one after another: each flattens its gradients, then converts
        # them to fp32.
        waiting = 0 if option.stage == 2 and sums_in_fp32 else kept
        copies = 0 if sums_in_fp32 else element + (4 if element == 2 else 0)
        return States(
            weights=weights,
            gradients=owned,
            optimizer=optimizer,
            kept_gradients=kept,
            peak_gradients=owned + max(waiting, unreduced),
            step_bytes=copies * max(parts, default=0) + update_bytes(job, parts),
        )
    # The host holds masters and moments, an fp32 gradient, a low precision copy to be sent back to
    # the device, and a staging buffer as large as the largest tensor, which the device mirrors. All
    # but the moments are page-locked.
    staging = element * max(job.trained_numels, default=0)
    owned = owned if sums_in_fp32 else 0
    kept = kept if sums_in_fp32 or option.stage == 1 else 0
    waiting = 0 if option.stage == 2 else max(kept, unreduced)
    return States(
        weights=weights,
        gradients=owned,
        optimizer=staging,
        kept_gradients=kept,
        peak_gradients=owned + waiting,
        host_weights=element * sum(parts),
        host_gradients=4 * sum(parts),
        host_optimizer=optimizer + staging,
        pinned=(*(part * size for part in parts for size in (4, 4, element)), staging),
    )


def _partition_gradients(
    job: Job, option: Option, flat: list[int], rank: int
) -> tuple[int, int, int]:
    """Return the bytes of a rank's own gradients, of those kept, and of those not yet reduced.

    Args:
        flat: elements of each group's padded buffer.
    """
    element, summed, ranks = job.work.element_bytes, job.work.accumulation_bytes, job.world_size
    several, everything = job.work.accumulation > 1, sum(job.trained_numels)

    # `copy_grads_in_partition` allocates every tensor that reaches into this rank's partitions at
    # its full size, even if a neighbour owns a part; the step pads each partition to its end.
    touched = padding = 0
    for group, elements in zip(job.trainable_groups, flat, strict=True):
        start, end, position = rank * elements // ranks, (rank + 1) * elements // ranks, 0
        for numel in group:
            if position < end and position + numel > start:
                touched += numel
            position += numel
        padding += max(0, end - max(start, position))
    owned = element * (touched + padding) if summed == element else 4 * (sum(flat) // ranks)

    # Gradients kept for the next micro-step: all at stage 1, this rank's share at stage 2.
    kept = 0
    if several and option.stage == 1:
        kept = summed * everything
    elif several:
        kept = element * touched if summed == element else owned

    # Gradients that wait for their reduction in a step of one micro-step. Stage 2 frees them as
    # they are computed. Stage 1 reduces them all after the backward, or with overlapped
    # communication (GPUs) as they are computed, but then keeps those that are larger than the
    # bucket and owned by another rank.
    unreduced = 0
    if option.stage == 1 and not several:
        unreduced = element * everything
        if job.on_gpu:
            large = sum(numel for numel in job.trained_numels if numel > job.bucket_elements)
            unreduced = element * large * (ranks - 1) // ranks
    return owned, kept, unreduced


def _sharded(job: Job, option: Option) -> States:
    """Return the states at stage 3: every tensor is cut into one part per rank and padded.

    Exact, except that with nvme the data passes through buffers on the host, which are estimates.
    """
    element, summed, ranks = job.work.element_bytes, job.work.accumulation_bytes, job.world_size
    groups = [[ceil(numel / ranks) for numel in group] for group in job.trainable_groups]
    owned = sum(map(sum, groups))
    parts = element * (owned + sum(ceil(numel / ranks) for numel in job.frozen_numels))
    sub_groups = [size for group in groups for size in _sub_groups(group)]
    largest, gradients = max(sub_groups, default=0), summed * owned

    # Small tensors stay gathered after the first step; a single rank gathers nothing.
    numels = [*job.trained_numels, *job.frozen_numels]
    small = [padded(numel, ranks) for numel in numels if numel <= PERSISTENCE_ELEMENTS]
    persistent = element * sum(small) if ranks > 1 else 0

    states = States(
        weights=parts + persistent,
        gradients=gradients,
        optimizer=4 * owned + moment_bytes(job, sub_groups),
        kept_gradients=gradients,
        peak_gradients=gradients,
        step_bytes=(summed + (0 if summed == 4 else 4)) * largest + update_bytes(job, sub_groups),
    )
    if option.offload_params == "cpu":
        states = replace(states, weights=persistent, host_weights=parts, pinned=(parts,))
    elif option.offload_params == "nvme":
        # All parts of the largest sub-group pass through one more buffer after the update.
        buffers = (PARAM_BUFFERS * element * ceil(max(numels) / ranks), element * largest)
        states = replace(
            states,
            weights=persistent,
            nvme_bytes=parts,
            host_weights=sum(buffers),
            pinned=buffers,
        )
    if option.offload_optimizer == "none":
        return states

    # The states of the update leave the device: sums of gradients, their fp32 copies, master
    # weights and moments.
    if option.offload_optimizer == "cpu":
        blocks = (gradients, *(4 * size for size in sub_groups))
        host_gradients, host_optimizer, nvme = gradients + 4 * owned, states.optimizer, 0
    else:
        buffers = NVME_BUFFERS * (4 * largest,)
        blocks, host_gradients, host_optimizer = (gradients, *buffers), gradients, sum(buffers)
        nvme = states.optimizer + 4 * owned
    return replace(
        states,
        gradients=0,
        optimizer=0,
        kept_gradients=0,
        peak_gradients=0,
        step_bytes=0,
        host_gradients=host_gradients,
        host_optimizer=host_optimizer,
        nvme_bytes=states.nvme_bytes + nvme,
        pinned=(*states.pinned, *blocks),
    )


def _sub_groups(parts: list[int]) -> list[int]:
    """Return the sizes of the sub-groups: tensors are collected until the limit is reached.

    The same as `_create_fp16_sub_groups` in stage3.py.
    """
    if sum(parts) <= SUB_GROUP_ELEMENTS:
        return [sum(parts)]
    groups, current = [], 0
    for index, size in enumerate(parts):
        current += size
        if current >= SUB_GROUP_ELEMENTS or index == len(parts) - 1:
            groups.append(current)
            current = 0
    return groups
