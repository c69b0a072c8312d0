"""`--help`: recipes with a line each, groups, keys with defaults and units, examples. Reads conf/ as text."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from finetune import config
from finetune.cli import schemas
from finetune.errors import UserError


@dataclass
class Usage:
    purpose: str
    command: str
    examples: list[str]
    notes: list[str] = field(default_factory=list)


USAGE = {
    "train": Usage(
        "Fine-tune GPT-J with DeepSpeed.",
        "deepspeed [--num_gpus N] launch/train.py recipe=R [key=value ...]",
        [
            "deepspeed launch/train.py recipe=quickstart",
            "deepspeed --num_gpus 4 launch/train.py recipe=clm_pile data.train='pile/*.jsonl.zst' data.eval=val.jsonl.zst",
            "python launch/train.py -m recipe=quickstart optim.lr=1e-3,5e-3 adapter.rank=4,16",
        ],
        [
            "-m trains every combination of values given by commas, each as a run of its own (--help sweep).",
            "run_dir/ holds config.yaml, metrics.jsonl, report.html, checkpoints/ and export/.",
            "Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped after saving (run the same command again).",
        ],
    ),
    "plan": Usage(
        "Will it fit? Bytes by part for every way to shard; no GPU and no weights needed.",
        "python launch/plan.py recipe=R [key=value ...]",
        [
            "python launch/plan.py recipe=clm_pile machine=h100_80 machine.gpus=4",
            "python launch/plan.py recipe=clm_pile_lora machine.gpus=1 machine.gpu_gib=24 machine.host_gib=64",
            "python launch/plan.py recipe=clm_pile plan.format=json",
        ],
    ),
    "evaluate": Usage(
        "Metrics of a run or an export: a table, and eval.json.",
        "deepspeed launch/evaluate.py run=RUN | model=EXPORT task=T data.eval=FILE [key=value ...]",
        [
            "deepspeed launch/evaluate.py run=runs/quickstart/20260101-120000",
            "deepspeed launch/evaluate.py run=runs/quickstart/20260101-120000 data.eval=other.jsonl",
            "python launch/evaluate.py model=runs/q/1/export task=clm data.eval=val.jsonl.zst",
            "python launch/evaluate.py run=runs/q/1 suite=lm_eval tasks=lambada_openai,piqa",
        ],
    ),
    "export": Usage(
        "A run's adapter or model in Hugging Face layout, reopened and proven equal.",
        "python launch/export.py run=RUN kind=adapter|merged|full [out=DIR] [key=value ...]",
        [
            "python launch/export.py run=runs/quickstart/20260101-120000 kind=merged",
            "python launch/export.py run=runs/clm_pile/20260101-120000/checkpoints/step-00000500 kind=full out=model",
            "python launch/export.py run=runs/quickstart/20260101-120000 kind=merged dtype=fp16",
        ],
    ),
    "generate": Usage(
        "What an export, or any GPT-J checkpoint directory, says.",
        "python launch/generate.py model=EXPORT prompt=TEXT [key=value ...]",
        [
            "python launch/generate.py model=runs/q/1/export prompt='The patients were' temperature=0",
            "python launch/generate.py model=runs/q/1/export prompts=questions.jsonl out=answers.jsonl batch=16",
            "echo 'Once upon a time' | python launch/generate.py model=runs/q/1/export",
            "python launch/generate.py model=runs/i/1/export chat=true prompt='Name three colours.'",
            "python launch/generate.py model=runs/qa/1/export question='Who?' context='Ada wrote it.'",
        ],
    ),
    "serve": Usage(
        "OpenAI's completions interface around an export, and a page to type in.",
        "python launch/serve.py model=EXPORT [key=value ...]",
        [
            "python launch/serve.py model=runs/q/1/export",
            "python launch/serve.py model=runs/q/1/export port=8001 max_tokens=256",
            "python launch/serve.py model=runs/i/1/export host=0.0.0.0 port=8080",
        ],
        ["Any host but this machine's own needs a token in the environment variable SERVE_TOKEN."],
    ),
    "convert": Usage(
        "A checkpoint in another form: sharded safetensors, or mesh-transformer-jax's.",
        "python launch/convert.py source=DIR target=DIR [key=value ...]",
        [
            "python launch/convert.py source=gpt-j-6b target=gpt-j-6b-bf16 dtype=bf16",
            "python launch/convert.py source=step_383500 target=gpt-j-6b-jax config=6B_roto_256.json",
            "python launch/convert.py source=runs/p/1/export target=slim/step_10 to=jax",
        ],
    ),
    "doctor": Usage(
        "What of this machine is ready to train: green, yellow, red, each with a remedy.",
        "python launch/doctor.py [--json]",
        [
            "python launch/doctor.py",
            "python launch/doctor.py --json",
            "python launch/doctor.py json=true",
        ],
        ["Exit code 1 when something must be fixed before training."],
    ),
    "report": Usage(
        "The page of a run, or one page that compares runs.",
        "python launch/report.py run=RUN | 'runs=[RUN,RUN,...]' [out=FILE]",
        [
            "python launch/report.py run=runs/quickstart/20260101-120000",
            "python launch/report.py run=runs/quickstart/A run=runs/quickstart/B",
            "python launch/report.py 'runs=multirun/20260101-120000/*' out=compare.html",
        ],
    ),
}
TOP = (
    "run_dir",
    "resume",
    "data.train",
    "data.eval",
    "task.max_length",
    "train.steps",
    "train.epochs",
    "train.micro_batch",
    "train.global_batch",
    "optim.lr",
    "adapter.rank",
    "checkpoint.every",
)
GROUPS = {
    "recipe": "a complete experiment",
    "model": "which GPT-J",
    "task": "head and loss",
    "data": "what it is trained on",
    "adapter": "what is trained",
    "zero": "how it is sharded",
    "optim": "the optimizer",
    "tracker": "besides metrics.jsonl",
    "machine": "what is planned for",
    "sweep": "how -m finds its jobs",
    "debug": "any recipe in seconds",
}
WIDTH = 118


def help_text(name: str, conf: Path, recipes: Path, topics: list[str] | None = None) -> str:
    """The help of one program, or of one group or key of it.

    Raises:
        UserError: a topic is neither.
    """
    if topics:
        return "\n\n".join(_topic(name, topic, conf, recipes) for topic in topics)
    usage = USAGE[name]
    parts = [f"{usage.purpose}\n\nUsage: {usage.command}"]
    if name in ("train", "plan"):
        parts += [
            _recipes(recipes),
            _groups(conf),
            _keys("Keys used most:", [(key, *_find(key)) for key in TOP]),
        ]
    else:
        parts.append(_keys("Keys:", _program_keys(name)))
    parts.append("Examples:\n" + "\n".join(f"  {line}" for line in usage.examples))
    return "\n\n".join([*parts, "\n".join([*usage.notes, *_more(name)])])


def first_comment(path: Path) -> str:
    """First comment line of a yaml that says something to people (the `@package` line does not)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def field_docs(node: type) -> dict[str, str]:
    """Field -> the string literal beneath it in the source, of the class and what it inherits from."""
    sources = "".join(
        inspect.getsource(base) for base in reversed(node.__mro__) if is_dataclass(base)
    )
    found = re.findall(r'^    (\w+):[^\n]*\n    """(.*?)"""', sources, re.M | re.S)
    known = {f.name for f in fields(node)}
    return {name: " ".join(doc.split()) for name, doc in found if name in known}


