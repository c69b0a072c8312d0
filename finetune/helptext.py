"""`--help`: recipes with a line each, groups, keys with their units, examples. Reads conf/ and recipes/ as text."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from finetune import config, programs

USAGE = {
    "train": ("deepspeed launch/train.py recipe=R [k=v ...]", "Fine-tune GPT-J.", [
        "deepspeed launch/train.py recipe=quickstart",
        "deepspeed --num_gpus 4 launch/train.py recipe=clm_pile data.train='pile/*.jsonl.zst' data.eval=pile/val.jsonl.zst",
        "python launch/train.py -m recipe=quickstart optim.lr=1e-3,5e-3"]),
    "plan": ("python launch/plan.py recipe=R [k=v ...]", "Will it fit? Bytes by part for every way to shard.", [
        "python launch/plan.py recipe=clm_pile machine=h100_80 machine.gpus=4",
        "python launch/plan.py recipe=clm_pile_lora machine.gpus=1 machine.gpu_gib=24 machine.host_gib=64",
        "python launch/plan.py recipe=clm_pile plan.format=json"]),
    "evaluate": ("deepspeed launch/evaluate.py run=RUN | model=EXPORT task=T data.eval=FILE", "Metrics of a run or export.", [
        "python launch/evaluate.py run=runs/quickstart/20260101-120000",
        "python launch/evaluate.py model=runs/q/1/export task=clm data.eval=val.jsonl.zst"]),
    "export": ("python launch/export.py run=RUN kind=adapter|merged|full [out=DIR]", "A verified export.", [
        "python launch/export.py run=runs/quickstart/20260101-120000 kind=merged"]),
    "generate": ("python launch/generate.py model=EXPORT prompt=TEXT [k=v ...]", "Text from an export.", [
        "python launch/generate.py model=runs/q/1/export prompt='The patients were' temperature=0"]),
}
TOP_TEN = ("run_dir", "seed", "resume", "task.max_length", "data.train", "data.eval", "train.steps", "train.epochs",
           "train.micro_batch", "train.global_batch", "optim.lr", "adapter.rank", "checkpoint.every")


def help_text(name: str, conf: Path, recipes: Path) -> str:
    command, purpose, examples = USAGE[name]
    parts = [f"{purpose}\n\nUsage: {command}"]
    if name in ("train", "plan"):
        parts += [_recipes(recipes), _groups(conf), _keys(TOP_TEN)]
        parts.append("All keys with their values: add --cfg job. Every key is documented in finetune/config.py.")
    else:
        documented = {f"{k}": v for k, v in field_docs(programs.SCHEMAS[name]).items()}
        parts.append("Keys:\n" + "\n".join(f"  {key:<16} {doc}" for key, doc in documented.items()))
    parts.append("Examples:\n" + "\n".join(f"  {line}" for line in examples))
    return "\n\n".join(parts)


def first_comment(path: Path) -> str:
    """First comment line of a yaml that says something to people (the `@package` line does not)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def _recipes(folder: Path) -> str:
    lines = [f"  {path.stem:<16} {first_comment(path)}" for path in sorted(folder.glob("*.yaml"))]
    return "Recipes (recipe=...):\n" + "\n".join(lines)


def _groups(conf: Path) -> str:
    lines = []
    for folder in sorted(p for p in conf.iterdir() if p.is_dir()):
        options = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        if options:
            lines.append(f"  {folder.name + '=':<10} {options}")
    return "Groups:\n" + "\n".join(lines)


def _keys(names: tuple[str, ...]) -> str:
    lines = []
    for key in names:
        section, _, leaf = key.rpartition(".")
        owner = {"": config.Config, "task": config.TaskConfig, "data": config.DataConfig,
                 "train": config.TrainConfig, "optim": config.OptimConfig, "adapter": config.LoraConfig,
                 "checkpoint": config.CheckpointConfig}[section]
        lines.append(f"  {key:<20} {field_docs(owner)[leaf]}")
    return "Keys used most:\n" + "\n".join(lines)


def field_docs(node: type) -> dict[str, str]:
    """Field -> the string literal beneath it in the source."""
    found = re.findall(r'^    (\w+):[^\n]*\n    """(.*?)"""', inspect.getsource(node), re.M | re.S)
    known = {f.name for f in fields(node)}
    return {name: " ".join(doc.split()) for name, doc in found if name in known}
