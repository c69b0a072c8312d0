"""Does this run fit this machine, and how is it divided over the ranks?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune import metrics_log, nvme
from finetune.checkpoint_files import folder_bytes, step_folders
from finetune.config import Config, Offload
from finetune.dist import World
from finetune.ds_config import Sharding
from finetune.errors import UserError
from finetune.gptj.load import local_folder
from finetune.plan import Plan, measure_machine, plan, render_table
from finetune.shape import ModelShape, load_shape
from finetune.tasks import head_of


def plan_run(cfg: Config, world: World, run_dir: Path, num_labels: int | None) -> Plan:
    """What fits and what is chosen, written to plan.json.

    Args:
        num_labels: of a classifier, where the data have told; else 2 are assumed.

    Raises:
        UserError: nothing fits; the table says what is missing, and what to change.
    """
    shape = _shape(cfg, num_labels)
    machine = measure_machine(cfg.machine, world.size, str(run_dir), cfg.zero.nvme_path)
    if cfg.machine.disk_gib is None:
        # What a resumed run already keeps there is part of what it needs.
        held = sum(folder_bytes(step) for step in step_folders(run_dir / "checkpoints"))
        machine = replace(machine, disk_bytes=machine.disk_bytes + held)
    planned = plan(cfg, machine, shape, world.size)
    metrics_log.write_json(run_dir / "plan.json", planned.to_json())
    if not planned.fits and cfg.zero.stage == "auto":
        raise UserError("this run does not fit this machine\n" + render_table(planned))
    return planned


def step_flops(cfg: Config, num_labels: int | None) -> Callable[[float, float], tuple[float, float]]:
    """(tokens, sum of squared document lengths) -> FLOPs of a training step on them, and those that
    activation checkpointing does again."""
    shape = _shape(cfg, num_labels)
    rebuilds = cfg.train.activation_checkpointing in (True, "offload")

    def flops(tokens: float, pairs: float) -> tuple[float, float]:
        each = shape.flops_per_token(round(pairs / max(tokens, 1)), cfg.adapter, rebuilds)
        return tokens * each.model, tokens * each.recompute

    return flops


def sharding_of(planned: Plan, cfg: Config, run_dir: Path) -> Sharding:
    """The chosen option in the words of `ds_config.build`."""
    chosen = planned.chosen.option
    return Sharding(int(chosen.zero.removeprefix("stage")), Offload(chosen.offload_optimizer),
                    Offload(chosen.offload_params), nvme.run_folder(cfg.zero.nvme_path, run_dir), _shape(cfg, None).largest())


def _shape(cfg: Config, num_labels: int | None) -> ModelShape:
    return load_shape(str(local_folder(cfg.model)), head_of(cfg.task), num_labels or 2)
