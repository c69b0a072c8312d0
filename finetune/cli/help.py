"""`--help`: recipes with a line each, groups, keys with defaults and units, examples."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, dataclass, field, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from finetune.cli.schemas import SCHEMAS
from finetune.compose import CONF, RECIPES
from finetune.config import Config, DataConfig, schema_keys
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
            "deepspeed --num_gpus 4 launch/train.py recipe=clm_pile data.train='pile/*.jsonl.zst' "
            "data.eval=val.jsonl.zst",
            "python launch/train.py -m recipe=quickstart optim.lr=1e-3,5e-3 adapter.rank=4,16",
        ],
        [
            "-m trains every combination of values given by commas, each as a run of its own "
            "(--help sweep).",
            "run_dir/ holds config.yaml, metrics.jsonl, report.html, checkpoints/ and export/.",
            "Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped after saving (run the same "
            "command again).",
        ],
    ),
    "plan": Usage(
        "Tell whether a run fits: bytes by part for every way to shard; needs no GPU and no "
        "weights.",
        "python launch/plan.py recipe=R [key=value ...]",
        [
            "python launch/plan.py recipe=clm_pile machine=h100_80 machine.gpus=4",
            "python launch/plan.py recipe=clm_pile_lora machine.gpus=1 machine.gpu_gib=24 "
            "machine.host_gib=64",
            "python launch/plan.py recipe=clm_pile plan.format=json",
        ],
    ),
    "evaluate": Usage(
        "Evaluate a run or an export: a table, and eval.json.",
        "deepspeed launch/evaluate.py run=RUN | model=EXPORT task=T data.eval=FILE [key=value ...]",
        [
            "deepspeed launch/evaluate.py run=runs/quickstart/20260101-120000",
            "deepspeed launch/evaluate.py run=runs/quickstart/20260101-120000 "
            "data.eval=other.jsonl",
            "python launch/evaluate.py model=runs/q/1/export task=clm data.eval=val.jsonl.zst",
            "python launch/evaluate.py run=runs/q/1 suite=lm_eval tasks=lambada_openai,piqa",
        ],
    ),
    "export": Usage(
        "Write a run's adapter or model in Hugging Face layout, or for another engine; reopen and "
        "prove it.",
        "python launch/export.py run=RUN kind=adapter|merged|full|phi|phi_adapter|gguf [key=value "
        "...]",
        [
            "python launch/export.py run=runs/quickstart/20260101-120000 kind=merged",
            "python launch/export.py run=runs/clm_pile/20260101-120000/checkpoints/step-00000500 "
            "kind=full out=model",
            "python launch/export.py run=runs/quickstart/20260101-120000 kind=merged dtype=fp16",
            "python launch/export.py run=runs/quickstart/20260101-120000 kind=gguf dtype=q8_0",
        ],
    ),
    "generate": Usage(
        "Generate text, labels or answers with an export or any GPT-J checkpoint directory.",
        "python launch/generate.py model=EXPORT prompt=TEXT [key=value ...]",
        [
            "python launch/generate.py model=runs/q/1/export prompt='The patients were' "
            "temperature=0",
            "python launch/generate.py model=runs/q/1/export prompts=questions.jsonl "
            "out=answers.jsonl batch=16",
            "echo 'Once upon a time' | python launch/generate.py model=runs/q/1/export",
            "python launch/generate.py model=runs/i/1/export chat=true prompt='Name three "
            "colours.'",
            "python launch/generate.py model=runs/qa/1/export question='Who?' context='Ada wrote "
            "it.'",
        ],
    ),
    "serve": Usage(
        "Serve an export behind OpenAI's completions interface, with a page to type in.",
        "python launch/serve.py model=EXPORT [key=value ...]",
        [
            "python launch/serve.py model=runs/q/1/export",
            "python launch/serve.py model=runs/q/1/export port=8001 max_tokens=256",
            "python launch/serve.py model=runs/i/1/export host=0.0.0.0 port=8080",
        ],
        [
            "Any host but this machine's own needs a token in the environment variable "
            "SERVE_TOKEN.",
            "One text is generated at a time. For many users: kind=phi with vLLM, kind=gguf with "
            "llama.cpp.",
        ],
    ),
    "convert": Usage(
        "Convert a checkpoint to sharded safetensors, mesh-transformer-jax's form, Phi's form or "
        "GGUF.",
        "python launch/convert.py source=DIR target=DIR [key=value ...]",
        [
            "python launch/convert.py source=gpt-j-6b target=gpt-j-6b-bf16 dtype=bf16",
            "python launch/convert.py source=step_383500 target=gpt-j-6b-jax "
            "config=6B_roto_256.json",
            "python launch/convert.py source=runs/p/1/export target=slim/step_10 to=jax",
            "python launch/convert.py source=gpt-j-6b target=gpt-j-6b-phi to=phi",
        ],
    ),
    "doctor": Usage(
        "Check whether this machine is ready to train: green, yellow, red, each with a remedy.",
        "python launch/doctor.py [--json]",
        [
            "python launch/doctor.py",
            "python launch/doctor.py --json",
            "python launch/doctor.py json=true",
        ],
        ["Exit code 1 when something must be fixed before training."],
    ),
    "report": Usage(
        "Write the page of a run, or one page that compares runs.",
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


def help_text(program: str, topics: list[str] | None = None) -> str:
    """Return the help of one program, or of some groups, keys and recipes of it.

    Raises:
        UserError: a topic is none of these.
    """
    if topics:
        return "\n\n".join(topic_text(program, topic) for topic in topics)
    usage, node = USAGE[program], SCHEMAS[program]
    parts = [f"{usage.purpose}\n\nUsage: {usage.command}"]
    if node is Config:
        groups = {
            f"{group + '=':<10} {purpose:<24}": ", ".join(option_files(group))
            for group, purpose in GROUPS.items()
            if group != "recipe"
        }
        parts += [
            table("Recipes (recipe=...):", option_lines("recipe")),
            table("Groups (group=option):", groups),
            table("Keys used most:", {key: str(key_help(key, node)) for key in TOP}),
        ]
        more = [
            "Texts are taken as typed, lists in brackets: 'run_dir=runs/a, b', "
            "task.labels='[C++,\"a, b\"]'.",
            "More: --help GROUP or --help KEY (--help adapter, --help optim.lr); --cfg job shows "
            "every value.",
            "Tab completion: source launch/completion.bash",
        ]
    else:
        rows = {
            "model" if key == "export_dir" else key: documented(owner, item)
            for key, owner, item in schema_keys(node)
            if "." not in key
        }
        if program == "evaluate":
            rows["task"] = "clm, instruct, classify, qa, preference or reward; a run knows its own."
            rows["data.eval"] = field_docs(DataConfig)["train"]
        parts.append(table("Keys:", rows))
        more = ["All settings with their values: add --cfg job."]
    parts.append("Examples:\n" + "\n".join(f"  {line}" for line in usage.examples))
    return "\n\n".join([*parts, "\n".join([*usage.notes, *more])])


def topic_text(program: str, topic: str) -> str:
    """Return the help on one group, recipe or key.

    Raises:
        UserError: there is none.
    """
    node = SCHEMAS[program]
    if node is Config and topic in GROUPS:
        keys: dict[str, dict[str, str]] = {}
        for key, owner, item in schema_keys(node):
            if key.startswith(f"{topic}."):
                kind = owner.__name__.removesuffix("Config").lower()
                keys.setdefault(kind, {})[key] = documented(owner, item)
        sections = [table(f"Keys of {kind}:", rows) for kind, rows in keys.items()]
        title = f"{topic}=: {GROUPS[topic]}"
        return "\n\n".join([table(title, option_lines(topic)), *sections])
    if recipe := option_files("recipe").get(topic):
        return recipe.read_text(encoding="utf-8").rstrip()
    if doc := key_help("export_dir" if topic == "model" else topic, node):
        return table(f"{topic}:", {topic: doc})
    names = [*GROUPS, *option_files("recipe"), *TOP]
    near = difflib.get_close_matches(topic, names, 1, 0.5)
    raise UserError(
        f"there is no help on '{topic}'",
        remedy=f"Did you mean --help {near[0]}?" if near else f"Groups: {', '.join(GROUPS)}.",
    )


def option_files(group: str) -> dict[str, Path]:
    """Map the options of a group, or the recipes, to their files; {} if there is no such group."""
    folder = RECIPES if group == "recipe" else CONF / group
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def option_lines(group: str) -> dict[str, str]:
    return {name: first_comment(path) for name, path in option_files(group).items()}


def first_comment(path: Path) -> str:
    """Return the first comment line of a yaml that is not the `@package` line; "" without one."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


