"""Estimate the bytes of one option, from exact states and estimated activations and buffers.

Flow: `estimate(job, option)` adds up the moments of a step and takes the largest:
    loss          states + kept gradients + all activations + workspace of the loss
    first block   states + kept gradients + all activations + a block's backward
    last block    states + gradients at their fullest + one block's activations and backward
    step          states + gradients + fp32 copies of them
    evaluation    states + kept gradients + a forward without gradients
The parts add up to `gpu_bytes`. Weights, gradients and optimizer states are always counted in full;
activations count as what they add on top of gradients that did not exist yet.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from finetune.planning.activations import Activations, activations, offloaded_bytes, power_of_two
from finetune.planning.job import Job, Option
from finetune.planning.states import States, model_states, uses_bf16_optimizer

MIB = 2**20
CUDA_CONTEXT_BYTES = 600 * MIB
"""Driver context, kernels and cuBLAS workspaces of one process; no tensor, so no allocator counts it."""
NCCL_BYTES = 400 * MIB
"""Channels of NCCL's communicators."""
GPU_SLACK = 0.03
"""Share of the tensors that blocks cut too large or out of order cost on top."""
CPU_RESTING_SLACK, CPU_PASSING_SLACK, CPU_STAGE2_PASSING_SLACK = 0.05, 0.35, -0.25
"""The same for glibc: of what stays, and of what comes and goes and leaves holes. At stage 2 that is less than it adds
up to: buckets are not full while activations are. Fitted to measured peaks, see docs/memory.md."""
GPU_PROCESS_BYTES = 2560 * MIB
"""Resident memory of a rank that uses CUDA: interpreter, torch, DeepSpeed and CUDA's libraries."""
CPU_PROCESS_BYTES = 650 * MIB
"""The same without CUDA."""
STAGE0_BUCKET_ELEMENTS = 500_000_000
"""Elements that stage 0 all-reduces at once (engine.py MEMORY_OPT_ALLREDUCE_SIZE)."""
LIVE_ELEMENTS = 1_000_000_000
"""Stage 3 holds at most this many gathered elements (DeepSpeed's max_live_parameters and max_reuse_distance)."""
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Estimate:
    """The estimate for one option; GPU bytes are of one rank, host and disk bytes of one node."""

    option: Option
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    fits: bool
    parts: dict[str, int]
    tensor_bytes: int
    """Peak of the tensors alone: what torch.cuda.max_memory_allocated counts."""
    host_parts: dict[str, int] = field(default_factory=dict)
    short: str = ""
    """What is missing, if anything: gpu, host, disk or nvme."""

    def to_json(self) -> dict[str, Any]:
        return {
            "zero": self.option.zero,
            "offload_optimizer": self.option.offload_optimizer,
            "offload_params": self.option.offload_params,
            "gpu_bytes": self.gpu_bytes,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "fits": self.fits,
            "parts": self.parts,
            "host_parts": self.host_parts,
            "tensor_bytes": self.tensor_bytes,
            "short": self.short,
        }


def estimate(job: Job, option: Option) -> Estimate:
    states = max(
        (model_states(job, option, rank) for rank in _ranks(job, option)),
        key=lambda s: s.peak_gradients,
    )
    acts, buffers = activations(job), buffer_bytes(job, option)
    peak = _peak(job, option, states, acts, buffers)
    fixed = _fixed_bytes(job, option, states, peak)
    host_parts = _host_parts(job, option, states, peak + fixed)
    nvme = job.ranks_per_node * states.nvme_bytes
    disk = job.checkpoints_kept * checkpoint_bytes(job) + export_bytes(job)
    host = max(sum(host_parts.values()), load_host_bytes(job, option))
    short = _short(job, peak + fixed, host, disk, nvme)
    return Estimate(
        option,
        peak + fixed,
        sum(host_parts.values()),
        disk + nvme,
        not short,
        _parts(states, acts, buffers, peak, fixed),
        peak,
        host_parts,
        short,
    )


def _ranks(job: Job, option: Option) -> range:
    """Return the ranks whose states differ; beyond 64 ranks, one stands for all."""
    return range(job.world_size if option.stage in (1, 2) and job.world_size <= 64 else 1)


