"""`launch/plan.py`: compose, measure or imagine the machine, plan, print. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.check import planning_problems
from finetune.compose import Composed, settle
from finetune.errors import EXIT_DONE, EXIT_FAILED, UserError
from finetune.planning.choose import plan
from finetune.planning.machine import measure_machine
from finetune.planning.shape import load_shape
from finetune.planning.show import draw, render_table


def run(composed: Composed) -> int:
    """Print the plan; exit code 0 when it fits, 1 when nothing does."""
    cfg = settle(composed)
    machine = measure_machine(cfg.machine, nvme_path=cfg.zero.nvme_path)
    ranks = max(1, machine.gpus)
    labels = len(getattr(cfg.task, "labels", None) or []) or 2
    shape = load_shape(cfg.model.path, cfg.task.head, labels)
    planning_problems(cfg, ranks, machine.gpus > 0, shape.n_positions)
    planned = plan(cfg, machine, shape, ranks)
    if cfg.plan.picture:
        try:
            draw(planned, Path(cfg.plan.picture).expanduser())
        except (OSError, ValueError) as error:
            raise UserError(
                f"the picture cannot be written: {error}",
                "plan.picture",
                "Try plan.picture=plan.png.",
            ) from None
    as_json = cfg.plan.format == "json"
    print(json.dumps(planned.to_json(), indent=1) if as_json else render_table(planned))
    return EXIT_DONE if planned.fits else EXIT_FAILED
