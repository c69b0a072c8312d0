"""GPT-J-6B on one GPU, offline, with random weights: speed and memory in one command of 8 minutes.

    python bench/gpu.py --out bench/results/gpu.json [--part NAME ...] [--budget 480]
    python bench/gpu.py --dry-run                    every part on a CPU with a tiny model
    python bench/gpu.py --compare OLD.json NEW.json  what got slower or larger by more than 5%

Parts (`gpu_parts.py` measures; each part is a process with a time limit, and a part that fails or
takes too long is recorded with its message while the others go on; results are written after each):

    nccl        start of the communication library with one rank, and an all-reduce
    products    nothing but the matrix products of the blocks, forward and input gradients: the limit
    attention   attention kernels alone, forward and backward
    loss        head and cross-entropy alone, forward and backward
    model       draw the checkpoint of random weights that the parts below load
    main        the real command: deepspeed launch/train.py, LoRA, with a verified export
    lora        LoRA over micro-batch and activation checkpointing, one process, one load
    ablate      the same with one thing switched off at a time
    trainer     transformers' Trainer with DeepSpeed and peft, its default attention, same adapter
    full        all weights, optimizer on the host, 131,072 tokens a step
    generate    greedy generation here and by plain transformers, batches of 1 and 32
    small       the real command: LoRA on int8 and nf4, all weights with 8-bit Adam (75 GB of GPU)

Peaks stand beside the planner's predictions, and measured figures beside the targets.

A rented machine, 15 minutes, two calls. It needs 40 GB of disk, and 110 GB of host memory for `full`.
Without network, bring wheels of what the machine lacks next to torch; on a machine with network:

    DS_BUILD_OPS=0 pip wheel --no-deps -w wheels deepspeed
    pip download --no-deps -d wheels transformers peft datasets hydra-core omegaconf hjson dill \\
        multiprocess zstandard bitsandbytes pydantic pydantic-core annotated-types typing-inspection
    pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3

Then there, once to see that everything is installed, and once to measure:

    python bench/gpu.py --wheels wheels --work /tmp/gpu --part nccl attention model
    python bench/gpu.py --wheels wheels --work /tmp/gpu --out bench/results/gpu.json

`--work` keeps the installed wheels and the checkpoint between the calls. Last,
`python bench/performance_tables.py` writes the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from workload import ROOT, machine

LIMITS = {
    "nccl": 25,
    "products": 25,
    "attention": 30,
    "loss": 25,
    "model": 60,
    "main": 90,
    "lora": 75,
    "ablate": 60,
    "trainer": 90,
    "full": 120,
    "generate": 75,
    "small": 200,
}
"""Most seconds of each part; all together also end within `--budget`."""
NEEDS_MODEL = ("main", "lora", "ablate", "trainer", "full", "generate", "small")
TARGETS = (
    ("LoRA, best, tokens/s", 22_000, "lora", "tokens_per_second", ""),
    ("LoRA, micro 8, whole blocks, tokens/s", 14_000, "lora", "tokens_per_second", "micro 8, whole blocks"),
    ("full, optimizer on the host, tokens/s", 10_500, "full", "tokens_per_second", ""),
    ("generation, batch 1, tokens/s", 200, "generate", "tokens_per_second", "ours, batch 1"),
    ("generation, batch 32, tokens/s", 4_000, "generate", "tokens_per_second", "ours, batch 32"),
)  # fmt: skip
"""Name, figure to reach, part, key, and its case; without a case, the best one counts."""
WORSE = 1.05
HIGHER_IS_BETTER = ("tokens_per_second", "tflops", "gigabytes_per_second")
LOWER_IS_BETTER = ("_ms", "seconds", "peak_gpu_bytes", "peak_host_bytes")


def run_part(name: str, setting: Path, work: Path, limit: float) -> dict:
    """Measure one part in a process of its own; its cases, and its message if it failed."""
    out, log = work / f"{name}.json", work / f"{name}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, "bench/gpu_parts.py", name, str(setting), str(out)]
    started, error = time.perf_counter(), None
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if process.wait(timeout=limit):
                error = log.read_text(errors="replace")[-2000:]
        except subprocess.TimeoutExpired:
            error = (
                f"stopped after its limit of {limit:.0f} s; {log} ends:\n"
                + log.read_text(errors="replace")[-1000:]
            )
        finally:
            # The part may have started a launcher with ranks of its own.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    part = {"wall_seconds": round(time.perf_counter() - started, 1)}
    if error:
        part["error"] = error
    return part | {"cases": json.loads(out.read_text()) if out.is_file() else {}}


def targets(parts: dict) -> list[dict]:
    """Every target beside the figure that was measured, None where there is none."""
    rows = []
    for name, target, part, key, case in TARGETS:
        cases = parts.get(part, {}).get("cases", {})
        measured = [c[key] for n, c in cases.items() if key in c and case in ("", n)]
        rows.append({"name": name, "target": target, "measured": max(measured, default=None)})
    return rows


def predictions(parts: dict) -> dict[str, dict]:
    """The planner's peak beside every measured one, and their ratio."""
    return {
        f"{part}: {name}": {
            "predicted_bytes": case["predicted_bytes"],
            "measured_bytes": case["planned_peak_bytes"],
            "ratio": case["predicted_bytes"] / case["planned_peak_bytes"],
        }
        for part, result in parts.items()
        for name, case in result["cases"].items()
        if case.get("predicted_bytes") and case.get("planned_peak_bytes")
    }


