"""README.md of an export: metadata that the hub reads, what it was trained on, what was proven, how to load it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finetune.config import HEADS, Dtype

REPO = re.compile(r"^[\w.-]+/[\w.-]+$")


def model_card(
    name: str,
    head: str,
    kind: str,
    base: str,
    dtype: str,
    facts: dict[str, Any],
    metrics: dict[str, Any],
    figures: dict[str, Any],
    hashes: dict[str, str],
    chat: bool,
    origin: str = "",
    revision: str | None = None,
) -> str:
    """The card's text.

    Args:
        kind: adapter, merged or full.
        base: path or hub id of the model that was fine-tuned.
        origin: hub id that a base in a local folder came from, as its config.json tells.
        facts: lines about the run: recipe, data, steps.
        metrics: figures of the last evaluation; those that are numbers go into the metadata too.
        figures: of export.json.
        hashes: weight file -> SHA-256.
        chat: whether the tokenizer has a chat template.
        revision: of a base that is a hub id.
    """
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag=HEADS[head].pipeline,
        tags=["gptj", "deepspeed"],
        model_name=name,
        base_model=next((x for x in (base, origin) if REPO.match(x)), None),
        eval_results=_results(metrics, facts, head) or None,
    )
    body = "\n".join(
        _body(name, head, kind, base, dtype, facts, metrics, figures, hashes, chat, revision)
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"))


def _results(metrics: dict[str, Any], facts: dict[str, Any], head: str) -> list[EvalResult]:
    data = Path(str(facts.get("evaluation data") or "held-out data")).name
    return [
        EvalResult(
            task_type=HEADS[head].pipeline,
            dataset_type="custom",
            dataset_name=data,
            metric_type=key,
            metric_value=round(value, 6),
        )
        for key, value in metrics.items()
        if isinstance(value, float) and math.isfinite(value)
    ]


def _body(
    name: str,
    head: str,
    kind: str,
    base: str,
    dtype: str,
    facts: dict[str, Any],
    metrics: dict[str, Any],
    figures: dict[str, Any],
    hashes: dict[str, str],
    chat: bool,
    revision: str | None,
) -> list[str]:
    what = {
        "adapter": "An adapter for",
        "merged": "An adapter merged into",
        "full": "All weights, trained from",
    }[kind]
    lines = [
        f"# {name}",
        "",
        f"{what} `{base}`, in {dtype}. GPT-J is licensed under Apache-2.0; the training data "
        "have licences of their own.",
        "",
        "## Training",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in facts.items() if value is not None]
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    if numbers:
        lines += ["", "| evaluation | |", "|---|--:|"]
        lines += [
            f"| {key} | {value:.6g} |" if isinstance(value, float) else f"| {key} | {value:,} |"
            for key, value in numbers.items()
        ]
    lines += ["", "## Files", "", "| file | SHA-256 |", "|---|---|"]
    lines += [f"| {file} | `{digest}` |" for file, digest in hashes.items()]
    lines += [
        "",
        *_proof(figures),
        "",
        "## Loading",
        "",
        "```python",
        *_loading(head, kind, base, dtype, revision),
        "```",
    ]
    if chat:
        lines += [
            "",
            "The tokenizer carries the template that training used:",
            "",
            "```python",
            "messages = [{'role': 'user', 'content': '...'}]",
            "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
            "```",
        ]
        lines += ["", f"It gives {figures['chat_template']}."] if "chat_template" in figures else []
    if head != "lm":
        batches = (
            "Batches may be padded, with the tokenizer's own padding token."
            if figures.get("pads", True)
            else "Give it one text at a time: no token could be found to pad batches with, or the adapter is a prompt."
        )
        lines += [
            "",
            f"The tokenizer writes the closing eos behind every text; the head reads there. {batches}",
        ]
    return lines


def _proof(figures: dict[str, Any]) -> list[str]:
    if not figures.get("verified"):
        return ["Not verified."]
    if "max_difference" not in figures:
        return [
            f"Verified tensor by tensor: {figures['tensors']} tensors, read back from the files, are those that "
            "were trained."
        ]
    return [
        f"Reopened with plain transformers and peft: on {figures['positions']} positions of training text the "
        f"largest output difference is {figures['max_difference']:.3g}, the mean {figures['mean_difference']:.3g}, "
        f"the arg-max the same at {100 * figures['argmax_agreement']:.2f}%."
    ]


def _loading(head: str, kind: str, base: str, dtype: str, revision: str | None) -> list[str]:
    auto = HEADS[head].auto_class
    torch_dtype = Dtype(dtype).torch_name
    if kind != "adapter":
        return [
            f"from transformers import AutoTokenizer, {auto}",
            "",
            f"model = {auto}.from_pretrained('THIS_FOLDER', dtype='{torch_dtype}')",
            "tokenizer = AutoTokenizer.from_pretrained('THIS_FOLDER')",
        ]
    config = [] if head == "lm" else ["config = AutoConfig.from_pretrained('THIS_FOLDER')"]
    names = "AutoTokenizer" if head == "lm" else "AutoConfig, AutoTokenizer"
    more = ("" if head == "lm" else ", config=config") + (
        f", revision={revision!r}" if revision else ""
    )
    return [
        "from peft import PeftModel",
        f"from transformers import {names}, {auto}",
        "",
        *config,
        f"model = {auto}.from_pretrained({base!r}, dtype='{torch_dtype}'{more})",
        "model = PeftModel.from_pretrained(model, 'THIS_FOLDER')",
        "tokenizer = AutoTokenizer.from_pretrained('THIS_FOLDER')",
    ]
