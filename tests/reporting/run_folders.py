"""Run directories as a training run leaves them, for the tests of what a person sees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

GIB = 2**30

PLAN = {
    "fits": True,
    "chosen": {"zero": "stage2", "offload_optimizer": "cpu", "offload_params": "none"},
    "machine": {"gpus": 2, "gpu_bytes": 24 * GIB, "host_bytes": 64 * GIB},
    "options": [
        {
            "zero": "stage0",
            "offload_optimizer": "none",
            "offload_params": "none",
            "gpu_bytes": 30 * GIB,
            "host_bytes": 6 * GIB,
            "disk_bytes": 0,
            "fits": False,
            "parts": {},
        },
        {
            "zero": "stage2",
            "offload_optimizer": "cpu",
            "offload_params": "none",
            "gpu_bytes": int(14.6 * GIB),
            "host_bytes": 9 * GIB,
            "disk_bytes": 0,
            "fits": True,
            "parts": {
                "weights": int(11.3 * GIB),
                "gradients": int(0.1 * GIB),
                "optimizer": 0,
                "activations": int(2.1 * GIB),
                "logits": int(0.4 * GIB),
                "workspace": int(0.7 * GIB),
            },
        },
    ],
    "parameters": {"total": 6_050_882_784, "trainable": 3_670_016},
}

CONFIG = """\
name: quickstart
run_dir: null
seed: 0
model: {path: 'asset:gptj_tiny', dtype: bf16, tokenizer: null}
task: {max_length: 512, text_field: text}
adapter: {kind: lora, rank: 8, alpha: 16.0, dropout: 0.0, targets: 'q_proj,v_proj'}
train: {steps: STEPS, micro_batch: 4, global_batch: 16, packing: true}
optim: {lr: 0.005, schedule: cosine, betas: [0.9, 0.999]}
"""

DATA = {
    "train": {
        "documents": 1840,
        "tokens": 1_204_331,
        "rows": 2353,
        "packing_efficiency": 0.9974,
        "skipped_rows": 3,
        "lengths": {str(2**k): 40 * k for k in range(4, 11)},
        "tokens_by_name": {
            "subset": {
                "Pile-CC": 520_331,
                "ArXiv": 340_000,
                "PubMed Abstracts": 244_000,
                "<b>Odd & ends</b>": 100_000,
            }
        },
    },
    "eval": {"documents": 92, "tokens": 61_020, "rows": 120},
}

ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "world_size": 2,
    "overrides": ["recipe=quickstart", "optim.lr=0.005"],
    "hostname": "node1",
}


def train_record(step: int, steps: int) -> dict[str, Any]:
    wiggle = math.sin(step * 12.9898) * 43758.5453 % 1 - 0.5
    return {
        "kind": "train",
        "step": step,
        "loss": 2.2 + 1.6 * math.exp(-step / 60) + 0.25 * wiggle,
        "lr": 0.0025 * (1 + math.cos(math.pi * step / steps)) * min(1.0, step / 10),
        "grad_norm": 0.6 + 2 * math.exp(-step / 30) + 0.5 * abs(wiggle),
        "tokens": step * 8170,
        "tokens_per_second": 2300 + 260 * wiggle,
        "host_bytes": int((3.6 + 0.4 * (1 - math.exp(-step / 9))) * GIB),
        "gpu_bytes": int((13.1 + 0.2 * wiggle) * GIB),
    }


def eval_record(step: int) -> dict[str, Any]:
    loss = 2.3 + 1.5 * math.exp(-step / 60)
    subsets = {
        name: {"loss": loss + shift, "perplexity": math.exp(loss + shift), "tokens": 20_340}
        for name, shift in (("Pile-CC", 0.1), ("ArXiv", -0.2), ("<b>Odd & ends</b>", 0.4))
    }
    return {
        "kind": "eval",
        "step": step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "subsets": subsets,
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(run_dir: Path, steps: int = 200, status: str | None = "done") -> Path:
    """A complete run of `steps` steps; `status=None` leaves result.json out, as while it is still going."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG.replace("STEPS", str(steps)))
    (run_dir / "plan.json").write_text(json.dumps(PLAN))
    (run_dir / "data_stats.json").write_text(json.dumps(DATA))
    (run_dir / "environment.json").write_text(json.dumps(ENVIRONMENT))
    records = [train_record(step, steps) for step in range(1, steps + 1)]
    evals = [eval_record(step) for step in range(0, steps + 1, max(1, steps // 10))]
    write_lines(
        run_dir / "metrics.jsonl", sorted([*records, *evals], key=lambda record: record["step"])
    )
    write_lines(
        run_dir / "samples.jsonl",
        [
            {
                "step": step,
                "prompt": "The President",
                "text": f" of the <script>alert({step})</script> Union said that "
                "the people of the United States had never been so many,\nnor so patient. He sat down.",
            }
            for step in range(steps // 3, steps + 1, max(1, steps // 3))
        ],
    )
    if status is not None:
        (run_dir / "result.json").write_text(json.dumps(result(steps, status)))
    return run_dir


def result(steps: int, status: str) -> dict[str, Any]:
    return {
        "status": status,
        "step": steps,
        "loss": 2.21,
        "eval": {"loss": 2.3},
        "tokens": steps * 8170,
        "seconds": 712.3,
        "tokens_per_second": 2310.2,
        "peak_host_bytes": int(4.1 * GIB),
        "start_host_bytes": int(3.2 * GIB),
        "peak_gpu_bytes": int(13.4 * GIB),
        "world_size": 2,
        "zero_stage": 2,
        "export": "export",
        "error": "the loss was NaN at step 3 <b>" if status == "failed" else None,
    }
