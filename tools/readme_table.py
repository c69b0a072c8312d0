"""Print the README's table: the stage that zero=auto takes for GPT-J-6B on common GPUs.

python -m tools.readme_table
"""

from __future__ import annotations

from typing import Any

from finetune.config import (
    AdapterConfig,
    Config,
    FullConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    OptimName,
    Quantize,
    TaskConfig,
    TrainConfig,
)
from finetune.errors import GIB
from finetune.planning.choose import Plan, plan
from finetune.planning.machine import Machine
from finetune.planning.shape import load_shape

GPUS = (1, 2, 4, 8)
COLUMNS: dict[str, dict[str, Any]] = {
    "full": {"gib": (24, 40, 80), "adapter": FullConfig()},
    "full, adamw8bit": {
        "gib": (40, 80),
        "adapter": FullConfig(),
        "optim": OptimConfig(name=OptimName.adamw8bit),
    },
    "LoRA": {"gib": (24,), "adapter": LoraConfig()},
    "LoRA on int8": {"gib": (12,), "adapter": LoraConfig(), "quantize": Quantize.int8},
    "LoRA on nf4": {"gib": (8,), "adapter": LoraConfig(), "quantize": Quantize.nf4},
}
"""Kind of training -> memories of a GPU, in GB, and arguments of `plan_6b`."""
HOST_GIB = 256


def readme_table() -> str:
    """Return markdown with the stage that zero=auto takes for GPT-J-6B, in GiB.

    In bf16, with 2048 tokens, micro-batch 1 and activation checkpointing.
    """
    heads = [f"{kind}, {size} GB" for kind, how in COLUMNS.items() for size in how["gib"]]
    lines = [f"| GPUs | {' | '.join(heads)} |", "|--:|" + "---|" * len(heads)]
    for gpus in GPUS:
        cells = []
        for how in COLUMNS.values():
            settings = {key: value for key, value in how.items() if key != "gib"}
            for size in how["gib"]:
                planned = plan_6b(gpus, size, **settings)
                option, host = planned.chosen.option, ""
                if option.offloads:
                    host = f" + host {planned.chosen.host_bytes / GIB:.0f}"
                gpu = f"{planned.chosen.gpu_bytes / GIB:.0f}"
                cells.append(f"stage {option.stage}: {gpu}{host}" if planned.fits else "no")
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plan_6b(
    gpus: int,
    gpu_gib: int,
    adapter: AdapterConfig,
    optim: OptimConfig | None = None,
    quantize: Quantize = Quantize.none,
) -> Plan:
    """Plan GPT-J-6B at 2048 tokens, 64 sequences a step, on GPUs that are not here."""
    train = TrainConfig(global_batch=64, micro_batch=1, activation_checkpointing=True)
    model = ModelConfig(path="asset:gptj_6b", quantize=quantize)
    cfg = Config(
        model=model, task=TaskConfig(), adapter=adapter, train=train, optim=optim or OptimConfig()
    )
    machine = Machine(gpus, min(gpus, 8), gpu_gib * GIB, HOST_GIB * GIB, 2000 * GIB)
    return plan(cfg, machine, load_shape(model.path), gpus)


if __name__ == "__main__":
    print(readme_table())
