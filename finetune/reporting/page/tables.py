"""Tables and tiles of the report page as plain text, from `RunFiles`; the template escapes HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.config import DIRECTIONS, METRICS
from finetune.errors import command, gib, setting
from finetune.reporting.page.charts import is_number
from finetune.reporting.page.curves import chosen_option, predicted, ranks_per_node
from finetune.reporting.page.files import RunFiles
from finetune.reporting.terminal_text import (
    EVAL_METRICS,
    averaged_loss,
    clock,
    figure,
    generate_command,
    status_text,
    train_command,
)

PARTS = ("process", "weights", "gradients", "optimizer", "activations", "logits", "workspace")
"""Parts of a prediction, by the number of their colour."""
Rows = list[tuple[str, str]]


@dataclass
class Tile:
    name: str
    value: str
    note: str = ""


@dataclass
class Table:
    head: list[str]
    rows: list[list[str]]
    best: int | None = None
    """Row that is marked."""
    note: str = ""


@dataclass
class Part:
    name: str
    text: str
    share: float
    """Of the whole prediction, 0 to 1."""
    color: int
    """0 to 6: the page's palette, 0 grey."""


@dataclass
class Bar:
    name: str
    """host or GPU, and the prediction that the parts add up to."""
    parts: list[Part]


@dataclass
class Memory:
    table: Table
    bars: list[Bar]


def run_name(run: RunFiles) -> str:
    return f"{run.config.get('name') or 'run'} / {run.run_dir.name}"


def status(run: RunFiles) -> str:
    """Return `done`, `preempted` or `failed`; `running` before there is a result."""
    return str(run.result.get("status") or "running")


def status_words(run: RunFiles) -> str:
    """Return the status in words, e.g. `stopped by you (Ctrl-C)`."""
    return status_text(run.result) if run.result else "running"


def tiles(run: RunFiles) -> list[Tile]:
    """Return the figures at the top of the page, without those that the run does not have yet."""
    found = [
        _progress(run),
        _loss(run),
        _best(run),
        _throughput(run),
        _time(run),
        _trainable(run),
        _sharding(run),
        _peak(run, "host", "peak_host_bytes", "host_bytes"),
        _peak(run, "GPU", "peak_gpu_bytes", "gpu_bytes"),
    ]
    return [tile for tile in found if tile is not None]


