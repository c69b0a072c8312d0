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
from dataclasses import asdict, dataclass
from typing import Any

from finetune.config import OptimName, Quantize
from finetune.planning.activations import activations, offloaded_bytes, power_of_two
from finetune.planning.job import Job, Option
from finetune.planning.states import States, adafactor_elements, model_states, uses_bf16_optimizer

MIB = 2**20
CUDA_CONTEXT_BYTES = 600 * MIB
"""Driver context, kernels and cuBLAS workspaces of one process, which no allocator counts."""
NCCL_BYTES = 400 * MIB
"""Channels of NCCL's communicators."""
GPU_SLACK = 0.03
"""Share of the tensors that the allocator's rounding and fragmentation add."""
CPU_RESTING_SLACK, CPU_PASSING_SLACK, CPU_STAGE2_PASSING_SLACK = 0.08, 0.45, -0.25
"""The same for glibc, of tensors that stay, and of tensors that come and go and fragment the heap.
At stage 2 less is needed than they add up to: buckets are not full while activations are. Fitted to
measured peaks, see docs/memory.md."""
GPU_PROCESS_BYTES = 2560 * MIB
"""Resident memory of a rank that uses CUDA: interpreter, torch, DeepSpeed and CUDA's libraries."""
CPU_PROCESS_BYTES = 580 * MIB
"""The same without CUDA."""
STAGE0_BUCKET_ELEMENTS = 500_000_000
"""Elements that stage 0 all-reduces at once (engine.py MEMORY_OPT_ALLREDUCE_SIZE)."""
LIVE_ELEMENTS = 1_000_000_000
"""Gathered elements that stage 3 holds at most (max_live_parameters, max_reuse_distance)."""
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
    """Peak of the tensors alone, as torch.cuda.max_memory_allocated counts it."""
    host_parts: dict[str, int]
    needs: dict[str, tuple[int, int]]
    """Bytes needed and bytes available of gpu, host, disk and nvme."""
    short: str
    """The first of them that does not suffice, or nothing."""

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["option"], values["needs"]
        return {"zero": self.option.zero, **self.option.places, **values}


def estimate(job: Job, option: Option) -> Estimate:
    """Return the estimate for one option; of ranks that differ, the largest counts."""
    # Beyond 64 ranks, one stands for all.
    differ = option.stage in (1, 2) and job.world_size <= 64
    ranks = range(job.world_size if differ else 1)
    states = max(
        (model_states(job, option, rank) for rank in ranks), key=lambda s: s.peak_gradients
    )
    acts, buffers = activations(job), buffer_bytes(job, option)

    # The largest moment of a step. With checkpointing the current block is recomputed, except for
    # its input; otherwise it is among the kept ones.
    stream = job.work.element_bytes * job.tokens * job.shape.n_embd
    rebuilt = acts.block - stream if job.work.rebuilds else 0
    loss = states.kept_gradients + acts.kept + acts.loss
    first_block = states.kept_gradients + acts.kept + rebuilt + acts.transient + acts.head_gradient
    last_block = states.peak_gradients + acts.block + acts.transient
    step = max(states.gradients, states.kept_gradients) + states.step_bytes
    evaluation = states.kept_gradients + acts.evaluation + (buffers if option.stage == 3 else 0)
    moment = max(buffers + max(loss, first_block, last_block), step, evaluation)
    peak = states.weights + states.optimizer + moment

    # Beside the tensors: the allocator's slack, and on a GPU the context and the communicators.
    resting = states.weights + states.optimizer + states.peak_gradients
    if job.on_gpu:
        fixed = int(GPU_SLACK * peak) + CUDA_CONTEXT_BYTES
        fixed += NCCL_BYTES if job.world_size > 1 else 0
    elif option.stage < 3:
        passing = CPU_STAGE2_PASSING_SLACK if option.stage == 2 else CPU_PASSING_SLACK
        fixed = int(CPU_RESTING_SLACK * resting + passing * (peak - resting))
    else:
        # The largest tensor fits no hole: gathered, and its gradient in fp32.
        fixed = (4 + job.work.element_bytes) * job.shape.vocab_size * job.shape.n_embd

    # States are counted in full; the other parts get what they add on top, as far as the peak goes.
    # A negative slack makes all of them smaller.
    room = peak + min(fixed, 0) - resting
    logits = min(acts.loss, room)
    used = max(acts.kept + acts.block + acts.transient, acts.evaluation)
    used = min(used, max(0, room - logits - buffers))
    sizes = (states.weights, states.peak_gradients, states.optimizer)
    sizes += (used, logits, room - logits - used + max(fixed, 0))

    host_parts = _host_parts(job, option, states, peak + fixed)
    host = sum(host_parts.values())
    nvme = job.ranks_per_node * states.nvme_bytes
    weights = 4 * job.shape.trainable(job.adapter) if job.weights_kept else 0
    disk = job.checkpoints_kept * checkpoint_bytes(job) + weights + export_bytes(job)
    needs = {
        "gpu": (peak + fixed if job.on_gpu else 0, job.machine.gpu_bytes),
        "host": (max(host, load_host_bytes(job, option)), job.machine.host_bytes),
        "disk": (disk, job.machine.disk_bytes),
        "nvme": (nvme, job.machine.nvme_bytes or 0),
    }
    short = next((place for place, (need, have) in needs.items() if need > have), "")
    return Estimate(
        option=option,
        gpu_bytes=peak + fixed,
        host_bytes=host,
        disk_bytes=disk + nvme,
        fits=not short,
        parts=dict(zip(PARTS, sizes, strict=True)),
        tensor_bytes=peak,
        host_parts=host_parts,
        needs=needs,
        short=short,
    )