def default_text(node: type, name: str) -> str:
    """A field's default as one would type it; "" where there is none."""
    found = next(f for f in fields(node) if f.name == name)
    value: Any = found.default if found.default is not MISSING else None
    if found.default_factory is not MISSING:
        value = found.default_factory()
    if value is None or value == "???" or is_dataclass(value) or value in ([], {}, ""):
        return ""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _recipes(folder: Path) -> str:
    lines = [f"  {path.stem:<16} {first_comment(path)}" for path in sorted(folder.glob("*.yaml"))]
    return "Recipes (recipe=...):\n" + "\n".join(lines)


def _groups(conf: Path) -> str:
    lines = []
    for name, purpose in GROUPS.items():
        options = sorted(p.stem for p in (conf / name).glob("*.yaml"))
        if options:
            lines.append(_wrapped(f"  {name + '=':<10} {purpose:<24}", ", ".join(options)))
    return "Groups (group=option):\n" + "\n".join(lines)


def _keys(title: str, rows: list[tuple[str, str, str]]) -> str:
    """Aligned (key, default, doc)."""
    wide = max(len(key) for key, _, _ in rows) + 1
    lines = [
        _wrapped(f"  {key:<{wide}} ", doc + (f" [{default}]" if default else ""))
        for key, default, doc in rows
    ]
    return "\n".join([title, *lines])


