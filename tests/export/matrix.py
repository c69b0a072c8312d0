"""The runs that exports are tested from: every head, adapter, stage and number of ranks, or a covering part of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.ranks import run_cases

HEADS = {"lm": "instruct_lora", "classify": "classify_lora", "qa": "qa_lora"}
ADAPTERS = ("lora", "rslora", "dora", "ia3", "full")
STAGES = (0, 2, 3)
RANKS = (1, 2)


@dataclass(frozen=True)
class Case:
    head: str
    adapter: str
    stage: int
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.head}-{self.adapter}-stage{self.stage}-{self.ranks}"

    def overrides(self, model: Path, run_dir: Path) -> list[str]:
        """Two fp32 steps on the head's shipped data."""
        targets = (
            ["adapter.targets=[q_proj,k_proj,v_proj,out_proj,fc_in,fc_out]"]
            if "lora" in self.adapter
            else []
        )
        everywhere = (
            ["adapter.targets=[k_proj,v_proj,fc_out]"] if self.adapter == "ia3" else targets
        )
        return [
            f"recipe={HEADS[self.head]}",
            "debug=tiny",
            f"model.path={model}",
            "model.dtype=fp32",
            f"adapter={self.adapter}",
            f"zero=stage{self.stage}",
            f"run_dir={run_dir / self.name}",
            "seed=3",
            "train.steps=2",
            "train.global_batch=4",
            "train.micro_batch=1",
            "optim.lr=3e-2",
            "data.eval=null",
            "export.verify=false",
            *everywhere,
        ]


FULL = [Case(*values) for values in itertools.product(HEADS, ADAPTERS, STAGES, RANKS)]
PART = [
    Case(head, adapter, STAGES[(i + j) % 3], RANKS[(i + j) % 2])
    for i, head in enumerate(HEADS)
    for j, adapter in enumerate(ADAPTERS)
]
"""Every adapter with every head; all stages, and both numbers of ranks at every stage."""


def train(cases: list[Case], model: Path, folder: Path) -> None:
    """Train all cases: one group of processes for each number of ranks."""
    for ranks in RANKS:
        chosen = [case.overrides(model, folder) for case in cases if case.ranks == ranks]
        if chosen:
            run_cases(ranks, chosen, timeout=1500)
