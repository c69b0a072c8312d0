"""Predicted activations and loss workspace against the allocations of our own GPT-J, one forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plan_cases import CPU, TINY, config, write_model
from torch.profiler import ProfilerActivity, profile, record_function

from finetune.config import AdapterConfig, FullConfig, LoraConfig
from finetune.gptj import adapters
from finetune.gptj.load import build_model
from finetune.planning.activations import activations
from finetune.planning.choose import build_job
from finetune.planning.job import Job
from finetune.planning.shape import ModelShape

SHAPE = {
    **TINY,
    "n_embd": 128,
    "n_head": 2,
    "n_inner": 512,
    "n_layer": 3,
    "vocab_size": 1501,
    "n_positions": 1024,
}
CASES = [
    (FullConfig(), "bf16", False), (FullConfig(), "fp32", False), (FullConfig(), "bf16", True),
    (LoraConfig(), "bf16", False), (LoraConfig(), "fp32", True), (LoraConfig(targets="all-linear"), "bf16", False),
    (FullConfig(), "bf16", "selective"), (LoraConfig(targets="all-linear"), "fp32", "selective"),
    (LoraConfig(), "bf16", "selective"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Each thread of the attention kernel has a scratch buffer, half a MiB: much beside a model this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(job: Job, lengths: list[int], path: Path) -> tuple[int, int, int]:
    """(kept at the start of the backward, peak of the forward, peak of the backward), gradients of weights excluded."""
    write_model(path, SHAPE)
    cfg = config(job.adapter, path=str(path), dtype=job.work.dtype)
    model = build_model(
        cfg.model, "lm", device=torch.device("cpu"), seed=0, checkpointing=job.work.checkpointing
    )
    model = adapters.attach(model, job.adapter, "lm", str(path), 0).train()
    ids = torch.randint(0, SHAPE["vocab_size"], (1, sum(lengths)))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(input_ids=ids, position_ids=positions, labels=ids.roll(-1), cu_seqlens=bounds)
        with record_function("backward begins"):
            loss.backward()
    return _peaks(profiler)


def _peaks(profiler: profile) -> tuple[int, int, int]:
    """Running sum of the allocator's events, before and after the mark."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    mark = next(event.start_ns() for event in events if event.name() == "backward begins")
    memory = [event for event in events if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in memory)  # type: ignore[attr-defined]
    alive, forward, backward, kept = 0, 0, 0, 0
    for when, size in changes:
        alive += size
        if when < mark:
            forward, kept = max(forward, alive), alive
        else:
            backward = max(backward, alive)
    return kept, forward, backward


@pytest.mark.parametrize("kind, dtype, checkpointing", CASES)
def test_activations_equal_the_allocations(
    kind: AdapterConfig, dtype: str, checkpointing: bool | str, tmp_path: Path
) -> None:
    job = predicted_job(kind, dtype, checkpointing, packing=False)
    acts = activations(job)
    kept, forward, backward = measured(job, [512, 512], tmp_path)
    # The logits, by then their gradient, and the hidden states wait for the head's backward.
    head = job.work.element_bytes * job.tokens * (1501 + 128) if job.full else 0
    assert kept - head == pytest.approx(acts.kept, rel=0.02, abs=40_000)
    stream = job.work.element_bytes * job.tokens * 128
    rebuilt = acts.block - stream if job.work.rebuilds else 0
    blocks = acts.kept + rebuilt + acts.transient + acts.head_gradient
    gradients = job.work.element_bytes * sum(job.trainable_groups[0]) if job.full else 0
    peak, predicted = max(forward, backward), max(acts.kept + acts.loss, blocks)
    slack = max(0.05 * predicted, gradients // 2)
    assert predicted - slack <= peak <= predicted + slack + packed_bytes(job.work.dtype)


def packed_bytes(dtype: str) -> int:
    """What torch's attention kernel packs aside on this CPU: with AVX-512 copies of keys and values, else next to nothing."""
    q = torch.randn(2, 2, 512, 64, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("backward begins"):
            pass
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    return _peaks(profiler)[2] - out.numel() * out.element_size()


def test_documents_of_different_lengths_cost_one_tensor_more(tmp_path: Path) -> None:
    job = predicted_job(FullConfig(), "bf16", False, packing=True)
    kept, _, _ = measured(job, [700, 324], tmp_path)
    head = job.work.element_bytes * job.tokens * (1501 + 128)
    assert kept - head == pytest.approx(activations(job).kept, rel=0.03)


def predicted_job(kind: AdapterConfig, dtype: str, checkpointing: bool | str, packing: bool) -> Job:
    cfg = config(kind, dtype=dtype, length=1024, checkpointing=checkpointing)
    cfg.train.packing = packing
    return build_job(cfg, CPU, ModelShape.from_config(SHAPE), 1)
