"""Format the records of a run, and the commands that usually follow it, as text; pure functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import clock, command, figure, gib, number, setting, who_stopped

EVAL_METRICS = (
    *("loss", "perplexity", "accuracy", "f1", "micro_f1", "exact_match", "mse", "pearson"),
    *("margin", "chosen_reward", "rejected_reward", "kl"),
    *("rouge1", "rouge2", "rougeL", "bleu", "chrf"),
)
SUITE_LINES = 12
"""Tasks of lm-eval that an evaluation shows in the terminal."""


def figures(record: dict[str, Any], seconds_left: float | None) -> list[str]:
    """Format the figures of a step that have a value: `loss 2.3456`, `lr 1.0e-04`, ..."""
    parts = [f"loss {figure(record.get('loss'))}", f"lr {number(record.get('lr'), '.1e')}"]
    for key, before, spec, after in (
        ("grad_norm", "grad ", ".2f", ""),
        ("accuracy", "accuracy ", ".2f", ""),
        ("margin", "margin ", ".3f", ""),
        ("tokens_per_second", "", ",.0f", " tok/s"),
        ("mfu", "MFU ", ".1%", ""),
    ):
        if record.get(key) is not None:
            parts.append(f"{before}{number(record[key], spec)}{after}")
    for name in ("host", "gpu"):
        if record.get(f"{name}_bytes"):
            parts.append(f"{name} {gib(record[f'{name}_bytes'])}")
    return [*parts, f"ETA {clock(seconds_left)}"]


def plain_line(record: dict[str, Any], total_steps: int, seconds_left: float | None) -> str:
    step = f"{record['step']:>{len(str(total_steps))}}/{total_steps}"
    return "  ".join([f"step {step}", *figures(record, seconds_left)])


def metrics_text(record: dict[str, Any]) -> str:
    """Format the metrics of an evaluation: `loss 2.1034  perplexity 8.19`."""
    metrics = [f"{name} {figure(record[name])}" for name in EVAL_METRICS if name in record]
    if isinstance(record.get("tokens"), int):
        metrics.append(f"{record['tokens']:,} tokens")
    return "  ".join(metrics) or "no metrics"


def evaluation_text(record: dict[str, Any]) -> str:
    """Format an evaluation, with one line per set, subset or class if there are any."""
    lines = [f"eval at step {record.get('step')}: {metrics_text(record)}"]
    groups = record.get("sets") or record.get("subsets") or record.get("per_class") or {}
    width = max((len(str(name)) for name in groups), default=0)
    for name, metrics in groups.items():
        if isinstance(metrics, dict):
            lines.append(f"  {name!s:<{width}}  {metrics_text(metrics)}")
    suite = list((record.get("lm_eval") or {}).items())
    for task, metrics in suite[:SUITE_LINES]:
        shown = [f"{name} {figure(value)}" for name, value in metrics.items()]
        lines.append(f"  {task}  {'  '.join(shown)}")
    if len(suite) > SUITE_LINES:
        lines.append(f"  and {len(suite) - SUITE_LINES} more of lm-eval's tasks: see metrics.jsonl")
    return "\n".join(lines)


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
    if len(losses) < 2:
        return (losses[0][1], f"step {losses[0][0]}") if losses else None
    mean = sum(loss for _, loss in losses) / len(losses)
    logged = "" if losses[-1][0] - losses[0][0] == len(losses) - 1 else "logged "
    return mean, f"last {len(losses)} {logged}steps averaged"


def result_text(result: dict[str, Any]) -> str:
    """Describe the end of a run: status, tokens, time.

    The error is left out, as the program prints it once, at the very end.
    """
    parts = [f"{status_text(result)} at step {result.get('step', 0)}"]
    if result.get("tokens"):
        parts.append(f"{number(result['tokens'])} tokens in {clock(result.get('seconds'))}")
    if result.get("tokens_per_second"):
        parts.append(f"{number(result['tokens_per_second'])} tok/s")
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
        value = f"{result.get('best_metric', 'metric')} {figure(result.get('best'))}"
        exported = ", which is exported" if result.get("export_step") == best else ""
        lines.append(("best", f"{value} at step {best}{exported}"))
    lines.append(("page", str(run_dir / "report.html")))
    if result.get("export"):
        export = run_dir / str(result["export"])
        lines += [("export", str(export)), ("try it", generate_command(export, task))]
    return "\n".join(f"  {name:<10}  {text}" for name, text in lines)


def train_command(words: list[str], run_dir: Any = None, launcher: str = "deepspeed") -> str:
    """Return the command of a run.

    `words` are as typed; `run_dir` is added if the run is to continue there.
    """
    if run_dir is not None:
        words = [word for word in words if not str(word).lstrip("+").startswith("run_dir=")]
        words.append(setting("run_dir", run_dir))
    return command([*launcher.split(), "launch/train.py", *words])


def evaluate_command(run_dir: Any) -> str:
    return command(["deepspeed", "launch/evaluate.py", setting("run", run_dir)])


def generate_command(export: Path, task: str) -> str:
    """Return the command that generates with an export, with the settings that its task takes."""
    words = {"qa": 'question="..." context="..."', "instruct": 'chat=true prompt="..."'}
    words |= {"preference": words["instruct"], "reward": "prompts=ANSWERS.jsonl"}
    program = command(["python", "launch/generate.py", setting("model", export)])
    return program + " " + words.get(task, 'prompt="..."')
