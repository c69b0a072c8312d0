"""Sweeps: many runs, each in a fresh `deepspeed` process group, started by a parent that is in none.

    python launch/train.py -m recipe=quickstart optim.lr=1e-3,5e-3 adapter.rank=4,8

words -> `space` (what varies) -> `search` (which job next) -> `pool` (on which devices) -> `job` (a process group)
-> `sweep` (the loop over all of them) -> `show` (sweep.json, the table) and `page` (sweep.html).
Hydra itself runs multirun jobs inside one process, where a second process group cannot start. No torch here.
"""