def figures(report: dict) -> Iterator[tuple[tuple[str, str, str], float]]:
    """Every figure of a result that has a better direction, by part, case and key."""
    for part, result in report["parts"].items():
        for name, case in result["cases"].items():
            for key, value in case.items():
                directed = key in HIGHER_IS_BETTER or key.endswith(LOWER_IS_BETTER)
                if directed and isinstance(value, (int, float)) and value > 0:
                    yield (part, name, key), value


def compare(old: dict, new: dict) -> list[str]:
    """Name every figure of `new` that is worse than in `old` by more than 5%, or is gone.

    Parts that did not run the second time are left out.
    """
    after, problems = dict(figures(new)), []
    for where, before in figures(old):
        part, name, key = where
        if part not in new["parts"]:
            continue
        label = f"{part}: {name}: {key}"
        if where not in after:
            case = new["parts"][part]["cases"].get(name, new["parts"][part])
            reason = str(case.get("error", "not measured")).strip().splitlines()[-1]
            problems.append(f"{label} was {before:,.6g} and is missing: {reason}")
            continue
        now = after[where]
        if (before / now if key in HIGHER_IS_BETTER else now / before) > WORSE:
            problems.append(
                f"{label} was {before:,.6g} and is {now:,.6g} ({now / before - 1:+.1%})"
            )
    return problems


def gpu() -> dict | None:
    """Name, memory and driver of the first GPU; None without one."""
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        ran = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        values = ran.stdout.splitlines()[0].split(",")
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    return dict(zip(("name", "memory", "driver"), map(str.strip, values), strict=True))


def commit() -> str | None:
    """The commit that is measured, marked where files were changed since."""
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return ran.stdout.strip() or None


def install(wheels: Path, site: Path) -> None:
    """Install the wheels of a folder where this program and all that it starts will find them."""
    if not site.is_dir():
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files:
            sys.exit(f"no *.whl in {wheels}: fill it as `python bench/gpu.py --help` says")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", str(site), *files], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(site), os.environ.get("PYTHONPATH")])
    )
    sys.path.insert(0, str(site))  # the versions of the result are read here


def measure(args: argparse.Namespace, work: Path) -> int:
    """Run the parts and write the result after each; the number of parts that failed."""
    device = gpu()
    if device is None and not args.dry_run:
        sys.exit("no GPU here; --dry-run tries every part with a tiny model on the CPU")
    if args.wheels:
        install(args.wheels.resolve(), work / "site")
    setting = work / "setting.json"
    setting.write_text(json.dumps({"dry": args.dry_run, "work": str(work)}))
    report: dict = {
        "command": " ".join(["python", *sys.argv]),
        "commit": args.commit or commit(),
        "dry_run": args.dry_run,
        "gpu": device,
        "machine": machine(),
        "model": "gptj_tiny" if args.dry_run else "gptj_6b",
        "parts": {},
    }
    parts = report["parts"]
    wanted = [name for name in LIMITS if name in args.part]
    if set(wanted) & set(NEEDS_MODEL) and not (work / "model/config.json").is_file():
        wanted = [name for name in LIMITS if name in wanted or name == "model"]
    ends = time.perf_counter() + args.budget
    for name in wanted:
        left = ends - time.perf_counter()
        if left < 5:
            parts[name] = {"wall_seconds": 0.0, "error": "no time was left", "cases": {}}
        else:
            parts[name] = run_part(name, setting, work, min(LIMITS[name], left))
        print(f"{name}, {parts[name]['wall_seconds']} s", flush=True)
        for case, values in parts[name]["cases"].items():
            print(f"  {case}: {json.dumps(values)}", flush=True)
        if "error" in parts[name]:
            print(f"  failed: {parts[name]['error']}", flush=True)
        report |= {"targets": targets(parts), "planner": predictions(parts)}
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["targets"]:
        print(f"{row['name']}: {row['measured']} (target {row['target']})")
    failed = [part for part in parts.values() if "error" in part]
    if args.dry_run:  # everything fits there: a case that fails is a mistake
        failed += [
            case for part in parts.values() for case in part["cases"].values() if "error" in case
        ]
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=list(LIMITS), choices=LIMITS)
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--work", type=Path, help="keep the wheels, model and logs in this folder")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    args = parser.parse_args()
    if args.compare:
        problems = compare(*(json.loads(file.read_text()) for file in args.compare))
        print("\n".join(problems) or "nothing got worse by more than 5%")
        return int(bool(problems))
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        return int(measure(args, args.work.resolve()) > 0)
    work = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    try:
        return int(measure(args, work) > 0)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