def _peak(job: Job, option: Option, states: States, acts: Activations, buffers: int) -> int:
    """Return the largest of the moments of a step, in tensor bytes."""
    # With checkpointing the current block is recomputed, except for its input; otherwise it is
    # among the kept ones.
    stream = job.work.element_bytes * job.tokens * job.shape.n_embd
    rebuilt = acts.block - stream if job.work.rebuilds else 0
    loss = states.kept_gradients + acts.kept + acts.loss
    first_block = states.kept_gradients + acts.kept + rebuilt + acts.transient + acts.head_gradient
    last_block = states.peak_gradients + acts.block + acts.transient
    step = max(states.gradients, states.kept_gradients) + states.step_bytes
    evaluation = states.kept_gradients + acts.evaluation + (buffers if option.stage == 3 else 0)
    return (
        states.weights
        + states.optimizer
        + max(buffers + max(loss, first_block, last_block), step, evaluation)
    )


def _parts(
    states: States, acts: Activations, buffers: int, peak: int, fixed: int
) -> dict[str, int]:
    """Split the peak into parts.

    Weights, gradients and optimizer states are counted in full; the others get what they add on
    top.
    """
    whole = {
        "weights": states.weights,
        "gradients": states.peak_gradients,
        "optimizer": states.optimizer,
    }
    room = peak - sum(whole.values())
    logits = min(acts.loss, room)
    kept = min(
        max(acts.kept + acts.block + acts.transient, acts.evaluation),
        max(0, room - logits - buffers),
    )
    return {
        **whole,
        "activations": kept,
        "logits": logits,
        "workspace": room - logits - kept + fixed,
    }


def buffer_bytes(job: Job, option: Option) -> int:
    """Return the communication and gather buffers of one rank while gradients are computed.

    This includes the gradient in flight.
    """
    element, overlap = job.work.element_bytes, job.on_gpu
    numels = [numel for group in job.trainable_groups for numel in group]
    trained, largest = sum(numels), max(numels)
    # A host allocates pages only for the written part of a bucket; a GPU allocates all of it.
    bucket = job.bucket_elements if job.on_gpu else min(job.bucket_elements, trained)
    if option.stage == 0:
        return element * min(trained, STAGE0_BUCKET_ELEMENTS) if job.world_size > 1 else 0
    if option.stage == 3:
        return element * (bucket + 2 * min(bucket, trained) + 2 * largest) + gathered_bytes(
            job, option
        )
    if uses_bf16_optimizer(job, option):
        return element * largest
    staged = job.work.accumulation_bytes if option.stage == 1 else element
    fp32_copy = 4 * largest if job.work.accumulation_bytes != element else 0
    return (
        staged * bucket * (2 if overlap else 1)
        + element * (largest + min(bucket, trained))
        + fp32_copy
    )


def gathered_bytes(job: Job, option: Option) -> int:
    """Return the bytes of whole tensors that stage 3 gathers around the current block.

    One rank uses its own copy unless the weights are offloaded.
    """
    if job.world_size == 1 and option.offload_params == "none":
        return 0
    total = job.shape.total(job.adapter)
    reused = (
        LIVE_ELEMENTS // 2
    )  # a block is kept if its backward comes within the reuse distance of its forward
    live = (
        max(reused, job.shape.layer_parameters() + job.shape.vocab_size * job.shape.n_embd)
        + job.bucket_elements
    )
    return job.work.element_bytes * min(total, live)


def _fixed_bytes(job: Job, option: Option, states: States, peak: int) -> int:
    """Return memory beside the tensors.

    This is the allocator's slack, and on a GPU the context and the communicators.
    """
    if job.on_gpu:
        return (
            int(GPU_SLACK * peak) + CUDA_CONTEXT_BYTES + (NCCL_BYTES if job.world_size > 1 else 0)
        )
    if option.stage < 3:
        resting = states.weights + states.optimizer + states.peak_gradients
        passing = CPU_STAGE2_PASSING_SLACK if option.stage == 2 else CPU_PASSING_SLACK
        return int(CPU_RESTING_SLACK * resting + passing * (peak - resting))
    # The largest tensor is allocated in sizes that fit no hole: gathered, and its gradient in fp32.
    return (4 + job.work.element_bytes) * job.shape.vocab_size * job.shape.n_embd


