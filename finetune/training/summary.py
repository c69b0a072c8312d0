"""Summary printed before a run's first step: a short table, with the batch as an equation."""

from __future__ import annotations

from pathlib import Path

from finetune.config import Config, Offload
from finetune.data.columns import Store
from finetune.data.packing import Rows, efficiency
from finetune.errors import gib
from finetune.gptj.attention import pick_attention
from finetune.gptj.load import DTYPES
from finetune.planning.job import accumulation
from finetune.reporting.terminal import summary_table
from finetune.sharding.deepspeed_config import Sharding


def print_summary(
    cfg: Config,
    run_dir: Path,
    world_size: int,
    device: str,
    sharding: Sharding,
    reason: str,
    steps: int,
    epochs: float,
    parameters: dict[str, int],
    optimizer_bytes: list[int],
    store: Store,
    rows: Rows,
) -> None:
    """Print every derived number of the run once, in a short table."""
    accumulated = accumulation(cfg, world_size)
    tokens = len(store.column("ids")) / len(rows) * cfg.train.global_batch
    share = 100 * parameters["trainable"] / parameters["total"]
    attention = pick_attention(cfg.model.attention.value, device, DTYPES[cfg.model.dtype.value])
    ranks = f"{world_size} rank" + ("s" if world_size > 1 else "")
    summary_table(
        f"finetune {cfg.name}",
        [
            ("run_dir", str(run_dir)),
            (
                "model",
                f"{cfg.model.path}  {parameters['total']:,} parameters, {cfg.model.dtype.value}, attention {attention}",
            ),
            ("trained", f"{parameters['trainable']:,} parameters ({share:.2f}%)"),
            (
                "data",
                f"{cfg.data.train}  {store.stats['documents']:,} records, {store.stats['tokens']:,} tokens, "
                f"{len(rows):,} rows, {100 * efficiency(rows, cfg.task.max_length):.1f}% filled",
            ),
            (
                "batch",
                f"{cfg.train.micro_batch} micro x {ranks} x {accumulated} accumulation = "
                f"{cfg.train.global_batch} rows, about {tokens:,.0f} tokens a step",
            ),
            ("length", f"{steps:,} steps = {epochs:.2f} epochs"),
            (
                "ZeRO",
                "; ".join([f"stage {sharding.stage}, {ranks}", *_offloads(sharding)])
                + f"  ({reason.rstrip('.')})",
            ),
            ("optimizer", f"Adam states of {_each(optimizer_bytes)}"),
        ],
    )


def _each(held: list[int]) -> str:
    """Format the bytes on every rank, as one figure if they are equal."""
    shown = [gib(value) for value in held]
    each = (
        f"{shown[0]} on each rank"
        if len(set(shown)) == 1
        else ", ".join(f"{v} on rank {i}" for i, v in enumerate(shown))
    )
    return each if len(held) == 1 else f"{each}, {gib(sum(held))} in all"


def _offloads(sharding: Sharding) -> list[str]:
    places = (("optimizer", sharding.offload_optimizer), ("weights", sharding.offload_params))
    return [f"{what} on {where.value}" for what, where in places if where is not Offload.none]
