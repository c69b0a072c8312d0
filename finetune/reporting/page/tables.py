"""Tables and tiles of the report page as plain text, from `RunFiles`; the template escapes HTML."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from finetune.config import METRICS, Config, direction_of, plain_config
from finetune.errors import clock, command, figure, gib, large, plural, setting
from finetune.reporting.metrics_log import is_number
from finetune.reporting.page.curves import (
    chosen_option,
    predicted,
    ranks_per_node,
    suite_names,
)
from finetune.reporting.page.files import RunFiles
from finetune.reporting.terminal_text import (
    EVAL_METRICS,
    averaged_loss,
    evaluate_command,
    generate_command,
    status_text,
    train_command,
)

PARTS = ("process", "weights", "gradients", "optimizer", "activations", "logits", "workspace")
"""Parts of a prediction, by the number of their colour."""
NOT_SETTINGS = ("run_dir", "name")
ABSENT = "-"
ANSWERS = 10
"""Generated answers of one evaluation that the page shows."""
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
    result, evals = run.result, run.evals
    step = max(run.last("step") or 0, result.get("step") or 0)
    total = run.env.get("total_steps") or (run.config.get("train") or {}).get("steps")
    shown = [Tile("steps", f"{step:,}", f"of {total:,}" if is_number(total) else "")]
    if averaged := averaged_loss(run.train):
        shown.append(Tile("training loss", figure(averaged[0]), averaged[1]))
    metric = criterion([run])
    best = best_of([record.get(metric) for record in evals], metric)
    if best is not None:
        first, note = evals[0].get(metric), f"step {evals[best]['step']:,}"
        note += f", from {figure(first)}" if best and is_number(first) else ""
        name = "eval loss" if metric == "loss" else metric.replace("_", " ")
        shown.append(Tile(f"best {name}", figure(evals[best][metric]), note))
    speeds = sorted(filter(is_number, (r.get("tokens_per_second") for r in run.train)))
    speed = result.get("tokens_per_second") or (speeds[len(speeds) // 2] if speeds else None)
    if is_number(speed):
        shown.append(Tile("tokens per second", f"{speed:,.0f}", "all ranks"))
    tokens = result.get("tokens") or run.last("tokens")
    if is_number(tokens):
        note = f"in {clock(result['seconds'])}" if result.get("seconds") else "so far"
        shown.append(Tile("tokens", large(tokens), note))
    counts = run.plan.get("parameters") or {}
    total, trainable = counts.get("total"), counts.get("trainable")
    if is_number(total) and is_number(trainable) and total:
        note = f"{trainable / total:.2%} of {large(total)}"
        shown.append(Tile("trained parameters", large(trainable), note))
    stage, ranks = result.get("zero_stage"), result.get("world_size") or run.env.get("world_size")
    if stage is None:
        stage = (run.plan.get("chosen") or {}).get("zero")
    if stage is not None:
        note = plural(ranks, "rank") if ranks else ""
        shown.append(Tile("ZeRO", f"stage{str(stage).removeprefix('stage')}", note))
    expected = predicted(run)
    for name, key in (("host", "host_bytes"), ("GPU", "gpu_bytes")):
        if measured := run.peak(key):
            note = f"predicted {gib(expected[key])}" if expected.get(key) else "of a rank"
            shown.append(Tile(f"{name} memory, peak", gib(measured), note))
    return shown


def criterion(runs: list[RunFiles]) -> str:
    """Return the metric that ranks evaluations: train.metric or the task's own.

    It is read from the first run that states it.
    """
    named = [(run.config.get("train") or {}).get("metric") for run in runs]
    tasks = [run.config.get("task") or {} for run in runs]
    kinds = [str(task.get("problem") or task.get("kind")) for task in tasks]
    own = [next(iter(METRICS.get(kind, {})), None) for kind in kinds]
    measured = {
        name
        for run in runs
        for record in [*run.evals, run.result.get("eval") or {}]
        for name, value in record.items()
        if is_number(value)
    }
    names = [*named, *own, "accuracy", "f1", "exact_match"]
    return next((name for name in names if name in measured), "loss")


def best_of(values: list[Any], metric: str) -> int | None:
    """Return the index of a metric's best value, the first of equal ones; None if there is no number."""
    numbers = list(filter(is_number, values))
    better = max if direction_of(metric) == "max" else min
    return values.index(better(numbers)) if numbers else None