def large(value: float) -> str:
    """Format a large number: `1.24 M`, `38.2 k`, `512`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def evaluations(run: RunFiles) -> Table | None:
    """Return one row per evaluation, with the best one marked."""
    if not run.evals:
        return None
    names = [name for name in EVAL_METRICS if any(name in record for record in run.evals)]
    rows = [
        [f"{record['step']:,}", *(figure(record.get(name)) for name in names)]
        for record in run.evals
    ]
    return Table(["step", *(name.replace("_", " ") for name in names)], rows, _best_index(run))


def later(run: RunFiles) -> Table | None:
    """Return the results of launch/evaluate.py: the task's own metrics and lm-eval's tasks."""
    own = [
        (name.replace("_", " "), figure(value))
        for name, value in run.later.items()
        if is_number(value)
    ]
    rows = (
        [
            [
                str(run.later.get("data") or "evaluation"),
                ", ".join(f"{name} {value}" for name, value in own),
            ]
        ]
        if own
        else []
    )
    suite = run.later.get("lm_eval")
    tasks = suite.get("tasks") if isinstance(suite, dict) else None
    for name, found in (tasks if isinstance(tasks, dict) else {}).items():
        if isinstance(found, dict):
            rows.append(
                [
                    f"lm-eval: {name}",
                    ", ".join(f"{k} {figure(v)}" for k, v in found.items() if is_number(v)),
                ]
            )
    return Table(["evaluated on", "result"], rows) if rows else None


def groups(run: RunFiles) -> Table | None:
    """Return subsets or classes at the last evaluation that has them.

    Each has the change of its loss since the first such evaluation.
    """
    with_groups = [
        record for record in run.evals if record.get("subsets") or record.get("per_class")
    ]
    if not with_groups:
        return None
    first, last = (
        record.get("subsets") or record["per_class"] for record in (with_groups[0], with_groups[-1])
    )
    rows_of = {str(name): row for name, row in last.items() if isinstance(row, dict)}
    names = list(dict.fromkeys(key for row in rows_of.values() for key in row))
    changed = len(with_groups) > 1 and "loss" in names
    rows = [
        [
            name,
            *(figure(row.get(key)) for key in names),
            *([_change(first.get(name), row)] if changed else []),
        ]
        for name, row in rows_of.items()
    ]
    head = [
        "subset" if with_groups[-1].get("subsets") else "class",
        *(name.replace("_", " ") for name in names),
    ]
    return Table(
        [*head, *(["loss since first"] if changed else [])],
        rows,
        note=f"step {with_groups[-1]['step']:,}",
    )


def memory(run: RunFiles) -> Memory | None:
    """Compare predicted and measured bytes of one rank, with the parts of the prediction."""
    expected = predicted(run)
    rows = []
    for name, key in (("GPU", "gpu_bytes"), ("host", "host_bytes")):
        measured = run.result.get(f"peak_{key}") or max(
            (r.get(key) or 0 for r in run.train), default=0
        )
        if expected.get(key) or measured:
            rows.append(
                [
                    f"{name}, peak of a rank",
                    _bytes(expected.get(key)),
                    _bytes(measured),
                    _ratio(measured, expected.get(key)),
                ]
            )
    note = (
        f"host of a node divided by its {ranks_per_node(run)} ranks"
        if ranks_per_node(run) > 1
        else ""
    )
    table = Table(["", "predicted", "measured", "of predicted"], rows, note=note)
    return Memory(table, _bars(run, expected)) if rows else None


def _bars(run: RunFiles, expected: dict[str, float]) -> list[Bar]:
    """Return the parts of each prediction in bytes of one rank.

    The rest, which the plan does not name, is the process itself.
    """
    option, ranks = chosen_option(run), ranks_per_node(run)
    device = _numbers(option.get("parts"))
    host = {name: value / ranks for name, value in _numbers(option.get("host_parts")).items()}
    if "tensors" in host or not (
        host or "gpu_bytes" in expected
    ):  # without a GPU the tensors are in host memory
        host.pop("tensors", None)
        host = {name: host.get(name, 0) + device.get(name, 0) for name in [*host, *device]}
    found = []
    for name, key, parts in (("GPU", "gpu_bytes", device), ("host", "host_bytes", host)):
        total = expected.get(key)
        if not total or not parts:
            continue
        parts = {"process" if part == "processes" else part: value for part, value in parts.items()}
        if name == "host":
            parts["process"] = parts.get("process", 0) + max(0, total - sum(parts.values()))
        largest = sorted((item for item in parts.items() if item[1] > 0), key=lambda item: -item[1])
        found.append(
            Bar(
                f"{name}, predicted {gib(total)}",
                [
                    Part(part, gib(value), value / total, PARTS.index(part) if part in PARTS else 0)
                    for part, value in largest
                ],
            )
        )
    return found


def _numbers(values: Any) -> dict[str, float]:
    return {str(name): value for name, value in (values or {}).items() if is_number(value)}


def samples(run: RunFiles) -> list[dict[str, str]]:
    """Return the samples, newest first."""
    return [
        {
            "step": str(record.get("step", "?")),
            "prompt": str(record.get("prompt", "")),
            "text": str(record.get("text", "")),
        }
        for record in reversed(run.samples)
    ]


def config_rows(run: RunFiles) -> Rows:
    return flat(run.config)


def flat(value: Any, prefix: str = "") -> Rows:
    """Flatten nested values to dotted keys."""
    if not isinstance(value, dict):
        return [(prefix, "null" if value is None else str(value))]
    return [
        row
        for key, item in value.items()
        for row in flat(item, f"{prefix}.{key}" if prefix else str(key))
    ]


def environment_rows(run: RunFiles) -> Rows:
    """Return the environment as rows, each list on one line, without empty values."""
    shown = {
        key: " ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in run.env.items()
    }
    return flat({key: value for key, value in shown.items() if value not in ("", None)})


def commands(run: RunFiles) -> Rows:
    """Return the commands that usually follow this run, ready to paste."""
    place = setting("run", run.run_dir)
    adapter = run.config.get("adapter") or {}
    kinds = ["full"] if adapter.get("kind", "full") == "full" else ["adapter"]
    # Prompts and prefixes are inputs, not weights, and cannot be merged.
    kinds += ["merged"] * (adapter.get("kind") in ("lora", "ia3"))
    export = run.run_dir / str(run.result.get("export") or "export")
    found = [] if run.result.get("status") == "done" else [("continue", _again(run))]
    found.append(("evaluate", command(["deepspeed", "launch/evaluate.py", place])))
    found += [
        (f"export {kind}", command(["python", "launch/export.py", place, f"kind={kind}"]))
        for kind in kinds
    ]
    return [
        *found,
        ("generate", generate_command(export, str((run.config.get("task") or {}).get("kind")))),
    ]


def _again(run: RunFiles) -> str:
    words = [str(word) for word in run.env.get("overrides") or []] or [
        f"recipe={run.config.get('name') or 'R'}"
    ]
    return train_command(words, run.run_dir)


def _progress(run: RunFiles) -> Tile:
    step = run.train[-1]["step"] if run.train else 0
    step = max(step, run.result.get("step") or 0)
    total = run.env.get("total_steps") or (run.config.get("train") or {}).get("steps")
    return Tile("steps", f"{step:,}", f"of {total:,}" if is_number(total) else "")


def _loss(run: RunFiles) -> Tile | None:
    averaged = averaged_loss(run.train)
    return Tile("training loss", figure(averaged[0]), averaged[1]) if averaged else None


def _best(run: RunFiles) -> Tile | None:
    index = _best_index(run)
    if index is None:
        return None
    key, record = criterion([run]), run.evals[index]
    first = run.evals[0].get(key)
    note = f"step {record['step']:,}" + (
        f", from {figure(first)}" if index and is_number(first) else ""
    )
    return Tile(
        f"best {key.replace('_', ' ')}" if key != "loss" else "best eval loss",
        figure(record[key]),
        note,
    )


def criterion(runs: list[RunFiles]) -> str:
    """Return the metric that ranks evaluations: train.metric or the task's own.

    It is read from the first run that states it.
    """
    named = [(run.config.get("train") or {}).get("metric") for run in runs]
    tasks = [run.config.get("task") or {} for run in runs]
    own = [
        next(iter(METRICS.get(str(task.get("problem") or task.get("kind")), {})), None)
        for task in tasks
    ]
    measured = {
        name
        for run in runs
        for record in [*run.evals, run.result.get("eval") or {}]
        for name, value in record.items()
        if is_number(value)
    }
    return next(
        (name for name in [*named, *own, "accuracy", "f1", "exact_match"] if name in measured),
        "loss",
    )


def _best_index(run: RunFiles) -> int | None:
    key = criterion([run])
    scored = [
        (record[key], index) for index, record in enumerate(run.evals) if is_number(record.get(key))
    ]
    if not scored:
        return None
    return (
        max(scored, key=lambda s: (s[0], -s[1])) if DIRECTIONS.get(key) == "max" else min(scored)
    )[1]


def _throughput(run: RunFiles) -> Tile | None:
    speeds = sorted(
        r["tokens_per_second"] for r in run.train if is_number(r.get("tokens_per_second"))
    )
    speed = run.result.get("tokens_per_second") or (speeds[len(speeds) // 2] if speeds else None)
    return Tile("tokens per second", f"{speed:,.0f}", "all ranks") if is_number(speed) else None


def _time(run: RunFiles) -> Tile | None:
    tokens = run.result.get("tokens") or (run.train[-1].get("tokens") if run.train else None)
    note = f"in {clock(run.result['seconds'])}" if run.result.get("seconds") else "so far"
    return Tile("tokens", large(tokens), note) if is_number(tokens) else None


def _trainable(run: RunFiles) -> Tile | None:
    counts = run.plan.get("parameters") or {}
    total, trainable = counts.get("total"), counts.get("trainable")
    if not is_number(total) or not is_number(trainable) or not total:
        return None
    return Tile(
        "trained parameters", large(trainable), f"{trainable / total:.2%} of {large(total)}"
    )


def _sharding(run: RunFiles) -> Tile | None:
    stage = run.result.get("zero_stage")
    if stage is None:
        stage = (run.plan.get("chosen") or {}).get("zero")
    ranks = run.result.get("world_size") or run.env.get("world_size")
    if stage is None:
        return None
    name = str(stage) if str(stage).startswith("stage") else f"stage{stage}"
    return Tile("ZeRO", name, f"{ranks} rank{'s' if ranks != 1 else ''}" if ranks else "")


def _peak(run: RunFiles, name: str, peak: str, current: str) -> Tile | None:
    measured = run.result.get(peak) or max((r.get(current) or 0 for r in run.train), default=0)
    expected = predicted(run).get(current)
    note = f"predicted {gib(expected)}" if expected else "of a rank"
    return Tile(f"{name} memory, peak", gib(measured), note) if measured else None


def _bytes(value: float | None) -> str:
    return gib(value) if value else "-"


def _ratio(measured: float | None, expected: float | None) -> str:
    return f"{measured / expected:.0%}" if measured and expected else "-"


def _change(before: Any, now: dict[str, Any]) -> str:
    old, new = before.get("loss") if isinstance(before, dict) else None, now.get("loss")
    return f"{new - old:+.4f}" if is_number(old) and is_number(new) else "-"


# The confusion matrix of the last evaluation that has one, as a shaded grid.
MOST_CLASSES = 40
"""More than these are no picture; metrics.jsonl still has them."""


@dataclass
class Cell:
    text: str
    share: float
    """Of the examples of its row's class, 0 to 1."""
    right: bool


@dataclass
class Confusion:
    names: list[str]
    rows: list[tuple[str, list[Cell]]]
    """True class, and how often its examples were taken for each class."""
    step: int | None
    """None: found by launch/evaluate.py, afterwards."""


def confusion(run: RunFiles) -> Confusion | None:
    """Return the last confusion matrix; None if no evaluation has one that can be drawn."""
    for record in [*reversed(run.evals), run.later]:
        names, counts = record.get("labels"), record.get("confusion")
        if _drawable(names, counts):
            rows = [
                (str(name), [_cell(n, sum(row), i == j) for j, n in enumerate(row)])
                for i, (name, row) in enumerate(zip(names, counts, strict=True))
            ]
            return Confusion([str(name) for name in names], rows, record.get("step"))
    return None


def _cell(count: int, total: int, right: bool) -> Cell:
    return Cell(f"{count:,}", count / total if total else 0.0, right)


def _drawable(names: Any, counts: Any) -> bool:
    if (
        not isinstance(names, list)
        or not isinstance(counts, list)
        or not 0 < len(names) <= MOST_CLASSES
    ):
        return False
    return len(counts) == len(names) and all(
        isinstance(row, list) and len(row) == len(names) and all(map(is_number, row))
        for row in counts
    )
