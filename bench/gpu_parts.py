"""The parts of `gpu.py`, one process each: python bench/gpu_parts.py PART SETTING.json OUT.json

A part is a generator of (case, figures); the file OUT is written again after each case. A case that
fails, out of memory for one, yields {"error": ...} and the next one is tried.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload import dense_documents, free_port, launch

SETTING = json.loads(Path(sys.argv[2]).read_text())
DRY, WORK = SETTING["dry"], Path(SETTING["work"])
CUDA = torch.cuda.is_available() and not DRY
DEVICE = torch.device("cuda" if CUDA else "cpu")
MODEL_NAME = "gptj_tiny" if DRY else "gptj_6b"
MODEL = WORK / "model"
LENGTH, WIDTH, INNER, HEADS, LAYERS = (64, 64, 768, 4, 8) if DRY else (2048, 4096, 16384, 16, 28)
TOKENS_PER_STEP = 2 * LENGTH if DRY else 131_072
RANK, TARGETS = 16, ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
KINDS = {"nothing recomputed": False, "selective": "selective", "whole blocks": True}
SHARD_BYTES = 4 * 2**30
Cases = Iterator[tuple[str, dict]]


def attempt(name: str, work: Callable[[], dict]) -> tuple[str, dict]:
    """The case with what `work` returns, or with its message if it fails."""
    try:
        return name, work()
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        return name, {"error": text[-1500:]}
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def milliseconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Median time of `work`, after one call that is not counted."""
    times = []
    for _ in range(repeat + 1):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# Parts that need no model