def evaluations(run: RunFiles) -> Table | None:
    """Return one row per evaluation, with the best one marked."""
    if not run.evals:
        return None
    names = [name for name in EVAL_METRICS if any(name in record for record in run.evals)]
    names += suite_names(run)
    rows = [
        [f"{record['step']:,}", *(figure(record.get(name)) for name in names)]
        for record in run.evals
    ]
    metric = criterion([run])
    best = best_of([record.get(metric) for record in run.evals], metric)
    heads = [name if "/" in name else name.replace("_", " ") for name in names]
    return Table(["step", *heads], rows, best)


def later(run: RunFiles) -> Table | None:
    """Return the results of launch/evaluate.py: the task's own metrics and lm-eval's tasks."""
    suite = run.later.get("lm_eval")
    tasks = suite.get("tasks") if isinstance(suite, dict) else None
    own = {name.replace("_", " "): value for name, value in run.later.items()}
    results = {str(run.later.get("data") or "evaluation"): own} if numbers_of(own) else {}
    for name, metrics in (tasks if isinstance(tasks, dict) else {}).items():
        if isinstance(metrics, dict):
            results[f"lm-eval: {name}"] = metrics
    rows = [
        [name, ", ".join(f"{key} {figure(value)}" for key, value in numbers_of(metrics).items())]
        for name, metrics in results.items()
    ]
    return Table(["evaluated on", "result"], rows) if rows else None


def numbers_of(values: Any) -> dict[str, float]:
    return {str(name): value for name, value in (values or {}).items() if is_number(value)}