def buffer_bytes(job: Job, option: Option) -> int:
    """Return the communication and gather buffers of one rank while gradients are computed.

    This includes the gradient in flight.
    """
    element, summed = job.work.element_bytes, job.work.accumulation_bytes
    trained, largest = sum(job.trained_numels), max(job.trained_numels)
    # A host allocates pages only for the written part of a bucket; a GPU allocates all of it.
    bucket = job.bucket_elements if job.on_gpu else min(job.bucket_elements, trained)
    # A quantised weight exists in full while it is multiplied with.
    whole = 0 if job.quantize is Quantize.none else element * job.shape.n_embd * job.shape.n_inner
    if option.stage == 0:
        reduced = element * min(trained, STAGE0_BUCKET_ELEMENTS) if job.world_size > 1 else 0
        return whole + reduced
    if option.stage == 3:
        reduced = bucket + 2 * min(bucket, trained) + 2 * largest
        if job.world_size == 1 and option.offload_params == "none":
            return whole + element * reduced  # the only rank's own copy is whole
        # Whole tensors are gathered around the current block. A block is kept if its backward comes
        # within the reuse distance of its forward.
        block = sum(job.stored_numel(*tensor) for tensor in job.shape.block_tensors())
        head = job.shape.vocab_size * job.shape.n_embd
        live = max(LIVE_ELEMENTS // 2, block + head) + job.bucket_elements
        return whole + element * (reduced + min(job.stored_total, live))
    if uses_bf16_optimizer(job, option):
        return whole + element * largest
    staged = (summed if option.stage == 1 else element) * bucket
    if job.on_gpu:  # communication overlaps the backward
        staged *= 2
    fp32_copy = 4 * largest if summed != element else 0
    return whole + staged + element * (largest + min(bucket, trained)) + fp32_copy


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
    if job.on_gpu:
        rank["rounding"] = rounding_bytes(states.pinned)
    else:
        rank["tensors"] = device_bytes
    if offloaded := offloaded_bytes(job):
        rank["activations"] = offloaded
    parts = {part: size * job.ranks_per_node for part, size in rank.items()}
    # A checkpoint brings the optimizer's states to the host; at stage 0 only one rank's.
    on_device = job.on_gpu and option.offload_optimizer == "none"
    savers = 1 if option.stage == 0 else job.ranks_per_node
    share = states.optimizer * savers
    if job.optimizer is OptimName.adamw8bit:  # it is written in fp32
        share = checkpoint_bytes(job) * savers // (1 if option.stage == 0 else job.world_size)
    parts["checkpoint"] = share if on_device else 0
    return parts


def process_bytes(job: Job) -> int:
    return GPU_PROCESS_BYTES if job.on_gpu else CPU_PROCESS_BYTES


def rounding_bytes(blocks: tuple[int, ...]) -> int:
    """Return what page-locked blocks cost beyond their size.

    torch rounds each up to a power of two, except above the size in
    PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:N.
    """
    variables = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = next(filter(None, map(os.environ.get, variables)), "")
    threshold = re.search(r"pinned_max_round_threshold_mb:(\d+)", settings)
    limit = int(threshold[1]) * MIB if threshold else float("inf")
    return sum(power_of_two(size) - size for size in blocks if size <= limit)


def checkpoint_bytes(job: Job) -> int:
    """Return the size of one checkpoint.

    It holds fp32 weights and moments of the trained parameters (checkpointing/checkpoints.py), and
    nothing of the frozen ones.
    """
    trained = job.shape.trainable(job.adapter)
    if job.optimizer is OptimName.adafactor:
        return 4 * (trained + adafactor_elements(job))
    return 12 * trained


def export_bytes(job: Job) -> int:
    """Return the size of the export.

    This is the whole model after a full fine-tune, otherwise the adapter alone.
    """
    return job.work.element_bytes * job.shape.trainable(job.adapter)


def load_host_bytes(job: Job, option: Option) -> int:
    """Return the host memory of one node until the engine exists.

    It covers what stays there, one tensor in fp32, and DeepSpeed's repacking: the trained weights
    that a rank collects on the host to lay them out contiguously. Stage 3 always does so
    (zero/utils.py `defragment`). Stages 1 and 2 do, with a second copy, if the GPU has no room for
    the weights twice (stage_1_and_2.py `flatten_on_accelerator`).
    """
    element, per_node = job.work.element_bytes, job.ranks_per_node
    on_device = job.on_gpu and option.offload_params == "none"
    kept = 0 if on_device else model_states(job, option).weights
    trained = element * job.shape.trainable(job.adapter)
    twice = element * job.stored_total + trained + CUDA_CONTEXT_BYTES
    repacking = 0
    if option.stage == 3:
        repacking = trained // job.world_size
    elif job.on_gpu and option.stage and twice > job.machine.gpu_bytes:
        repacking = 2 * trained
    readers = 1 if option.stage == 3 else per_node
    largest = 4 * job.shape.vocab_size * job.shape.n_embd
    return per_node * (process_bytes(job) + kept + repacking) + readers * largest
