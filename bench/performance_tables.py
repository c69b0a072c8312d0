"""The tables of docs/performance.md from the results of the benchmarks, between its markers.

python bench/performance_tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs/performance.md", ROOT / "bench/results"


def peers() -> str:
    found = json.loads((RESULTS / "peers.json").read_text())
    lines = [
        "| work | this project | peer | tokens/s against it | peak memory against it | working memory against it "
        "| step / matrix products |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in found["results"]:
        mine = result["programs"]["ours"]
        for name, ratio in result["ours_against"].items():
            other = result["programs"][name]
            lines.append(
                f"| {result['case']['name']} | {mine['tokens_per_second']:.0f} tok/s, {mine['peak_host_bytes'] / 1e9:.2f} GB "
                f"| {'Trainer' if name == 'trainer' else 'TRL'} {other['tokens_per_second']:.0f} tok/s, "
                f"{other['peak_host_bytes'] / 1e9:.2f} GB | {ratio['tokens_per_second']:.2f} x "
                f"| {ratio['peak_host_bytes']:.2f} x | {ratio['working_bytes']:.2f} x | {result['step_over_matmul']:.2f} |"
            )
    return "\n".join([*lines, "", _origin(found)])


def beside(name: str, what: str, cell: Callable[[dict], str]) -> str:
    """A line for each case, a cell each for this project and the Trainer."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [f"| {what} | this project | Trainer + DeepSpeed |", "|---|--:|--:|"]
    lines += [
        f"| {r['case']['name']} | {cell(r['ours'])} | {cell(r['trainer'])} |"
        for r in found["results"]
    ]
    return "\n".join([*lines, "", _origin(found)])


def speed_and_memory(run: dict) -> str:
    return f"{run['tokens_per_second']:.0f} tok/s, working {(run['peak_host_bytes'] - run['start_host_bytes']) / 1e9:.2f} GB"


def seconds(run: dict) -> str:
    return f"{run['seconds']:.1f} s ({min(run['rounds']):.1f} to {max(run['rounds']):.1f})"


def generation() -> str:
    found = json.loads((RESULTS / "generate.json").read_text())
    ways = {
        "merged": "export, merged",
        "transformers": "the same by transformers",
        "adapter": "adapter on its base",
        "peft": "the same by peft",
        "no_cache": "training forward, no cache",
    }
    lines = [
        "| prompts | " + " | ".join(ways.values()) + " | same text |",
        "|---|" + "--:|" * (len(ways) + 1),
    ]
    for row in found["rows"]:
        speeds = [f"{row['tokens_per_second'][way]:.1f} tok/s" for way in ways]
        lines.append(
            f"| {row['batch']} (of {row['prompt_tokens']} tokens in all), {row['new_tokens']} new tokens | "
            + " | ".join(speeds)
            + f" | {'yes' if all(row['same_text'].values()) else 'no'} |"
        )
    if "peak_bytes" in found:
        peaks = [
            f"{(found['peak_bytes'][way]['peak'] - found['peak_bytes'][way]['before']) / 1e9:.2f} GB"
            for way in ways
        ]
        lines.append("| 8, peak memory above the libraries | " + " | ".join(peaks) + " | |")
    return "\n".join([*lines, "", _origin(found)])


def preparation() -> str:
    found = json.loads((RESULTS / "data_prep.json").read_text())
    lines = ["| program | tokens/s | tokens per CPU second |", "|---|--:|--:|"]
    for name, result in found["results"].items():
        lines.append(
            f"| {name} | {result['tokens_per_second']:,} | {result['tokens_per_cpu_second']:,} |"
        )
    return "\n".join([*lines, "", _origin(found)])