def _topic(name: str, topic: str, conf: Path, recipes: Path) -> str:
    """`--help adapter`, `--help optim.lr`, `--help clm_pile`."""
    folder = recipes if topic == "recipe" else conf / topic
    if name in ("train", "plan") and topic in GROUPS and folder.is_dir():
        return _group(topic, folder)
    if (recipes / f"{topic}.yaml").is_file():
        return (recipes / f"{topic}.yaml").read_text(encoding="utf-8").rstrip()
    try:
        return _keys(f"{topic}:", [(topic, *_find(topic))])
    except UserError:
        near = difflib.get_close_matches(
            topic, [*GROUPS, *(p.stem for p in recipes.glob("*.yaml")), *TOP], 1, 0.5
        )
        raise UserError(
            f"there is no help on '{topic}'",
            remedy=f"Did you mean --help {near[0]}?" if near else f"Groups: {', '.join(GROUPS)}.",
        ) from None


def _group(topic: str, folder: Path) -> str:
    options = sorted(folder.glob("*.yaml"))
    wide = max(len(path.stem) for path in options) + 1
    lines = [_wrapped(f"  {path.stem:<{wide}} ", first_comment(path)) for path in options]
    parts = [f"{topic}=: {GROUPS[topic]}\n" + "\n".join(lines)]
    for node in _nodes(topic):
        docs = field_docs(node)
        if docs:
            rows = [(f"{topic}.{key}", default_text(node, key), doc) for key, doc in docs.items()]
            parts.append(_keys(f"Keys of {node.__name__.removesuffix('Config').lower()}:", rows))
    return "\n\n".join(parts)


def _nodes(section: str) -> list[type]:
    """The schemas that may stand under a dotted section of the training config, by name."""
    nodes: list[type] = [config.Config]
    for part in section.split(".") if section else []:
        names = [str(f.type) for node in nodes for f in fields(node) if f.name == part]
        bases = [
            getattr(config, name) for name in names if is_dataclass(getattr(config, name, None))
        ]
        nodes = [kind for base in bases for kind in (base.__subclasses__() or [base])]
    return nodes


def _find(key: str) -> tuple[str, str]:
    """(default, doc) of a dotted key. Raises UserError."""
    section, _, leaf = key.rpartition(".")
    for node in _nodes(section):
        docs = field_docs(node)
        if leaf in docs:
            return default_text(node, leaf), docs[leaf]
    raise UserError("there is no such key", key)


def _program_keys(name: str) -> list[tuple[str, str, str]]:
    """Keys of a smaller program, sections by their keys, under the names that users type."""
    node, rows = schemas.SCHEMAS[name], []
    for key, doc in field_docs(node).items():
        typed = re.match(r"Typed as (\w+)=\w+: ", doc)
        name_of, told = (typed[1], doc.removeprefix(typed[0])) if typed else (key, doc)
        rows.append((name_of, default_text(node, key), told))
    if any(f.name == "data" for f in fields(node)):
        rows.append(("task", "", "clm, instruct, classify or qa; a run knows its own."))
        rows.append(("data.eval", "", field_docs(config.DataConfig)["train"]))
    return rows


def _more(name: str) -> list[str]:
    if name not in ("train", "plan"):
        return ["All settings with their values: add --cfg job."]
    return [
        "Texts are taken as typed, lists in brackets: 'run_dir=runs/a, b', task.labels='[C++,\"a, b\"]'.",
        "More: --help GROUP or --help KEY (--help adapter, --help optim.lr); --cfg job shows every value.",
        "Tab completion: source launch/completion.bash",
    ]


def _wrapped(head: str, text: str) -> str:
    """`text` beside `head`, its further lines below itself."""
    lines = textwrap.wrap(text, max(30, WIDTH - len(head))) or [""]
    return head + f"\n{' ' * len(head)}".join(lines)
