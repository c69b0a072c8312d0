"""Hydra multirun with one fresh `deepspeed` process group per job, started by a parent that is in none.

    python launch/train.py -m recipe=quickstart optim.lr=1e-3,5e-3 adapter.rank=4,8

words -> `space` (what varies) -> `search` (which job next) -> `pool` (on which devices) -> `job` (a process group)
-> `program` (the loop over all of them) -> `table` (sweep.json, the table) and report/sweep_page.py (sweep.html).
Hydra itself runs multirun jobs inside one process, where a second process group cannot start. No torch here.
"""

from finetune.sweep.program import sweep

__all__ = ["sweep"]