def nccl() -> Cases:
    """One rank: the start of NCCL (gloo on a CPU) and an all-reduce of 1 GiB."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    size = 2**16 if DRY else 2**29
    started = time.perf_counter()
    torch.distributed.init_process_group("nccl" if CUDA else "gloo")
    value = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    torch.distributed.all_reduce(value)
    synchronize()
    first = time.perf_counter() - started
    elapsed = milliseconds(partial(torch.distributed.all_reduce, value))
    assert bool((value == 1).all())
    yield (
        f"all-reduce of {2 * size / 2**20:g} MiB",
        {"init_seconds": first, "all_reduce_ms": elapsed},
    )
    torch.distributed.destroy_process_group()


def products() -> Cases:
    """All matrix products of the blocks, forward and the gradient of the input, and no others."""
    weights = [
        torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        for rows, columns in [*[(WIDTH, WIDTH)] * 4, (INNER, WIDTH), (WIDTH, INNER)]
    ]

    def work(tokens: int) -> dict:
        inputs = {
            size: torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16)
            for size in (WIDTH, INNER)
        }

        def one_block() -> None:
            for weight in weights:
                inputs[weight.shape[1]] @ weight.t()
                inputs[weight.shape[0]] @ weight

        seconds = LAYERS * milliseconds(one_block) / 1000
        flops = 4 * tokens * LAYERS * sum(weight.numel() for weight in weights)
        return {"tokens_per_second": tokens / seconds, "tflops": flops / seconds / 1e12}

    for sequences in (1, 2) if DRY else (1, 4, 8):
        yield attempt(f"{sequences * LENGTH} tokens", partial(work, sequences * LENGTH))


def attention() -> Cases:
    """Kernels for sequences of equal length, with what `model.attention=auto` takes first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from finetune.gptj.attention import pack, packed_attention, pick_attention

    batch = 2 if DRY else 4
    shape = (batch * LENGTH, HEADS, WIDTH // HEADS)
    q, k, v = (
        torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    )
    upstream = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    boundaries = torch.arange(batch + 1, dtype=torch.int32) * LENGTH

    def ours(kind: str) -> dict:
        packed = pack(boundaries, kind, DEVICE)
        forward = partial(packed_attention, q, k, v, packed)
        return {
            "forward_ms": milliseconds(forward),
            "forward_backward_ms": milliseconds(lambda: forward().backward(upstream)),
        }

    def with_backend(backend: SDPBackend) -> dict:
        with sdpa_kernel(backend):
            return ours("sdpa")

    size = f"{batch} x {LENGTH}"
    auto = pick_attention("auto", DEVICE.type, torch.bfloat16)
    yield attempt(f"auto, {size}", lambda: ours(auto) | {"kernel": auto})
    if CUDA:
        yield attempt(f"varlen, {size}", partial(ours, "varlen"))
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            backend = getattr(SDPBackend, name)
            yield attempt(f"SDPA {name.lower()}, {size}", partial(with_backend, backend))
    yield attempt(f"eager, {size}", partial(ours, "eager"))


def loss() -> Cases:
    """Frozen head and cross-entropy, with the gradient of the hidden states."""
    from finetune.gptj.loss import chunked_cross_entropy

    weight = torch.randn(50400, WIDTH, device=DEVICE, dtype=torch.bfloat16).mul_(0.02)
    bias = torch.zeros(50400, device=DEVICE, dtype=torch.bfloat16)

    def whole(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")

    def liger(hidden: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, weight, labels, bias, reduction="sum")

    def work(function: Callable[[Tensor, Tensor], Tensor], tokens: int) -> dict:
        hidden = torch.randn(tokens, WIDTH, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(0, 50400, (tokens,), device=DEVICE)
        return {"forward_backward_ms": milliseconds(lambda: function(hidden, labels).backward())}

    functions = {
        "ours": lambda hidden, labels: chunked_cross_entropy(hidden, weight, bias, labels),
        "whole logits": whole,
        "Liger": liger,
    }
    for sequences in (1,) if DRY else (1, 4):
        for name, function in functions.items():
            if name != "Liger" or CUDA:
                tokens = sequences * LENGTH
                yield attempt(f"{name}, {tokens} tokens", partial(work, function, tokens))


def model() -> Cases:
    """Draw the checkpoint of random weights in bf16, in Hugging Face's layout."""
    from finetune.assets.paths import asset
    from finetune.data.tokenizer import load_tokenizer
    from finetune.export.safetensors_writer import ShardWriter
    from finetune.planning.shape import load_shape

    started = time.perf_counter()
    part = WORK / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    shutil.copy(asset(MODEL_NAME) / "config.json", part)
    load_tokenizer(None).save_pretrained(part)
    shapes = dict(load_shape(str(asset(MODEL_NAME)), "lm", 2).tensors())
    writer = ShardWriter(part, shapes, torch.bfloat16, SHARD_BYTES)
    torch.manual_seed(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = torch.full(shape, float("ln_" in name and name.endswith("weight")))
        else:
            value = torch.randn(shape, device=DEVICE).mul_(0.02)
        writer.add(name, value.bfloat16().cpu())
    writer.close()
    part.rename(MODEL)
    yield MODEL_NAME, {"seconds": time.perf_counter() - started}


# The real command


def our_run(name: str, words: list[str]) -> dict:
    """Train by the real command in a fresh process; speed, peaks, and the plan's prediction."""
    from plan_accuracy import compare

    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    data = dense_documents(WORK / "data.jsonl", 8 * TOKENS_PER_STEP)
    command = [
        "recipe=clm_pile",
        f"model.path={MODEL}",
        f"data.train={data}",
        "data.eval=null",
        f"data.cache_dir={WORK / 'cache'}",
        f"task.max_length={LENGTH}",
        "train.eval_every=0",
        "optim.schedule=constant",
        "optim.warmup=0",
        "checkpoint.every=0",
        "checkpoint.final=weights",
        f"run_dir={folder}",
        *words,
    ]
    wall = launch(1, "launch/train.py", command, WORK / f"{name}.train.log")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "train"]
    result, plan = (json.loads((folder / f).read_text()) for f in ("result.json", "plan.json"))
    peaks = compare(plan, result)
    shutil.rmtree(folder)
    steady = steps[1:]  # the first step reads the data's first blocks and sets up the optimizer
    return {
        "wall_seconds": wall,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steady),
        "mfu": statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None,
        "peak_gpu_bytes": result["peak_gpu_bytes"],
        "peak_host_bytes": result["peak_host_bytes"],
        "predicted_bytes": peaks["predicted"],
        "planned_peak_bytes": peaks["measured"],
    }


def batch_words(micro: int, batch: int, kind: bool | str) -> list[str]:
    return [
        f"train.micro_batch={micro}",
        f"train.global_batch={batch}",
        f"train.activation_checkpointing={str(kind).lower()}",
    ]


LORA_WORDS = [
    "adapter=lora",
    f"adapter.rank={RANK}",
    f"adapter.alpha={RANK}",
    "adapter.targets=all-linear",
    "zero=stage0",
]


def main() -> Cases:
    micro = 1 if DRY else 4
    words = [*LORA_WORDS, *batch_words(micro, micro, False), "train.steps=6", "export.enabled=true"]
    yield attempt(f"LoRA, micro {micro}, with export", partial(our_run, "main", words))


def full() -> Cases:
    micro, batch = (1, 2) if DRY else (8, TOKENS_PER_STEP // LENGTH)
    words = ["adapter=full", "zero=stage1", "zero.offload_optimizer=cpu", "export.enabled=false"]
    words += [*batch_words(micro, batch, True), "train.steps=3"]
    yield attempt(f"stage 1, micro {micro}, whole blocks", partial(our_run, "full", words))


def small() -> Cases:
    """The real command in 8 and 4 bits."""
    micro, batch = (1, 2) if DRY else (4, 4)
    for kind in ("int8", "nf4"):
        words = [*LORA_WORDS, f"model.quantize={kind}", *batch_words(micro, batch, False)]
        words += ["train.steps=4", "export.enabled=false"]
        yield attempt(f"LoRA on {kind}, micro {micro}", partial(our_run, kind, words))
    micro, batch = (1, 2) if DRY else (8, 64)
    words = ["adapter=full", "optim.name=adamw8bit", "zero=stage2", "export.enabled=false"]
    words += [*batch_words(micro, batch, True), "train.steps=3"]
    yield attempt(f"full, adamw8bit, micro {micro}", partial(our_run, "adamw8bit", words))


# LoRA in one process


def lora_words(micro: int, kind: bool | str) -> list[str]:
    return [
        "recipe=clm_pile",
        f"model.path={MODEL}",
        f"task.max_length={LENGTH}",
        *LORA_WORDS,
        *batch_words(micro, micro, kind),
    ]


def predicted_bytes(micro: int, kind: bool | str) -> int:
    """The planner's peak of what torch reserves, as `plan_accuracy.py` takes it."""
    from plan_accuracy import compare

    from finetune.compose import compose_train
    from finetune.planning.choose import plan
    from finetune.planning.machine import measure_machine
    from finetune.planning.shape import load_shape

    cfg = compose_train(lora_words(micro, kind))
    found = plan(cfg, measure_machine(cfg.machine, 1), load_shape(str(MODEL), "lm", 2), 1)
    return compare(found.to_json(), {"peak_gpu_bytes": 0, "peak_host_bytes": 0})["predicted"]


WORLD: dict = {}
"""The connection of this process, made once for all its engines."""


def lora_engine(stage: int = 0):
    """GPT-J with LoRA in a DeepSpeed engine; any batch can be put through it."""
    from finetune import dist
    from finetune.compose import compose_train
    from finetune.sharding import deepspeed_config
    from finetune.sharding.deepspeed_config import Sharding
    from finetune.sharding.engine import Engine, build_module, connect_deepspeed

    cfg = compose_train(lora_words(1, False))
    world = WORLD.get("world") or dist.connect()
    if not WORLD:
        connect_deepspeed(world)
        WORLD["world"] = world
    config = deepspeed_config.build(cfg, Sharding(stage), 1, CUDA)
    engine = Engine(
        build_module(cfg, "lm", None, str(MODEL), config, world), config, cfg.optim, world
    )
    engine.train()
    return engine


def body_of(engine) -> nn.Module:
    from finetune.gptj.model import Transformer

    return next(module for module in engine.module.modules() if isinstance(module, Transformer))


def time_steps(engine, micro: int, kind: bool | str = False) -> dict:
    """Speed and peak of steps of `micro` sequences, two of them not counted."""
    body = body_of(engine)
    body.checkpointing = kind
    for block in body.h:
        block.mlp.keep_activated = kind != "selective"
    ids = torch.randint(0, 50000, (1, micro * LENGTH), device=DEVICE)
    inputs = {
        "input_ids": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.arange(LENGTH, device=DEVICE).repeat(micro)[None],
        "cu_seqlens": torch.arange(micro + 1, dtype=torch.int32) * LENGTH,
    }
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2 + (2 if DRY else 6)):
            clock = time.perf_counter()
            value = engine(**inputs)
            synchronize()
            forward = time.perf_counter()
            engine.backward(value, 1 / ids.numel())
            synchronize()
            backward = time.perf_counter()
            engine.step(1e-4)
            synchronize()
            end = time.perf_counter()
            for name, seconds in zip(
                parts, (forward - clock, backward - forward, end - backward), strict=True
            ):
                parts[name].append(1000 * seconds)
    except torch.OutOfMemoryError:
        engine.module.zero_grad()
        raise
    whole = [sum(step) for step in zip(*parts.values(), strict=True)]
    figures = {f"{name}_ms": statistics.median(times[2:]) for name, times in parts.items()}
    figures["tokens_per_second"] = 1000 * ids.numel() / statistics.median(whole[2:])
    if CUDA:
        figures["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
    return figures


def lora() -> Cases:
    cases = [(1, "nothing recomputed"), (4, "nothing recomputed"), (8, "nothing recomputed")]
    cases += [(8, "selective"), (8, "whole blocks"), (16, "whole blocks")]
    if DRY:
        cases = [(1, kind) for kind in KINDS]
    plans = {}
    for micro, kind in cases:  # before the model takes memory that the planner would miss
        _, plans[micro, kind] = attempt(
            "", lambda m=micro, k=kind: {"predicted_bytes": predicted_bytes(m, KINDS[k])}
        )
    engine = lora_engine()
    for micro, kind in cases:
        name, figures = attempt(
            f"micro {micro}, {kind}", partial(time_steps, engine, micro, KINDS[kind])
        )
        prediction = plans[micro, kind]
        figures["predicted_bytes"] = prediction.get("predicted_bytes")
        if "error" in prediction:
            figures["plan_error"] = prediction["error"]
        if "peak_gpu_bytes" in figures:
            figures["planned_peak_bytes"] = figures["peak_gpu_bytes"]
        yield name, figures


# Each thing that makes a step fast, switched off


@contextmanager
def peft_forward(engine) -> Iterator[None]:
    from finetune.gptj.lora import fuse

    for module in engine.module.modules():
        for name in ("forward", "project"):
            if getattr(vars(module).get(name), "func", None) is not None:
                del vars(module)[name]
    yield
    fuse(engine.module)


@contextmanager
def attention_kind(kind: str, engine) -> Iterator[None]:
    with patch.object(body_of(engine), "attention", kind):
        yield


@contextmanager
def whole_logits(engine) -> Iterator[None]:
    from finetune.gptj.loss import LMHead

    def forward(head: LMHead, hidden: Tensor, labels: Tensor, per_token: bool = False) -> Tensor:
        logits = F.linear(hidden, head.weight, head.bias).float()
        return F.cross_entropy(logits, labels, reduction="sum")

    with patch.object(LMHead, "forward", forward):
        yield


@contextmanager
def separate_gelu(engine) -> Iterator[None]:
    from transformers.activations import NewGELUActivation

    with ExitStack() as stack:
        for block in body_of(engine).h:
            stack.enter_context(patch.object(block.mlp, "act", NewGELUActivation()))
        yield


@contextmanager
def plain_kernels(engine) -> Iterator[None]:
    from finetune.gptj import kernels

    with patch.object(kernels, "triton_kernels", lambda x: None):
        yield


ABLATIONS = {
    "LoRA by peft's forward": peft_forward,
    "rotation, sums and softmax in plain PyTorch": plain_kernels,
    "attention by the variable-length kernel": partial(attention_kind, "flex"),
    "attention by SDPA": partial(attention_kind, "sdpa"),
    "eager attention": partial(attention_kind, "eager"),
    "whole logits": whole_logits,
    "gelu_new in separate operations": separate_gelu,
}


def time_without(switched_off, engine, micro: int) -> dict:
    with switched_off(engine):
        return time_steps(engine, micro)


def ablate() -> Cases:
    micro = 1 if DRY else 4
    engine = lora_engine()
    yield attempt(f"everything on, micro {micro}", partial(time_steps, engine, micro))
    for name, switched_off in ABLATIONS.items():
        yield attempt(name, partial(time_without, switched_off, engine, micro))
    # A second engine stands beside what DeepSpeed keeps of the first: only its speed counts.
    del engine
    gc.collect()
    name, figures = attempt("stage 1", lambda: time_steps(lora_engine(stage=1), micro))
    figures.pop("peak_gpu_bytes", None)
    yield name, figures


# Peers


def trainer() -> Cases:
    """The fastest settings that fit are tried: more sequences, then recomputing."""
    cases = [(1, False)] if DRY else [(2, False), (4, False), (8, True), (1, False)]
    for micro, checkpointing in cases:
        kind = "whole blocks" if checkpointing else "nothing recomputed"
        yield attempt(f"micro {micro}, {kind}", partial(trainer_run, micro, checkpointing))


def trainer_run(micro: int, checkpointing: bool) -> dict:
    place, steps = WORK / "peer", 6
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rows = [[(7 * i + j) % 50000 for j in range(LENGTH)] for i in range(micro * (steps + 1))]
    (place / "rows.jsonl").write_text(
        "\n".join(json.dumps({"input_ids": row, "labels": row}) for row in rows)
    )
    adapter = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": TARGETS}
    spec = {
        "peer": "trainer",
        "model": str(MODEL),
        "rows": str(place / "rows.jsonl"),
        "out": str(place / "out"),
        "steps": steps,
        "micro": micro,
        "stage": 0,
        "length": LENGTH,
        "checkpointing": checkpointing,
        "lora": adapter,
    }
    (place / "spec.json").write_text(json.dumps(spec))
    launch(1, "bench/peer_trainer.py", [str(place / "spec.json")], WORK / "trainer.peer.log")
    result = json.loads((place / "out.0.json").read_text())
    return {
        "tokens_per_second": micro * LENGTH / statistics.median(result["seconds"][2:]),
        "peak_gpu_bytes": result.get("peak_gpu_bytes"),
        "peak_host_bytes": result["peak_host_bytes"],
        "attention": result.get("attention"),
    }


def generate() -> Cases:
    """Greedy tokens per second; bf16 rounds differently, so the texts need not be equal."""
    prompt, new = (16, 8) if DRY else (256, 64)
    prompts = {
        batch: [[(97 * i + 7 * j) % 50000 for j in range(prompt)] for i in range(batch)]
        for batch in ((1, 2) if DRY else (1, 32))
    }
    texts: dict[tuple[str, int], list[list[int]]] = {}

    def work(name: str, continue_all: Callable[[list[list[int]]], list], batch: int) -> dict:
        def once() -> None:
            texts[name, batch] = continue_all(prompts[batch])

        seconds = milliseconds(once, repeat=2) / 1000
        figures = {"tokens_per_second": sum(map(len, texts[name, batch])) / seconds}
        if ("ours", batch) in texts and name != "ours":
            pairs = zip(texts["ours", batch], texts[name, batch], strict=True)
            equal = [a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False)]
            figures["share_equal_to_ours"] = statistics.mean(equal) if equal else None
        return figures

    compiled_generation = partial(our_generation, compiled=True)
    for name, opened in (
        ("ours", our_generation),
        ("ours, compiled", compiled_generation),
        ("transformers", their_generation),
    ):
        continue_all = opened(new)
        for batch in prompts:
            yield attempt(f"{name}, batch {batch}", partial(work, name, continue_all, batch))
        del continue_all
        gc.collect()


def our_generation(
    new: int, compiled: bool = False
) -> Callable[[list[list[int]]], list[list[int]]]:
    from finetune.config import Dtype
    from finetune.data.tokenizer import load_tokenizer
    from finetune.export.reopen import load_export
    from finetune.gptj.library import to_library_model
    from finetune.inference.sample import Sampling, continue_ids

    model = to_library_model(load_export(MODEL, Dtype.bf16, DEVICE).module)
    tokenizer, how = load_tokenizer(None), Sampling(new, temperature=0)
    return lambda prompts: continue_ids(model, tokenizer, prompts, how, DEVICE, compiled=compiled)


def their_generation(new: int) -> Callable[[list[list[int]]], list[list[int]]]:
    from transformers import GPTJForCausalLM

    model = GPTJForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(DEVICE).eval()

    def continue_all(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=DEVICE)
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=50256,
        )
        rows = rows[:, ids.shape[1] :].tolist()
        return [row[: row.index(50256)] if 50256 in row else row for row in rows]

    return continue_all


PARTS = (nccl, products, attention, loss, model, main, lora, ablate, trainer, full, generate, small)

if __name__ == "__main__":
    measured: dict[str, dict] = {}
    for case_name, case_figures in next(part for part in PARTS if part.__name__ == sys.argv[1])():
        measured[case_name] = case_figures
        Path(sys.argv[3]).write_text(json.dumps(measured))
    if measured and all("error" in case for case in measured.values()):
        sys.exit(f"no case of {sys.argv[1]} worked: {list(measured.values())[-1]['error']}")
