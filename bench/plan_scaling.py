"""Optimizer bytes per rank over the number of ranks: real DeepSpeed engines beside the planner's prediction.

    python bench/plan_scaling.py [--ranks 1,2,4,8] [--out FILE.json] [--picture FILE.png]

Each group of ranks trains a small GPT-J (bf16, full) for two steps on gloo; every rank counts the bytes of the fp32
masters, moments and step counters that its engine holds. The figures are those of the fullest rank.
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
WALK = ROOT / "tests" / "planning"
sys.path[:0] = [str(ROOT), str(WALK)]

STAGES = (0, 1, 2, 3)
COLOURS = {0: "#9d9da1", 1: "#4c78a8", 2: "#f58518", 3: "#54a24b"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Optimizer bytes per rank: measured and predicted."
    )
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/plan_scaling.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/optimizer_scaling.png")
    options = parser.parse_args()
    ranks = [int(text) for text in options.ranks.split(",")]
    rows = [row for count in ranks for row in measure(count)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"machine": platform.platform(), "rows": rows}, indent=1) + "\n"
    )
    for row in rows:
        figures = f"measured {row['measured']:>10,}, predicted {row['predicted']:>10,}"
        print(f"{row['ranks']} ranks, stage {row['stage']}: {figures}")
    draw(rows, options.picture)


def measure(ranks: int) -> list[dict]:
    """One group of processes: all stages, one after the other."""
    from plan_engine_walk import ADAPTERS

    from finetune.planning.job import Option
    from finetune.planning.states import model_states
    from plan_cases import config, job  # isort: skip

    cases = [
        {"stage": stage, "dtype": "bf16", "accumulation": 1, "adapter": "full"} for stage in STAGES
    ]
    found = walk(ranks, cases)
    rows = []
    for index, case in enumerate(cases):
        cfg = config(ADAPTERS["full"], stage=case["stage"], ranks=ranks)
        states = [
            model_states(job(cfg, ranks=ranks), Option(case["stage"]), rank)
            for rank in range(ranks)
        ]
        measured = max(figures[index]["optimizer"] for figures in found)
        rows.append({"ranks": ranks, "stage": case["stage"], "measured": measured,
                     "predicted": max(state.optimizer for state in states)})  # fmt: skip
    return rows


def walk(ranks: int, cases: list[dict]) -> list[list[dict[str, int]]]:
    from finetune.process import free_port

    with tempfile.TemporaryDirectory() as out:
        job = {"ranks": ranks, "cases": cases, "out": out, "port": free_port()}
        command = [sys.executable, str(WALK / "plan_engine_walk.py"), json.dumps(job)]
        paths = f"{ROOT}:{WALK}"
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})  # fmt: skip
        return [
            json.loads((Path(out) / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)
        ]


def draw(rows: list[dict], path: Path) -> None:
    """Lines are predictions, dots are measurements; both axes are logarithmic, so 1/N is a straight line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for stage in STAGES:
        mine = [row for row in rows if row["stage"] == stage]
        ranks = [row["ranks"] for row in mine]
        size = {0: 8, 1: 15, 2: 10, 3: 5}[stage]  # stages 1 to 3 lie on one another: rings
        axes.plot(
            ranks,
            [row["predicted"] / 1e6 for row in mine],
            color=COLOURS[stage],
            linewidth=1.2,
            zorder=2,
        )
        axes.plot(ranks, [row["measured"] / 1e6 for row in mine], "o", color=COLOURS[stage], markersize=size,
                  markeredgewidth=0, label=f"stage {stage}", zorder=3 + stage)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    counts = sorted({row["ranks"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    top = max(row["measured"] for row in rows) / 1e6
    axes.set_yticks([top / count for count in counts], [f"{top / count:.1f}" for count in counts])
    axes.minorticks_off()
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("ranks")
    axes.set_ylabel("optimizer states per rank, MB")
    axes.set_title("dots: tensors of real engines; lines: predicted", loc="left", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
