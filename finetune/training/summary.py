"""Words before a run's first step: notes, a table for people, and facts for its callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from finetune.config import Config, Dtype, plain_config
from finetune.data.mixture import training_text
from finetune.data.packing import efficiency
from finetune.dist import World
from finetune.errors import gib, plural
from finetune.gptj import adapters
from finetune.gptj.attention import pick_attention
from finetune.gptj.load import DTYPES
from finetune.planning.choose import Plan
from finetune.reporting.callbacks import RunInfo
from finetune.reporting.environment import environment
from finetune.reporting.terminal import summary_table
from finetune.sharding.engine import Engine
from finetune.training.inputs import Inputs
from finetune.training.mfu import SLOW_BF16, emulates_bf16
from finetune.training.schedule import Length, warmup_note


def notes_before_training(
    cfg: Config, plan: Plan, length: Length, device: torch.device
) -> Iterator[str]:
    """Yield what the user should know about speed and numerics before the first step."""
    if cfg.model.dtype is Dtype.bf16 and emulates_bf16(device):
        yield f"{SLOW_BF16}: add model.dtype=fp32"
    if note := warmup_note(cfg.optim, length.steps):
        yield note
    bf16_gradients = plan.chosen.option.stage == 0 and cfg.model.dtype is Dtype.bf16
    if bf16_gradients and plan.accumulation > 1:
        yield (
            "stage 0 adds up the gradients of micro-batches in bf16, which rounds each time; "
            "zero=stage1 adds them in fp32"
        )


def mixture_rows(inputs: Inputs) -> Iterator[tuple[str, str]]:
    """Yield a row of the summary for each source of a mixture, and one for rows that are held out."""
    epoch = sum(source.drawn for source in inputs.sources)
    for source in inputs.sources if len(inputs.sources) > 1 else ():
        yield (
            f"  {source.name}",
            f"{source.examples:,} examples, {source.tokens:,} tokens, {source.rows:,} rows; an "
            f"epoch draws {source.drawn:,} ({source.drawn / epoch:.1%})",
        )
    for part in inputs.eval.values():
        if part.store is inputs.train:
            kept = sum(source.examples for source in inputs.sources)
            yield "held out", f"{len(part.store) - kept:,} of {len(part.store):,} examples"


def run_info(
    cfg: Config,
    words: list[str],
    world: World,
    plan: Plan,
    length: Length,
    engine: Engine,
    inputs: Inputs,
    start_step: int,
) -> RunInfo:
    """Collect what is known about a run just before its first step, for its callbacks.

    Args:
        words: the k=v words of the command line.
    """
    return RunInfo(
        Path(str(cfg.run_dir)),
        cfg.name,
        length.steps,
        start_step=start_step,
        config=plain_config(cfg),
        parameters=adapters.count(engine.module),
        world_size=world.size,
        resumed=start_step > 0,
        plan=plan.to_json(),
        data=inputs.statistics(cfg.task.documents * cfg.task.max_length),
        extra=environment(world.size, world.device)
        | {"overrides": words, "ranks_per_node": world.local_size},
    )


def print_summary(
    cfg: Config,
    world: World,
    plan: Plan,
    length: Length,
    engine: Engine,
    optimizer_bytes: list[int],
    inputs: Inputs,
) -> None:
    """Print every derived number of the run once, in a short table.

    Args:
        optimizer_bytes: of every rank.
    """
    store, rows = inputs.train, inputs.rows
    parameters = adapters.count(engine.module)
    drawn = sum(source.drawn for source in inputs.sources)
    tokens = sum(s.drawn * s.tokens / s.rows for s in inputs.sources) / drawn
    tokens *= cfg.train.global_batch
    share = 100 * parameters["trainable"] / parameters["total"]
    attention = pick_attention(
        cfg.model.attention.value, world.device.type, DTYPES[cfg.model.dtype.value]
    )
    ranks = plural(world.size, "rank")

    option = plan.chosen.option
    zero = f"stage {option.stage}, {ranks}"
    for states, place in (
        ("optimizer", option.offload_optimizer),
        ("weights", option.offload_params),
    ):
        zero += f"; {states} on {place}" if place != "none" else ""
    optimizer = f"{gib(optimizer_bytes[0])} on each rank"
    if len(set(map(gib, optimizer_bytes))) > 1:
        optimizer = ", ".join(f"{gib(held)} on rank {i}" for i, held in enumerate(optimizer_bytes))
    if world.size > 1:
        optimizer += f", {gib(sum(optimizer_bytes))} in all"
    summary_table(
        f"finetune {cfg.name}",
        [
            ("run_dir", str(cfg.run_dir)),
            (
                "model",
                f"{cfg.model.path}  {parameters['total']:,} parameters, {cfg.model.dtype.value}, "
                f"attention {attention}",
            ),
            ("trained", f"{parameters['trainable']:,} parameters ({share:.2f}%)"),
            (
                "data",
                f"{training_text(cfg.data)}  {store.stats['documents']:,} records, "
                f"{sum(source.tokens for source in inputs.sources):,} tokens, {len(rows):,} rows, "
                f"{100 * efficiency(rows, cfg.task.max_length):.1f}% filled",
            ),
            *mixture_rows(inputs),
            (
                "batch",
                f"{plan.micro_batch} micro x {ranks} x {plan.accumulation} accumulation = "
                f"{cfg.train.global_batch} rows, about {tokens:,.0f} tokens a step",
            ),
            ("length", f"{length.steps:,} steps = {length.epochs:.2f} epochs"),
            ("ZeRO", f"{zero}  ({plan.reason.rstrip('.')})"),
            ("optimizer", f"{cfg.optim.name.value} states of {optimizer}"),
        ],
    )