@cache
def field_docs(node: type) -> dict[str, str]:
    """Map a class's fields, inherited ones too, to the string literal beneath each in the source."""
    sources = "".join(
        inspect.getsource(base) for base in reversed(node.__mro__) if is_dataclass(base)
    )
    pairs = re.findall(
        r'^    (\w+):[^\n]*(?:\n    [ )][^\n]*)*\n    """(.*?)"""', sources, re.M | re.S
    )
    return {name: " ".join(doc.split()) for name, doc in pairs}


def documented(owner: type, item: Field) -> str:
    """Return a field's documentation, with its default as one would type it in brackets."""
    value = item.default if item.default_factory is MISSING else item.default_factory()
    if isinstance(value, Enum):
        value = value.value
    elif isinstance(value, list):
        value = f"[{','.join(map(str, value))}]" if value else ""
    elif isinstance(value, bool):
        value = str(value).lower()
    doc = field_docs(owner)[item.name]
    return doc if value in (None, MISSING, "???", "", {}) else f"{doc} [{value}]"


def key_help(key: str, node: type) -> str | None:
    """Return the documentation of a dotted key of a schema; None if there is no such key."""
    matches = (documented(owner, item) for name, owner, item in schema_keys(node) if name == key)
    return next(matches, None)


def table(title: str, rows: dict[str, str]) -> str:
    """Return a title and aligned rows, with the lines of a long text below its first one."""
    wide = max(map(len, rows), default=0) + 1
    lines = [title]
    for head, text in rows.items():
        start = f"  {head:<{wide}} "
        wrapped = textwrap.wrap(text, max(30, WIDTH - len(start))) or [""]
        lines.append(start + f"\n{' ' * len(start)}".join(wrapped))
    return "\n".join(lines)
