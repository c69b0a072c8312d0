"""Time and memory over sequence length and over ranks, this project and transformers' Trainer + DeepSpeed.

    python bench/scaling.py [--steps 5] [--rounds 2] [--out bench/results/scaling.json] [--picture docs/scaling.png]

2048 tokens a step on one rank as 8 x 256 ... 1 x 2048, and 1 x 1024 per rank on one and two ranks; ZeRO stage 2, bf16
where the processor multiplies it, else fp32; the model of `bench/peers.py`. Programs run one after the other in one call,
in turns; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from peers import Case, ours, peer, rows_of
from workload import Size, dense_documents, fast_dtype, machine, make_model

TOKENS = 2048
CASES = [
    Case(f"{TOKENS // length} x {length}", length, 1, micro=TOKENS // length, dtype=fast_dtype())
    for length in (256, 512, 1024, 2048)
]
CASES += [
    Case(f"1 x 1024 on {ranks} rank{'s' * (ranks > 1)}", 1024, ranks, dtype=fast_dtype())
    for ranks in (1, 2)
]


def measure(case: Case, model: Path, folder: Path, steps: int, rounds: int) -> dict:
    folder.mkdir()
    data = dense_documents(
        folder / "data.jsonl", case.length * case.micro * case.ranks * (steps + 2)
    )
    rows = rows_of(case, data, model, folder / "rows.jsonl")
    runs: dict[str, list[dict]] = {"ours": [], "trainer": []}
    for turn in range(rounds):
        place = folder / f"round{turn}"
        place.mkdir()
        runs["ours"].append(ours(case, model, data, place, steps))
        runs["trainer"].append(peer("trainer", case, model, rows, place, steps))
    found = {"case": asdict(case)}
    for name, results in runs.items():
        found[name] = run = {
            key: statistics.median(result[key] for result in results)
            for key in ("tokens_per_second", "start_host_bytes", "peak_host_bytes")
        }
        print(
            f"  {case.name:20} {name:8} {run['tokens_per_second']:6.0f} tok/s  peak {run['peak_host_bytes'] / 1e9:.2f} GB"
            f"  working {(run['peak_host_bytes'] - run['start_host_bytes']) / 1e9:.2f} GB",
            flush=True,
        )
    return found


def draw(results: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = [
        r
        for r in results
        if r["case"]["ranks"] == 1 and r["case"]["micro"] * r["case"]["length"] == TOKENS
    ]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, label in (("ours", "this project"), ("trainer", "Trainer + DeepSpeed")):
        x = [r["case"]["length"] for r in lengths]
        speed.plot(x, [r[name]["tokens_per_second"] for r in lengths], marker="o", label=label)
        memory.plot(
            x,
            [(r[name]["peak_host_bytes"] - r[name]["start_host_bytes"]) / 1e9 for r in lengths],
            marker="o",
            label=label,
        )
    speed.set(xlabel="sequence length (tokens)", ylabel="tokens/s", xticks=x)
    memory.set(xlabel="sequence length (tokens)", ylabel="working memory (GB)", xticks=x)
    for axis in (speed, memory):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    speed.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", Size())
        results = [
            measure(case, model, folder / str(i), args.steps, args.rounds)
            for i, case in enumerate(CASES)
        ]
    if args.out:
        args.out.write_text(
            json.dumps(
                {
                    "command": " ".join(["python", *sys.argv]),
                    "model": asdict(Size()),
                    "machine": machine(),
                    "results": results,
                },
                indent=1,
            )
            + "\n"
        )
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
