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


def _origin(found: dict) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"`{found['command']}`, {machine['date']}, {machine['cpu']}, {machine['cores']} cores, {versions}."


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
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