GIB = 2**30
BEFORE = (
    "measured on 2026-11-26 at commit 0534a1a, before these changes: one H200, torch 2.11.0+cu130, "
    "transformers 5.17.0 (eager attention), deepspeed 0.19.8, peft 0.21.2"
)
GPU_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("LoRA, micro 1, nothing recomputed", "10,942 tok/s, 18.3 GiB", "lora", "micro 1, nothing recomputed"),
    ("LoRA, micro 4, nothing recomputed", "15,587 tok/s, 37.1 GiB", "lora", "micro 4, nothing recomputed"),
    ("LoRA, micro 8, nothing recomputed", "17,184 tok/s, 62.2 GiB", "lora", "micro 8, nothing recomputed"),
    ("LoRA, micro 8, selective", "16,783 tok/s, 48.6 GiB", "lora", "micro 8, selective"),
    ("LoRA, micro 8, whole blocks", "12,245 tok/s, 18.6 GiB", "lora", "micro 8, whole blocks"),
    ("LoRA, micro 16, whole blocks", "12,359 tok/s, 25.2 GiB", "lora", "micro 16, whole blocks"),
    ("Trainer + DeepSpeed, micro 1 (before: rank 8 on q, v)", "8,194 tok/s, 33.2 GiB", "trainer", "micro 1, nothing recomputed"),
    ("the same, micro 2", "", "trainer", "micro 2, nothing recomputed"),
    ("the same, micro 4 (before: whole blocks)", "6,751 tok/s, 22.1 GiB", "trainer", "micro 4, nothing recomputed"),
    ("the same, micro 8, whole blocks", "6,814 tok/s, 32.7 GiB", "trainer", "micro 8, whole blocks"),
    ("products of the blocks alone, 2048 tokens", "34,041 tok/s", "products", "2048 tokens"),
    ("the same, 8192 tokens", "31,915 tok/s", "products", "8192 tokens"),
    ("the same, 16384 tokens", "29,497 tok/s", "products", "16384 tokens"),
    ("full, stage 1, optimizer on the host, micro 8", "9,341 tok/s, 66.7 GiB", "full", "stage 1, micro 8, whole blocks"),
    ("generation, batch 1", "56 tok/s", "generate", "ours, batch 1"),
    ("the same, engine=compiled", "", "generate", "ours, compiled, batch 1"),
    ("the same by transformers", "27 tok/s", "generate", "transformers, batch 1"),
    ("generation, batch 32", "1,448 tok/s", "generate", "ours, batch 32"),
    ("the same, engine=compiled", "", "generate", "ours, compiled, batch 32"),
    ("the same by transformers", "712 tok/s", "generate", "transformers, batch 32"),
)  # fmt: skip
"""Row, what the earlier build reached, and where `bench/gpu.py` keeps the figure of this one."""


def gpu() -> str:
    """The earlier build's figures beside this one's, which stay empty until they are measured."""
    file = RESULTS / "gpu.json"
    report = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    lines = [
        "| GPT-J-6B, bf16, sequences of 2048 | before | this build | peak, predicted |",
        "|---|--:|--:|--:|",
    ]
    for name, before, part, case in GPU_ROWS:
        figures = report["parts"].get(part, {}).get("cases", {}).get(case, {})
        speed = (
            f"{figures['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in figures else ""
        )
        peak, predicted = (
            f"{figures[key] / GIB:.1f} GiB" if figures.get(key) else ""
            for key in ("peak_gpu_bytes", "predicted_bytes")
        )
        lines.append(
            f"| {name} | {before} | {', '.join(filter(None, [speed, peak]))} | {predicted} |"
        )
    lines += ["", f"Before: {BEFORE}."]
    if report["parts"]:
        device = report["gpu"]
        lines.append(
            f"This build: {device['name']}, driver {device['driver']}, commit {report['commit']}, {_origin(report)}"
        )
    else:
        lines.append(
            "This build: not measured yet; `python bench/gpu.py` measures it in 8 minutes."
        )
    return "\n".join(lines)


def _origin(found: dict) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    processor = f"{machine['cpu']}, {machine['cores']} cores"
    if "instructions" in machine:  # results before it was recorded lack it
        processor += f" ({machine['instructions']})"
    return f"`{found['command']}`, {machine['date']}, {processor}, {versions}."


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (
        ("peers", peers),
        ("scaling", partial(beside, "scaling", "step", speed_and_memory)),
        ("startup", partial(beside, "startup", "from the command to the end of step 1", seconds)),
        ("generate", generation),
        ("data_prep", preparation),
    ):
        if (RESULTS / f"{name}.json").is_file():
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
            text = re.sub(pattern, lambda m, t=table: m[1] + t() + "\n" + m[2], text, flags=re.S)
    text = re.sub(
        r"(<!-- gpu -->\n).*?(<!-- end gpu -->)",
        lambda m: m[1] + gpu() + "\n" + m[2],
        text,
        flags=re.S,
    )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
