"""Predicted against measured peak memory of real training runs: a table and a scatter picture.

    python bench/plan_accuracy.py [--cases cpu|gpu] [--only "NAME;NAME"] [--out FILE.json] [--picture FILE.png]

Every case is one run of launch/train.py on random weights (two optimizer steps on the shipped Pile sample) in fresh
processes. On a CPU the plan's host bytes per rank stand against the largest rank's peak resident memory; on a GPU
its GPU bytes, less the CUDA context that no allocator sees, against the peak that torch reserved.
The constants of finetune/planning/estimate.py for the CPU were fitted to such runs; the GPU's were not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MODELS = {"71M": (512, 6, 8), "162M": (768, 12, 12), "368M": (1024, 24, 16)}
"""Name -> n_embd, n_layer, n_head; all with GPT-J's vocabulary."""
Words = list[str]
FULL = ["adapter=full"]
LORA = ["adapter=lora", "adapter.rank=8", "adapter.alpha=16", "adapter.targets=[q_proj,v_proj]"]


def batch(
    micro: int,
    accumulation: int = 1,
    ranks: int = 1,
    checkpointing: bool = False,
    length: int = 1024,
) -> Words:
    return [f"train.micro_batch={micro}", f"train.global_batch={micro * accumulation * ranks}",
            f"train.activation_checkpointing={checkpointing}", f"task.max_length={length}"]  # fmt: skip


