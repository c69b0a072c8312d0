"""A run of two ranks, killed at N random moments and started again each time, against one that nothing happened to.

    python bench/soak.py --dir DIR [--kills 50] [--stage 2] [--seconds 150] [--out bench/results/soak.json]

Kills one rank, both, or the launcher with SIGKILL, at a moment drawn from the seed: every fifth time while it starts, else
after its first new step, while it computes, evaluates or writes a checkpoint. A launcher's death lets the ranks save, so
those end by themselves. Stops after --seconds with exit code 75; the same command goes on. The end compares every line of
metrics.jsonl that is not a time, and the bytes of the last checkpoint's tensors. A tiny model: what is tested does not
depend on size. Processes are forked from one that has imported torch (tests/faults/deepspeed_zygote.py), so that a kill
costs seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults.jobs import prepare, run_jobs, words  # noqa: E402

STEPS, EVERY, EVAL_EVERY = 600, 4, 60
TARGETS = (["0"], ["1"], ["0", "1"], ["launcher"])
STARTING, AT_WORK = (0.2, 2.5), (0.0, 1.0)
"""Seconds after its start, or after its first new step, at which an attempt is killed."""
BATCH = 12
COMPARED = ("kind", "step", "loss", "lr", "grad_norm", "tokens", "skipped_steps", "perplexity")


def main() -> int:
    args = arguments()
    args.dir.mkdir(parents=True, exist_ok=True)
    state_file = args.dir / "soak.json"
    state = (
        json.loads(state_file.read_text()) if state_file.exists() else {"done": [], "seconds": 0.0}
    )
    jobs = plan_jobs(args)
    began = time.monotonic()
    while len(state["done"]) < len(jobs):
        if time.monotonic() - began > args.seconds:
            print(f"{len(state['done'])} of {len(jobs)} attempts; run the same command again")
            return 75
        state["done"] += attempts(jobs[len(state["done"]) :][:BATCH], args.dir, len(state["done"]))
        state["seconds"] += time.monotonic() - began - state.get("counted", 0.0)
        state["counted"] = time.monotonic() - began
        state_file.write_text(json.dumps(state))
    result = compare(args, state)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if result["equal"] else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, required=True, help="working directory, kept between calls"
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="end after this long, to be continued"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/soak.json")
    args = parser.parse_args()
    args.dir = args.dir.absolute()
    return args


def plan_jobs(args: argparse.Namespace) -> list[dict]:
    """The undisturbed run, the attempts that are killed, the last one."""
    prepare(args.dir)

    def run(name: str) -> list[str]:
        return words(
            args.dir,
            args.dir / name,
            f"zero=stage{args.stage}",
            f"train.steps={STEPS}",
            f"data.eval={args.dir / 'data.jsonl'}",
            f"train.eval_every={EVAL_EVERY}",
            f"checkpoint.every={EVERY}",
        )

    rng = random.Random(args.seed)

    def kill(n: int) -> dict:
        moment = (
            {"seconds": rng.uniform(*STARTING)}
            if n % 5 == 0
            else {"steps": 1, "then": rng.uniform(*AT_WORK)}
        )
        return moment | {"send": "SIGKILL", "to": rng.choice(TARGETS)}

    killed = [
        {"name": f"kill {n}", "words": run("soaked"), "actions": [kill(n)]}
        for n in range(args.kills)
    ]
    whole = {"timeout": 900}
    return [
        {"name": "undisturbed", "words": run("undisturbed"), **whole},
        *killed,
        {"name": "end", "words": run("soaked"), **whole},
    ]


def attempts(jobs: list[dict], folder: Path, first: int) -> list[dict]:
    """Describe what each attempt was hit by and left behind, in a few words."""
    found = run_jobs(jobs, folder / f"attempts-{first:03d}", timeout=3600)
    told = []
    for job in jobs:
        one = found[job["name"]]
        action = job.get("actions", [None])[0]
        told.append(
            {
                "name": job["name"],
                "codes": one["codes"],
                "seconds": round(one["seconds"], 2),
                "timeout": one["timeout"],
                "target": "+".join(action["to"]) if action else None,
                "at": action and (action.get("seconds") or f"step 1 + {action['then']:.2f} s"),
                "valid": one["valid"],
                "damaged": one["damaged"],
                "staging": len(one["staging"]),
                "reached": max((int(step) for step in one["losses"]), default=0),
                "output": one["output"] if job["name"] == "end" else [],
            }
        )
    return told


def compare(args: argparse.Namespace, state: dict) -> dict:
    killed = [one for one in state["done"] if one["name"].startswith("kill")]
    whole, soaked = args.dir / "undisturbed", args.dir / "soaked"
    lines = {run.name: records(run) for run in (whole, soaked)}
    same_metrics = lines["undisturbed"] == lines["soaked"]
    same_weights = tensor_hashes(whole) == tensor_hashes(soaked)
    ends = [one for one in state["done"] if one["name"] in ("undisturbed", "end")]
    clean = all(code == 0 for one in ends for code in one["codes"].values())
    by_target = {
        name: sum(one["target"] == name for one in killed)
        for name in sorted({one["target"] for one in killed})
    }
    return {
        "command": f"python bench/soak.py --dir DIR --kills {args.kills} --stage {args.stage} --seed {args.seed}",
        "kills": len(killed),
        "steps": STEPS,
        "stage": args.stage,
        "ranks": 2,
        "by_target": by_target,
        "without_a_new_step": sum(
            one["reached"] == before
            for one, before in zip(killed, reached_before(killed), strict=True)
        ),
        "staging_folder_left": sum(one["staging"] > 0 for one in killed),
        "damaged_checkpoints": sum(len(one["damaged"]) for one in killed),
        "processes_that_ran_on": sum(one["timeout"] for one in killed),
        "lines_compared": len(lines["soaked"]),
        "metrics_equal": same_metrics,
        "weights_equal": same_weights,
        "equal": same_metrics and same_weights and clean,
        "seconds": round(state["seconds"], 1),
    }


def reached_before(killed: list[dict]) -> list[int]:
    return [0, *(one["reached"] for one in killed[:-1])]


def records(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: record[key] for key in COMPARED if key in record} for record in map(json.loads, lines)
    ]


def tensor_hashes(run_dir: Path) -> dict[str, str]:
    manifest = json.loads(
        (run_dir / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text(encoding="utf-8")
    )
    return {
        name: entry["hash"] for name, entry in manifest["files"].items() if name.startswith("optim")
    }


if __name__ == "__main__":
    sys.exit(main())
