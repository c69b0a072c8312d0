"""The memory planner: will it fit, which ZeRO stage, which micro-batch; no torch, no weights, no GPU needed.

Read in this order: job.py (inputs), states.py (exact), activations.py and estimate.py (estimates), options.py and
choose.py (the choice), advice.py, table.py and picture.py (for people). machine.py measures.
"""

from finetune.plan.activations import LOSS_CHUNK
from finetune.plan.choose import Plan, largest_micro_batch, plan
from finetune.plan.estimate import Estimate
from finetune.plan.job import Job, Option, Work
from finetune.plan.machine import Machine, measure_machine
from finetune.plan.picture import draw
from finetune.plan.states import States, model_states
from finetune.plan.table import readme_table, render_table

__all__ = [
    "LOSS_CHUNK",
    "Estimate",
    "Job",
    "Machine",
    "Option",
    "Plan",
    "States",
    "Work",
    "draw",
    "largest_micro_batch",
    "measure_machine",
    "model_states",
    "plan",
    "readme_table",
    "render_table",
]
