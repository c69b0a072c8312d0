"""Plan how a run is sharded over its ranks, and check that it fits this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune.checkpointing.format import folder_bytes, step_folders
from finetune.config import Config, Offload
from finetune.dist import World
from finetune.errors import UserError
from finetune.files import write_json
from finetune.gptj.load import local_folder
from finetune.planning.choose import Plan, plan
from finetune.planning.machine import measure_machine
from finetune.planning.shape import load_shape
from finetune.planning.show import render_table
from finetune.sharding import nvme
from finetune.sharding.deepspeed_config import Sharding


def plan_run(cfg: Config, world: World, run_dir: Path, num_labels: int | None = None) -> Plan:
    """Choose the sharding of a run and write the plan to plan.json.

    Args:
        num_labels: of a classifier, if known from the data; otherwise 2 are assumed.

    Raises:
        UserError: nothing fits; the table says what is missing, and what to change.
    """
    shape = load_shape(str(local_folder(cfg.model)), cfg.task.head, num_labels or 2)
    machine = measure_machine(cfg.machine, world.size, str(run_dir), cfg.zero.nvme_path)
    if cfg.machine.disk_gib is None:
        # What a resumed run already keeps there is part of what it needs.
        held = sum(folder_bytes(step) for step in step_folders(run_dir / "checkpoints"))
        machine = replace(machine, disk_bytes=machine.disk_bytes + held)
    planned = plan(cfg, machine, shape, world.size)
    write_json(run_dir / "plan.json", planned.to_json())
    # A disk that is too small ends every run, before anything is loaded.
    if not planned.fits and (cfg.zero.stage == "auto" or planned.chosen.short == "disk"):
        raise UserError("this run does not fit this machine\n" + render_table(planned))
    return planned


def sharding_of(planned: Plan, nvme_path: str | None, run_dir: Path) -> Sharding:
    """Convert the chosen option to the arguments of `deepspeed_config.build`."""
    chosen = planned.chosen.option
    return Sharding(
        chosen.stage,
        Offload(chosen.offload_optimizer),
        Offload(chosen.offload_params),
        nvme.run_folder(nvme_path, run_dir),
        planned.job.shape.largest(),
    )
