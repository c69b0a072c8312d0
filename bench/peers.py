"""Tokens per second and memory of this project beside its peers: the same weights, data, batch, precision, stage.

    python bench/peers.py [--case NAME ...] [--steps 6] [--rounds 2] [--dtype bf16|fp32] [--out FILE.json]

Needs the bench extra: pip install -e '.[bench]'. Programs run one after the other in one call, in turns, each under
the deepspeed launcher: this project; transformers' Trainer + DeepSpeed; for ragged rows also TRL's SFTTrainer with
packing. The first step of each run is not counted. Tokens are real ones, padding is not. Peak memory is that of the
largest rank, working memory what the steps add to the memory just before the first one. The time of a step's matrix
products alone is measured in the same call, on the same cores. The precision is bf16 where the processor multiplies
bf16, else fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workload import Size, dense_documents, fast_dtype, launch, machine, make_model, ragged_rows

IGNORE = -100


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    length: int
    ranks: int
    stage: int = 2
    micro: int = 1
    """Sequences per rank and step."""
    ragged: bool = False
    lora: bool = False
    padded_micro: int = 4
    """Rows per rank of a peer that pads (ragged only)."""
    dtype: str = "bf16"


CASES = [
    Case("dense 1024, full, 1 rank", 1024, 1, micro=2),
    Case("dense 2048, full, 1 rank", 2048, 1),
    Case("dense 1024, full, 2 ranks", 1024, 2),
    Case("ragged instructions, full, 2 ranks", 1024, 2, ragged=True),
    Case("dense 1024, LoRA, 2 ranks", 1024, 2, lora=True),
    Case("stage 0, dense 1024, full, 1 rank", 1024, 1, stage=0, micro=2),
    Case("stage 3, dense 1024, full, 2 ranks", 1024, 2, stage=3),
]
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def ours(case: Case, model: Path, data: Path, folder: Path, steps: int) -> dict:
    run_dir = folder / "ours"
    words = [
        f"recipe={'instruct_lora' if case.ragged else 'clm_pile'}",
        f"model.path={model}",
        f"model.dtype={case.dtype}",
        f"zero=stage{case.stage}",
        f"task.max_length={case.length}",
        f"train.micro_batch={case.micro}",
        f"train.global_batch={case.micro * case.ranks}",
        f"train.steps={steps}",
        "train.activation_checkpointing=false",
        "train.probe=false",
        "train.eval_every=0",
        "optim.lr=1e-4",
        "optim.schedule=constant",
        "optim.warmup=0",
        "optim.weight_decay=0",
        f"data.train={data}",
        "data.eval=null",
        f"data.cache_dir={folder / 'cache'}",
        "export.enabled=false",
        f"run_dir={run_dir}",
    ]
    words += (
        [
            "adapter=lora",
            "adapter.rank=8",
            "adapter.alpha=16",
            "adapter.dropout=0",
            "adapter.targets=[q_proj,v_proj]",
        ]
        if case.lora
        else ["adapter=full"]
    )
    launch(case.ranks, "launch/train.py", words, folder / "ours.log")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    result = json.loads((run_dir / "result.json").read_text())
    done = [line["tokens"] for line in lines]
    tokens = [b - a for a, b in zip([0, *done], done, strict=False)]
    seconds = [t / line["tokens_per_second"] for t, line in zip(tokens, lines, strict=True)]
    return {
        "tokens_per_second": _rate(tokens, seconds),
        "losses": [line["loss"] for line in lines],
        "start_host_bytes": result["start_host_bytes"],
        "peak_host_bytes": result["peak_host_bytes"],
    }


def peer_spec(kind: str, case: Case, model: Path, rows: Path, folder: Path, steps: int) -> Path:
    """Write the orders of bench/peer_trainer.py: a json file in `folder`."""
    micro = case.micro if kind == "trl" or not case.ragged else case.padded_micro
    spec = {
        "peer": kind,
        "model": str(model),
        "rows": str(rows),
        "out": str(folder / kind),
        "steps": steps,
        "micro": micro,
        "stage": case.stage,
        "length": case.length,
        "lora": LORA if case.lora else None,
        "dtype": case.dtype,
    }
    file = folder / f"{kind}.spec.json"
    file.write_text(json.dumps(spec))
    return file


def peer(kind: str, case: Case, model: Path, rows: Path, folder: Path, steps: int) -> dict:
    file = peer_spec(kind, case, model, rows, folder, steps)
    files = [folder / f"{kind}.{rank}.json" for rank in range(case.ranks)]
    try:
        launch(case.ranks, "bench/peer_trainer.py", [str(file)], folder / f"{kind}.log")
    except RuntimeError:
        if not all(
            file.exists() for file in files
        ):  # an interpreter that aborts at its end has been measured
            raise
    ranks = [json.loads(file.read_text()) for file in files]
    tokens = sum(rank["tokens"] for rank in ranks) / steps
    seconds = ranks[0]["seconds"]
    return {
        "tokens_per_second": tokens / statistics.mean(seconds[1:]),
        "losses": ranks[0]["losses"],
        "start_host_bytes": max(rank["start_host_bytes"] for rank in ranks),
        "peak_host_bytes": max(rank["peak_host_bytes"] for rank in ranks),
    }


def _rate(tokens: list[int], seconds: list[float]) -> float:
    return sum(tokens[1:]) / sum(seconds[1:])


def rows_of(case: Case, data: Path, model: Path, file: Path) -> Path:
    """The ids and labels that our run trains on, for the peers: full blocks, or one row per example."""
    from finetune.compose import compose_train
    from finetune.data.batches import Order
    from finetune.data.cache import build_store
    from finetune.data.columns import open_store
    from finetune.data.mixture import DataSource
    from finetune.data.tokenizer import load_tokenizer
    from finetune.tasks.build import build_task

    recipe = "instruct_lora" if case.ragged else "clm_pile"
    cfg = compose_train([f"recipe={recipe}", f"task.max_length={case.length}"])
    task = build_task(cfg.task, load_tokenizer(str(model)), not case.ragged)
    store = open_store(
        build_store([DataSource(str(data))], task.encoder(), cache_dir=file.parent / "cache").path
    )
    task.prepare(store, None)
    rows = task.rows(store)
    # Packed rows in the order that our run takes them, so that the first losses can be compared; examples as they come.
    ours_first = Order([len(rows)], 0, shuffle=True)
    order = (
        range(len(rows)) if case.ragged else [ours_first[position] for position in range(len(rows))]
    )
    with file.open("w") as f:
        for index in map(int, order):
            batch = task.collate(store, rows, [index])
            ids, labels = batch["ids"].tolist(), batch["labels"].tolist()
            # Ours are shifted already; Hugging Face's models shift by themselves.
            f.write(json.dumps({"input_ids": ids, "labels": [IGNORE, *labels[:-1]]}) + "\n")
    return file


def matmul_seconds(size: Size, case: Case, tokens: int, repeat: int = 3) -> float:
    """Seconds of a step's matrix products alone, on all cores: what no program can undercut.

    Per token: forward, gradient of the input, and (full fine-tuning) of the weight; attention's two products forward
    and four backward, half of the square.
    """

    import torch

    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    d, layers, passes = size.n_embd, size.n_layer, 2 if case.lora else 3
    shapes = [(4 * layers, d, d), (layers, d, 4 * d), (layers, 4 * d, d), (1, d, 50400)]
    total = 0.0
    for count, rows, columns in shapes:
        x, w = torch.randn(tokens, rows).to(dtype), torch.randn(columns, rows).to(dtype)
        y = torch.randn(tokens, columns).to(dtype)
        for product in ((x, w.T), (y, w), (y.T, x))[:passes]:
            total += count * _seconds(lambda p=product: torch.mm(*p), repeat)
    heads, dim = size.n_head, d // size.n_head
    blocks = max(1, tokens // case.length)
    q = torch.randn(blocks * heads, case.length, dim).to(dtype)
    p = torch.randn(blocks * heads, case.length, case.length).to(dtype)
    pair = _seconds(lambda: torch.bmm(q, q.transpose(1, 2)), repeat) + _seconds(
        lambda: torch.bmm(p, q), repeat
    )
    return total + layers * 3 * pair / 2


def _seconds(work, repeat: int) -> float:

    work()
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def measure(case: Case, size: Size, steps: int, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", size)
        data = folder / "data.jsonl"
        if case.ragged:
            ragged_rows(data, 40 * steps * case.ranks)
        else:
            dense_documents(data, case.length * case.micro * case.ranks * (steps + 2))
        rows = rows_of(case, data, model, folder / "rows.jsonl")
        programs = ["ours", "trainer"] + (["trl"] if case.ragged else [])
        runs: dict[str, list[dict]] = {name: [] for name in programs}
        for turn in range(rounds):
            for program in programs:
                place = folder / f"round{turn}"
                place.mkdir(exist_ok=True)
                run = (
                    ours(case, model, data, place, steps)
                    if program == "ours"
                    else peer(program, case, model, rows, place, steps)
                )
                runs[program].append(run)
                print(
                    f"  {program:8} {run['tokens_per_second']:8.0f} tok/s  peak {run['peak_host_bytes'] / 1e9:.2f} GB"
                    f"  working {(run['peak_host_bytes'] - run['start_host_bytes']) / 1e9:.2f} GB"
                    f"  first loss {run['losses'][0]:.4f}",
                    flush=True,
                )
        tokens = case.length * case.micro * case.ranks
        products = matmul_seconds(size, case, tokens)
    return {
        "case": asdict(case),
        "tokens_per_step": tokens,
        "matmul_seconds": products,
        **summary(runs, tokens, products),
    }


def summary(runs: dict[str, list[dict]], tokens: int, products: float) -> dict:
    """Medians, spreads and ratios."""
    table = {}
    for program, results in runs.items():
        rates = [r["tokens_per_second"] for r in results]
        table[program] = {
            "tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "peak_host_bytes": statistics.median(r["peak_host_bytes"] for r in results),
            "working_bytes": statistics.median(
                r["peak_host_bytes"] - r["start_host_bytes"] for r in results
            ),
            "first_loss": results[0]["losses"][0],
        }
    mine = table["ours"]
    ratios = {}
    for program in [p for p in table if p != "ours"]:
        pairs = zip(runs["ours"], runs[program], strict=True)
        speed = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
        ratios[program] = {
            "tokens_per_second": statistics.median(speed),
            "spread": [min(speed), max(speed)],
            "peak_host_bytes": mine["peak_host_bytes"] / table[program]["peak_host_bytes"],
            "working_bytes": mine["working_bytes"] / table[program]["working_bytes"],
        }
    return {
        "programs": table,
        "ours_against": ratios,
        "step_over_matmul": tokens / mine["tokens_per_second"] / products,
    }


def show(results: list[dict]) -> None:
    print(
        f"\n{'case':38} {'tok/s':>7} {'peer':>7} {'ratio':>6} {'peak':>6} {'working':>8} {'step/matmul':>12}"
    )
    for result in results:
        for program, ratio in result["ours_against"].items():
            rates = result["programs"]
            print(
                f"{result['case']['name']:38} {rates['ours']['tokens_per_second']:7.0f} "
                f"{rates[program]['tokens_per_second']:7.0f} {ratio['tokens_per_second']:6.2f} "
                f"{ratio['peak_host_bytes']:6.2f} {ratio['working_bytes']:8.2f} {result['step_over_matmul']:12.2f}"
                f"  {program}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help="part of a case's name; all by default")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=fast_dtype())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size, results = Size(), []
    for case in CASES:
        if args.case and not any(part in case.name for part in args.case):
            continue
        print(case.name, flush=True)
        results.append(measure(replace(case, dtype=args.dtype), size, args.steps, args.rounds))
        if args.out:
            args.out.write_text(
                json.dumps(
                    {
                        "command": " ".join(["python", *sys.argv]),
                        "model": asdict(size),
                        "machine": machine(),
                        "results": results,
                    },
                    indent=1,
                )
                + "\n"
            )
    show(results)


if __name__ == "__main__":
    main()
