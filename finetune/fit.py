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
from finetune.errors import RunFailed
from finetune.gptj.load import local_folder
from finetune.plan import Plan, measure_machine, plan, render_table
from finetune.shape import load_shape
from finetune.tasks.base import Task


def plan_run(cfg: Config, world: World, run_dir: Path, task: Task) -> Plan:
    """What fits and what is chosen, written to plan.json.

    Raises:
        RunFailed: nothing fits; the table says what is missing.
    """
    shape = load_shape(str(local_folder(cfg.model)), task.head, task.num_labels or 2)
    machine = measure_machine(cfg.machine, world.size, str(run_dir), cfg.zero.nvme_path)
    if cfg.machine.disk_gib is None:
        # What a resumed run already keeps there is part of what it needs.
        held = sum(folder_bytes(step) for step in step_folders(run_dir / "checkpoints"))
        machine = replace(machine, disk_bytes=machine.disk_bytes + held)
    planned = plan(cfg, machine, shape, world.size)
    metrics_log.write_json(run_dir / "plan.json", planned.to_json())
    if not planned.fits and cfg.zero.stage == "auto":
        raise RunFailed("this run does not fit this machine\n" + render_table(planned))
    return planned


def step_flops(cfg: Config, task: Task) -> Callable[[float, float], float]:
    """(tokens, sum of squared document lengths) -> model FLOPs of a training step on them."""
    shape = load_shape(str(local_folder(cfg.model)), task.head, task.num_labels or 2)
    return lambda tokens, pairs: tokens * shape.flops_per_token(round(pairs / max(tokens, 1)), cfg.adapter).model


def sharding_of(planned: Plan, cfg: Config, task: Task, run_dir: Path) -> Sharding:
    """The chosen option in the words of `ds_config.build`."""
    chosen = planned.chosen.option
    shape = load_shape(str(local_folder(cfg.model)), task.head, task.num_labels or 2)
    return Sharding(int(chosen.zero.removeprefix("stage")), Offload(chosen.offload_optimizer),
                    Offload(chosen.offload_params), nvme.run_folder(cfg.zero.nvme_path, run_dir), shape.largest())
