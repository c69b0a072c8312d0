"""Format records as lines of text for the display, with pure functions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from finetune.errors import command, gib, setting, who_stopped

EVAL_METRICS = ("loss", "perplexity", "accuracy", "f1", "micro_f1", "exact_match", "mse", "pearson")


def number(value: Any, spec: str) -> str:
    """Format `value` with `spec`; "-" for None. NaN and infinities are shown, never hidden."""
    return format(value, spec) if isinstance(value, (int, float)) else "-"


def figure(value: Any) -> str:
    """Format a loss or metric, with the same digits everywhere.

    Five digits, at most four of them after the point, with thousands separators: `0.9312`,
    `7.1906`, `44.701`, `889.57`, `1,602.3`; `1.250e-04` below a thousandth; counts as integers; "-"
    for None.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.3e}"
    digits = 4 - math.floor(math.log10(abs(value))) if abs(value) >= 1 else 4
    return f"{value:,.{max(0, digits)}f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def clock(seconds: float | None) -> str:
    """Format a duration: `0:12`, `1:02:03`, `2d 01:02`; "-" if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def figures(record: dict[str, Any], seconds_left: float | None) -> list[str]:
    """Format the figures of a step that have a value: `loss 2.3456`, `lr 1.0e-04`, ..."""
    parts = [f"loss {figure(record.get('loss'))}", f"lr {number(record.get('lr'), '.1e')}"]
    if record.get("grad_norm") is not None:
        parts.append(f"grad {number(record['grad_norm'], '.2f')}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{number(record['tokens_per_second'], ',.0f')} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {number(record['mfu'], '.1%')}")
    parts += [
        f"{name} {gib(record[key])}"
        for name, key in (("host", "host_bytes"), ("gpu", "gpu_bytes"))
        if record.get(key)
    ]
    return [*parts, f"ETA {clock(seconds_left)}"]


def plain_line(record: dict[str, Any], total_steps: int, seconds_left: float | None) -> str:
    step = f"{record['step']:>{len(str(total_steps))}}/{total_steps}"
    return "  ".join([f"step {step}", *figures(record, seconds_left)])


def evaluation_text(record: dict[str, Any]) -> str:
    """Format an evaluation, with one line per subset if there are any.

    For example: `eval at step 20: loss 2.1034  perplexity 8.19`.
    """
    lines = [f"eval at step {record.get('step')}: {metrics_text(record)}"]
    subsets = record.get("subsets") or record.get("per_class") or {}
    width = max((len(str(name)) for name in subsets), default=0)
    lines += [
        f"  {name!s:<{width}}  {metrics_text(row)}"
        for name, row in subsets.items()
        if isinstance(row, dict)
    ]
    return "\n".join(lines)


def metrics_text(record: dict[str, Any]) -> str:
    known = [f"{name} {figure(record[name])}" for name in EVAL_METRICS if name in record]
    known += [f"{count(record['tokens'])} tokens"] if isinstance(record.get("tokens"), int) else []
    return "  ".join(known) or "no metrics"


def train_command(words: list[str], run_dir: Any = None, launcher: str = "deepspeed") -> str:
    """Return the command of a run, ready to paste.

    `words` are as typed; `run_dir` is added if the run is to continue there.
    """
    kept = [
        word
        for word in words
        if run_dir is None or not str(word).lstrip("+").startswith("run_dir=")
    ]
    place = [] if run_dir is None else [setting("run_dir", run_dir)]
    return f"{launcher} {command(['launch/train.py', *kept, *place])}"


def sample_text(step: int, prompt: str, text: str) -> str:
    body = "\n".join(f"  | {line}" for line in (text.strip() or "(empty)").splitlines())
    return f"sample at step {step}, prompt {prompt!r}:\n{body}"


def status_text(result: dict[str, Any]) -> str:
    """Describe how a run ended.

    One of `done`, `failed`, `stopped by you (Ctrl-C)`, `preempted (SIGTERM)`.
    """
    status, reason = str(result.get("status", "ended")), result.get("stopped_by")
    if status != "preempted" or not reason:
        return status
    who = who_stopped(str(reason))
    return f"stopped by {who}" if who != reason else f"preempted ({reason})"


def averaged_loss(records: list[dict[str, Any]]) -> tuple[float, str] | None:
    """Average the training loss over the last steps of `records`, because one step is noisy.

    Returns (mean, "last 12 steps averaged").
    """
    losses = [
        (record["step"], record["loss"])
        for record in records
        if record.get("kind", "train") == "train" and isinstance(record.get("loss"), (int, float))
    ]
    losses = losses[-min(50, max(5, len(losses) // 10)) :]
    if not losses:
        return None
    mean = sum(loss for _, loss in losses) / len(losses)
    logged = "" if losses[-1][0] - losses[0][0] == len(losses) - 1 else "logged "
    return mean, f"last {len(losses)} {logged}steps averaged" if len(
        losses
    ) > 1 else f"step {losses[0][0]}"


def result_text(result: dict[str, Any]) -> str:
    """Describe the end of a run: status, tokens, time.

    The error is left out, as the program prints it once, at the very end.
    """
    parts = [f"{status_text(result)} at step {result.get('step', 0)}"]
    if result.get("tokens"):
        parts.append(f"{count(result['tokens'])} tokens in {clock(result.get('seconds'))}")
    if result.get("tokens_per_second"):
        parts.append(f"{number(result['tokens_per_second'], ',.0f')} tok/s")
    return "  ".join(parts)


def outcome_text(
    result: dict[str, Any], records: list[dict[str, Any]], run_dir: Path, task: str
) -> str:
    """Return lines on a run's outcome and next steps: losses, best step, page and export.

    Args:
        records: the run's lines of metrics.jsonl.
        task: kind of task, which determines the command for using the export.
    """
    lines = []
    if trained := averaged_loss(records):
        lines.append(("training", f"loss {figure(trained[0])}, {trained[1]}"))
    if result.get("eval"):
        lines.append(("evaluation", metrics_text(result["eval"])))
    best = result.get("best_step")
    if best and best != result.get("step"):
        exported = ", which is exported" if result.get("export_step") == best else ""
        lines.append(
            (
                "best",
                f"{result.get('best_metric', 'metric')} {figure(result.get('best'))} at step {best}{exported}",
            )
        )
    lines.append(("page", str(run_dir / "report.html")))
    if result.get("export"):
        export = run_dir / str(result["export"])
        lines += [("export", str(export)), ("try it", generate_command(export, task))]
    return "\n".join(f"  {name:<10}  {text}" for name, text in lines)


def generate_command(export: Path, task: str) -> str:
    """Return the command that generates with an export, with the settings that its task takes."""
    words = {"qa": 'question="..." context="..."', "instruct": 'chat=true prompt="..."'}.get(
        task, 'prompt="..."'
    )
    return f"{command(['python', 'launch/generate.py', setting('model', export)])} {words}"