# ---------------------------------------------------------------------- host and disk


def _host_parts(job: Job, option: Option, states: States, device_bytes: int) -> dict[str, int]:
    """Return the parts of the host memory of one node.

    Without GPUs the ranks' tensors are in it too, and nothing is page-locked.
    """
    rank = {
        "processes": process_bytes(job),
        "weights": states.host_weights,
        "gradients": states.host_gradients,
        "optimizer": states.host_optimizer,
    }
    rank |= {"rounding": rounding_bytes(states.pinned)} if job.on_gpu else {"tensors": device_bytes}
    offloaded = offloaded_bytes(job)
    rank |= {"activations": offloaded} if offloaded else {}
    parts = {part: size * job.ranks_per_node for part, size in rank.items()}
    return {**parts, "checkpoint": _saving_bytes(job, option, states)}


def _saving_bytes(job: Job, option: Option, states: States) -> int:
    """Return the bytes of optimizer states that a checkpoint brings to the host to write them.

    At stage 0 only one rank does so.
    """
    if not job.on_gpu or option.offload_optimizer != "none":
        return 0
    return states.optimizer * (1 if option.stage == 0 else job.ranks_per_node)


def process_bytes(job: Job) -> int:
    return GPU_PROCESS_BYTES if job.on_gpu else CPU_PROCESS_BYTES


def rounding_bytes(blocks: tuple[int, ...]) -> int:
    """Return what page-locked blocks cost beyond their size.

    torch rounds each up to a power of two, except above the size in
    PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:N.
    """
    limit = _round_limit()
    return sum(power_of_two(size) - size for size in blocks if size <= limit)


def _round_limit() -> float:
    settings = (
        os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    )
    found = re.search(r"pinned_max_round_threshold_mb:(\d+)", settings)
    return int(found[1]) * MIB if found else float("inf")


def checkpoint_bytes(job: Job) -> int:
    """Return the size of one checkpoint.

    It holds fp32 weights and two moments of the trained parameters (checkpointing/checkpoints.py),
    and nothing of the frozen ones.
    """
    return 12 * job.shape.trainable(job.adapter)


def export_bytes(job: Job) -> int:
    """Return the size of the export.

    This is the whole model after a full fine-tune, otherwise the adapter alone.
    """
    return job.work.element_bytes * job.shape.trainable(job.adapter)


def load_host_bytes(job: Job, option: Option) -> int:
    """Return the host memory of one node until the engine exists.

    It covers what stays there, one tensor in fp32, and DeepSpeed's repacking.
    """
    kept = (
        0 if job.on_gpu and option.offload_params == "none" else model_states(job, option).weights
    )
    readers = 1 if option.stage == 3 else job.ranks_per_node
    largest = 4 * job.shape.vocab_size * job.shape.n_embd
    return (
        job.ranks_per_node * (process_bytes(job) + kept + _repacking_bytes(job, option))
        + readers * largest
    )


def _repacking_bytes(job: Job, option: Option) -> int:
    """Return the trained weights that one rank collects on the host to lay them out contiguously.

    Stage 3 always does so (zero/utils.py `defragment`). Stages 1 and 2 do, with a second copy, if
    the GPU has no room for the weights twice (stage_1_and_2.py `flatten_on_accelerator`).
    """
    trained = job.work.element_bytes * job.shape.trainable(job.adapter)
    if option.stage == 3:
        return trained // job.world_size
    twice = job.work.element_bytes * job.shape.total(job.adapter) + trained + CUDA_CONTEXT_BYTES
    return 2 * trained if job.on_gpu and option.stage and twice > job.machine.gpu_bytes else 0


def _short(job: Job, gpu: int, host: int, disk: int, nvme: int) -> str:
    """Return the first resource that does not suffice, or an empty string."""
    machine = job.machine
    if job.on_gpu and gpu > machine.gpu_bytes:
        return "gpu"
    if host > machine.host_bytes:
        return "host"
    if disk > machine.disk_bytes:
        return "disk"
    return "nvme" if nvme > (machine.nvme_bytes or 0) else ""