CPU_CASES: dict[str, tuple[str, int, list[str]]] = {
    "stage 0": ("71M", 1, [*FULL, "zero=stage0", *batch(4)]),
    "stage 1, 2 micro-steps": ("71M", 1, [*FULL, "zero=stage1", *batch(2, 2)]),
    "stage 2": ("71M", 1, [*FULL, "zero=stage2", *batch(1)]),
    "stage 2, fp32": ("71M", 1, [*FULL, "zero=stage2", "model.dtype=fp32", *batch(2)]),
    "stage 3, checkpointing": ("71M", 1, [*FULL, "zero=stage3", *batch(2, 2, checkpointing=True)]),
    "stage 2, 2 ranks": ("71M", 2, [*FULL, "zero=stage2", *batch(1, 2, 2)]),
    "stage 3, 2 ranks": ("71M", 2, [*FULL, "zero=stage3", *batch(1, 2, 2)]),
    "LoRA, stage 1": ("71M", 1, [*LORA, "zero=stage1", *batch(4)]),
    "162M, stage 0, fp32": ("162M", 1, [*FULL, "zero=stage0", "model.dtype=fp32", *batch(1, 2)]),
    "162M, stage 1, checkpointing": (
        "162M",
        1,
        [*FULL, "zero=stage1", *batch(2, checkpointing=True)],
    ),
    "162M, stage 2": ("162M", 1, [*FULL, "zero=stage2", *batch(1, 2)]),
    "162M, stage 3": ("162M", 1, [*FULL, "zero=stage3", *batch(2)]),
    "162M, LoRA, stage 0": ("162M", 1, [*LORA, "zero=stage0", *batch(4)]),
    "368M, stage 2, checkpointing": (
        "368M",
        1,
        [*FULL, "zero=stage2", *batch(1, checkpointing=True)],
    ),
}
GPU_BATCHES = (
    (1, 512, False),
    (1, 2048, False),
    (4, 2048, False),
    (4, 2048, True),
    (16, 2048, True),
)
GPU_CASES: dict[str, tuple[str, int, list[str]]] = {
    f"LoRA, {micro} x {length}{', checkpointing' * checkpointing}": (
        "6B", 1, [*LORA, "zero=stage1", *batch(micro, 2, 1, checkpointing, length)])
    for micro, length, checkpointing in GPU_BATCHES
}  # fmt: skip
OFFLOAD = [*FULL, "zero=stage2", "zero.offload_optimizer=cpu"]
GPU_CASES["full, optimizer offload"] = ("6B", 1, [*OFFLOAD, *batch(1, 2, 1, True, 2048)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured peak memory.")
    parser.add_argument("--cases", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument(
        "--replan",
        action="store_true",
        help="train nothing: today's plan for the runs of the result file",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    cases = CPU_CASES if options.cases == "cpu" else GPU_CASES
    chosen = {
        name: case
        for name, case in cases.items()
        if not options.only or name in options.only.split(";")
    }
    out = options.out or ROOT / f"bench/results/plan_accuracy_{options.cases}.json"
    if options.replan:
        record = json.loads(out.read_text())
        rows = [
            replanned(row, *chosen[row["case"]]) for row in record["rows"] if row["case"] in chosen
        ]
    else:
        record = {"machine": platform.platform(), "cores": os.cpu_count()}
        rows = [measure(name, *case) for name, case in chosen.items()]
    out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    draw(rows, options.picture or ROOT / f"docs/plan_accuracy_{options.cases}.png")


def measure(name: str, model: str, ranks: int, overrides: list[str]) -> dict:
    """One run in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(ranks, settings(model, Path(folder), run, overrides), name)
        plan, result = (
            json.loads((run / file).read_text()) for file in ("plan.json", "result.json")
        )
    row = {"case": name, "ranks": ranks, **compare(plan, result)}
    predicted, measured = row["predicted"] / 2**30, row["measured"] / 2**30
    figures = f"predicted {predicted:6.2f} GiB  measured {measured:6.2f} GiB  {predicted / measured - 1:+.1%}"
    print(f"{name:30}  {figures}", flush=True)
    return row


def replanned(row: dict, model: str, ranks: int, overrides: Words) -> dict:
    """The row with the prediction of the planner as it is now."""
    from finetune.compose import compose_train
    from finetune.planning.choose import plan
    from finetune.planning.machine import measure_machine
    from finetune.planning.shape import load_shape

    with tempfile.TemporaryDirectory() as folder:
        cfg = compose_train(settings(model, Path(folder), Path(folder), overrides))
        shape = load_shape(cfg.model.path, "lm", 2)
    found = plan(cfg, measure_machine(cfg.machine, ranks), shape, ranks).to_json()
    row = row | {
        "predicted": compare(found, {"peak_host_bytes": 0, "peak_gpu_bytes": 0})["predicted"]
    }
    print(f"{row['case']:30}  {row['predicted'] / row['measured'] - 1:+.1%}")
    return row


def settings(model: str, folder: Path, run: Path, overrides: Words) -> Words:
    words = [
        "recipe=clm_pile", f"model.path={model_folder(model, folder)}", "model.init=random",
        "model.dtype=bf16", "data=pile_sample", "data.eval=null", "train.steps=2", "train.epochs=null",
        "train.threads=1", "checkpoint.every=0", "export.enabled=false", f"run_dir={run}", *overrides,
    ]  # fmt: skip
    return list({word.split("=")[0]: word for word in words}.values())


def train(ranks: int, words: list[str], name: str) -> None:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    ran = subprocess.run([sys.executable, *launcher, "launch/train.py", *words], cwd=ROOT, capture_output=True,
                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    if ran.returncode:
        raise SystemExit(f"{name}: {ran.stdout[-500:]}\n{ran.stderr[-2000:]}")


def model_folder(model: str, folder: Path) -> str:
    if model == "6B":
        return "asset:gptj_6b"
    n_embd, n_layer, n_head = MODELS[model]
    config = json.loads((ROOT / "finetune/assets/gptj_6b/config.json").read_text())
    config |= {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "rotary_dim": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def compare(plan: dict, result: dict) -> dict[str, int]:
    """Predicted and measured bytes of one rank."""
    from finetune.planning.estimate import CUDA_CONTEXT_BYTES

    choice = plan["chosen"]
    chosen = next(
        option for option in plan["options"] if all(option[key] == choice[key] for key in choice)
    )
    if plan["machine"]["gpus"]:
        return {
            "predicted": chosen["gpu_bytes"] - CUDA_CONTEXT_BYTES,
            "measured": result["peak_gpu_bytes"],
        }
    return {
        "predicted": chosen["host_bytes"] // plan["world_size"],
        "measured": result["peak_host_bytes"],
    }


def draw(rows: list[dict], path: Path) -> None:
    """Measured over predicted, with the line of perfect prediction and a band of 10%."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    top = 1.1 * max(max(row["predicted"], row["measured"]) for row in rows) / 2**30
    axes.fill_between(
        [0, top],
        [0, 0.9 * top],
        [0, 1.1 * top],
        color="#4c78a8",
        alpha=0.12,
        linewidth=0,
        label="10%",
    )
    axes.plot([0, top], [0, top], color="#4c78a8", linewidth=1)
    predicted, measured = ([row[key] / 2**30 for row in rows] for key in ("predicted", "measured"))
    axes.plot(
        predicted,
        measured,
        "o",
        color="#f58518",
        markeredgecolor="white",
        markersize=7,
        label="one run",
    )
    axes.set(
        xlim=(0, top),
        ylim=(0, top),
        xlabel="predicted peak per rank, GiB",
        ylabel="measured peak per rank, GiB",
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
