"""The words of the display: records turned into lines. Pure functions, no terminal, no state."""

from __future__ import annotations

import math
import shlex
from typing import Any

from finetune.errors import gib

EVAL_METRICS = ("loss", "perplexity", "accuracy", "f1", "micro_f1", "exact_match", "mse", "pearson")


def number(value: Any, spec: str) -> str:
    """`value` in `spec`, "-" where there is none; NaN and infinities are shown, never hidden."""
    return format(value, spec) if isinstance(value, (int, float)) else "-"


def count(value: float) -> str:
    return f"{value:,.0f}"


def clock(seconds: float | None) -> str:
    """`0:12`, `1:02:03`, `2d 01:02`; "-" when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def figures(record: dict[str, Any], seconds_left: float | None) -> list[str]:
    """The figures of a step, those that have no value left out: `loss 2.3456`, `lr 1.0e-04`, ..."""
    parts = [f"loss {number(record.get('loss'), '.4f')}", f"lr {number(record.get('lr'), '.1e')}"]
    if record.get("grad_norm") is not None:
        parts.append(f"grad {number(record['grad_norm'], '.2f')}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{number(record['tokens_per_second'], ',.0f')} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {number(record['mfu'], '.1%')}")
    parts += [f"{name} {gib(record[key])}" for name, key in (("host", "host_bytes"), ("gpu", "gpu_bytes"))
              if record.get(key)]
    return [*parts, f"ETA {clock(seconds_left)}"]


def plain_line(record: dict[str, Any], total_steps: int, seconds_left: float | None) -> str:
    step = f"{record['step']:>{len(str(total_steps))}}/{total_steps}"
    return "  ".join([f"step {step}", *figures(record, seconds_left)])


def evaluation_text(record: dict[str, Any]) -> str:
    """`eval at step 20: loss 2.1034  perplexity 8.19`, with a line per subset when there are some."""
    lines = [f"eval at step {record.get('step')}: {metrics_text(record)}"]
    subsets = record.get("subsets") or record.get("per_class") or {}
    width = max((len(str(name)) for name in subsets), default=0)
    lines += [f"  {name!s:<{width}}  {metrics_text(row)}" for name, row in subsets.items() if isinstance(row, dict)]
    return "\n".join(lines)


def metrics_text(record: dict[str, Any]) -> str:
    known = [f"{name} {number(record[name], '.4f')}" for name in EVAL_METRICS if name in record]
    known += [f"{count(record['tokens'])} tokens"] if isinstance(record.get("tokens"), int) else []
    return "  ".join(known) or "no metrics"


def train_command(words: list[str], run_dir: Any = None, launcher: str = "deepspeed") -> str:
    """The command of a run, to paste: `words` as they were typed, in `run_dir` where it is to go on there."""
    kept = [shlex.quote(str(word)) for word in words if run_dir is None or not str(word).startswith("run_dir=")]
    place = [] if run_dir is None else [f"run_dir={shlex.quote(str(run_dir))}"]
    return " ".join([f"{launcher} launch/train.py", *kept, *place])


def sample_text(step: int, prompt: str, text: str) -> str:
    body = "\n".join(f"  | {line}" for line in (text.strip() or "(empty)").splitlines())
    return f"sample at step {step}, prompt {prompt!r}:\n{body}"


def result_text(result: dict[str, Any]) -> str:
    """The last line of a run: status, loss, tokens, time. An error is told by the program, once and last."""
    head = f"{result.get('status', 'ended')} at step {result.get('step', 0)}"
    parts = [head, f"loss {number(result.get('loss'), '.4f')}"]
    if result.get("tokens"):
        parts.append(f"{count(result['tokens'])} tokens in {clock(result.get('seconds'))}")
    if result.get("tokens_per_second"):
        parts.append(f"{number(result['tokens_per_second'], ',.0f')} tok/s")
    return "  ".join(parts)