def groups_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of an evaluation by set, subset or class; {} if it has none."""
    return record.get("sets") or record.get("subsets") or record.get("per_class") or {}


def groups(run: RunFiles) -> Table | None:
    """Return sets, subsets or classes at the last evaluation that has them.

    Each has the change of its loss since the first such evaluation.
    """
    grouped = [record for record in run.evals if groups_of(record)]
    if not grouped:
        return None
    first, last = groups_of(grouped[0]), groups_of(grouped[-1])
    rows_of = {str(name): row for name, row in last.items() if isinstance(row, dict)}
    names = list(dict.fromkeys(key for row in rows_of.values() for key in numbers_of(row)))
    kinds = {"sets": "set", "subsets": "subset"}
    head = [next((kind for key, kind in kinds.items() if grouped[-1].get(key)), "class")]
    head += [name.replace("_", " ") for name in names]
    rows = [[name, *(figure(row.get(key)) for key in names)] for name, row in rows_of.items()]
    if len(grouped) > 1 and "loss" in names:
        head.append("loss since first")
        for cells, (name, row) in zip(rows, rows_of.items(), strict=True):
            old, new = numbers_of(first.get(name)).get("loss"), numbers_of(row).get("loss")
            cells.append("-" if old is None or new is None else f"{new - old:+.4f}")
    return Table(head, rows, note=f"step {grouped[-1]['step']:,}")


def sources(run: RunFiles) -> Table | None:
    """Return what each source of a mixture has given to the training so far."""
    last = next((record for record in reversed(run.train) if record.get("sources")), {})
    given = {str(name): numbers_of(counts) for name, counts in (last.get("sources") or {}).items()}
    total = sum(counts.get("tokens", 0) for counts in given.values())
    rows = [
        [
            name,
            figure(counts.get("sequences")),
            figure(counts.get("tokens")),
            f"{counts.get('tokens', 0) / total:.1%}" if total else "-",
        ]
        for name, counts in given.items()
    ]
    head = ["source", "sequences", "tokens", "of all tokens"]
    return Table(head, rows, note=f"until step {last['step']:,}") if rows else None


def memory(run: RunFiles) -> Memory | None:
    """Compare predicted and measured bytes of one rank, with the parts of the prediction."""
    expected, option, ranks = predicted(run), chosen_option(run), ranks_per_node(run)
    rows = []
    for name, key in (("GPU", "gpu_bytes"), ("host", "host_bytes")):
        total, measured = expected.get(key), run.peak(key)
        if total or measured:
            share = f"{measured / total:.0%}" if measured and total else "-"
            sizes = [gib(size) if size else "-" for size in (total, measured)]
            rows.append([f"{name}, peak of a rank", *sizes, share])
    if not rows:
        return None
    note = f"host of a node divided by its {ranks} ranks" if ranks > 1 else ""
    table = Table(["", "predicted", "measured", "of predicted"], rows, note=note)

    device = numbers_of(option.get("parts"))
    host = {name: value / ranks for name, value in numbers_of(option.get("host_parts")).items()}
    # Without a GPU the tensors are in host memory.
    if "tensors" in host or not (host or "gpu_bytes" in expected):
        host.pop("tensors", None)
        host = {name: host.get(name, 0) + device.get(name, 0) for name in [*host, *device]}
    bars = []
    for name, key, parts in (("GPU", "gpu_bytes", device), ("host", "host_bytes", host)):
        total = expected.get(key)
        if not total or not parts:
            continue
        parts = {"process" if part == "processes" else part: value for part, value in parts.items()}
        if name == "host":
            # The rest, which the plan does not name, is the process itself.
            parts["process"] = parts.get("process", 0) + max(0, total - sum(parts.values()))
        shown = [
            Part(part, gib(value), value / total, PARTS.index(part) if part in PARTS else 0)
            for part, value in sorted(parts.items(), key=lambda item: -item[1])
            if value > 0
        ]
        bars.append(Bar(f"{name}, predicted {gib(total)}", shown))
    return Memory(table, bars)


def samples(run: RunFiles) -> list[dict[str, str]]:
    """Return the samples, newest first, and of the answers of each evaluation the first few."""
    shown, answers = [], Counter[int]()
    for record in run.samples:
        answers[record.get("step", 0)] += "reference" in record
        if "reference" in record and answers[record.get("step", 0)] > ANSWERS:
            continue
        shown.append(
            {
                "step": str(record.get("step", "?")),
                "prompt": str(record.get("prompt", "")),
                "text": str(record.get("text", "")),
                "reference": str(record.get("reference", "")),
            }
        )
    return shown[::-1]


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
    """Return the commands that usually follow this run."""
    kind = (run.config.get("adapter") or {}).get("kind", "full")
    kinds = ["full"] if kind == "full" else ["adapter"]
    # Prompts and prefixes are inputs, not weights, and cannot be merged.
    kinds += ["merged"] * (kind in ("lora", "ia3"))
    shown = []
    if run.result.get("status") != "done":
        words = [str(word) for word in run.env.get("overrides") or []]
        words = words or [f"recipe={run.config.get('name') or 'R'}"]
        shown.append(("continue", train_command(words, run.run_dir)))
    shown.append(("evaluate", evaluate_command(run.run_dir)))
    export = ["python", "launch/export.py", setting("run", run.run_dir)]
    shown += [(f"export {kind}", command([*export, f"kind={kind}"])) for kind in kinds]
    folder = run.run_dir / str(run.result.get("export") or "export")
    task = str((run.config.get("task") or {}).get("kind"))
    return [*shown, ("generate", generate_command(folder, task))]


def from_recipe(config: dict[str, Any], recipe_config: Config | None) -> Table | None:
    """Return the keys whose value differs from the recipe's; None if the recipe is not known here.

    Compares with the recipe as it is now. The page says so, since a recipe may change after a run.
    """
    if recipe_config is None:
        return None
    recipe, ours = dict(flat(plain_config(recipe_config))), dict(flat(config))
    # Keys that only the recipe has were added after the run.
    keys = [key for key in ours if key not in NOT_SETTINGS and recipe.get(key) != ours[key]]
    rows = [[key, recipe.get(key, ABSENT), ours[key]] for key in keys]
    return Table(["key", "recipe", "this run"], rows)


def between(names: list[str], settings: list[dict[str, Any]]) -> Table:
    """Return the keys that differ between several configs or environments; one column each."""
    columns = [dict(flat(values)) for values in settings]
    keys = dict.fromkeys(key for column in columns for key in column if key not in NOT_SETTINGS)
    rows = [[key, *(column.get(key, ABSENT) for column in columns)] for key in keys]
    return Table(["key", *names], [row for row in rows if len(set(row[1:])) > 1])


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
        if not isinstance(names, list) or not isinstance(counts, list):
            continue
        square = len(counts) == len(names) and all(
            isinstance(row, list) and len(row) == len(names) and all(map(is_number, row))
            for row in counts
        )
        if square and 0 < len(names) <= MOST_CLASSES:
            rows = []
            for i, (name, row) in enumerate(zip(names, counts, strict=True)):
                total = sum(row) or 1
                cells = [Cell(f"{n:,}", n / total, i == j) for j, n in enumerate(row)]
                rows.append((str(name), cells))
            return Confusion([str(name) for name in names], rows, record.get("step"))
    return None
