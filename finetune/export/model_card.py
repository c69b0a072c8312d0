"""README.md of an export: metadata that the hub reads, training, what serves it, proof, how to load it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finetune.config import HEADS, Dtype
from finetune.errors import figure
from finetune.export.kinds import KINDS, PROVEN, PYTHON
from finetune.export.run_info import RunInfo

REPO = re.compile(r"^[\w.-]+/[\w.-]+$")
TEMPLATE = (
    "messages = [{'role': 'user', 'content': '...'}]",
    "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
)
SCORING = (
    "messages = [{'role': 'user', 'content': '...'}, {'role': 'assistant', 'content': '...'}]",
    "batch = tokenizer.apply_chat_template(messages, return_tensors='pt', return_dict=True)",
    "reward = model(**batch).logits[0, 0]",
)
"""Of a reward model, which scores a conversation with its answer."""
NOT_REOPENED = "this export was not reopened; see below"


def model_card(kind: str, info: RunInfo, figures: dict[str, Any], origin: str = "") -> str:
    """Return the card's text.

    Args:
        figures: of export.json.
        origin: hub id that a base in a local folder came from, as its config.json tells.
    """
    spec = KINDS[kind]

    # Training.
    base = figures.get("phi_base") or info.base
    dtype = figures.get("dtype", info.dtype) if spec.form == "gguf" else info.dtype
    lines = [
        f"# {info.name}",
        "",
        f"{spec.what.format(base=base)}, in {dtype}. GPT-J is licensed under Apache-2.0; the "
        "training data have licences of their own.",
        "",
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in info.facts.items() if value is not None),
    ]
    numbers = {k: v for k, v in info.metrics.items() if isinstance(v, (int, float))}
    if numbers:
        lines += ["", "| evaluation | |", "|---|--:|"]
        lines += [f"| {key} | {figure(value)} |" for key, value in numbers.items()]

    # Engines, and the proof.
    lines += ["", "## Serving", "", "| with | command | proven by |", "|---|---|---|"]
    reopened = PROVEN if "engine" in figures else NOT_REOPENED
    for engine in spec.engines:
        if info.head in engine.heads:
            command = engine.command.format(base=base, name=info.name)
            command = command if command == PYTHON else f"`{command}`"
            proof = reopened if engine.proof == PROVEN else engine.proof
            lines.append(f"| {engine.name} | {command} | {proof} |")
    lines += ["", *proof_lines(figures), "", "| file | SHA-256 |", "|---|---|"]
    lines += [f"| {file} | `{digest}` |" for file, digest in figures["files"].items()]

    # Loading in Python.
    if spec.form != "gguf":
        revision = info.revision if kind == "adapter" else None
        snippet = loading_lines(info, spec.whole, base, revision)
        lines += ["", "## Loading", "", "```python", *snippet, "```"]
    if spec.form != "gguf" and info.task.get("template_text"):
        snippet = TEMPLATE if info.head == "lm" else SCORING
        lines += ["", "The tokenizer carries the template that training used:", ""]
        lines += ["```python", *snippet, "```"]
        lines += ["", f"It gives {figures['chat_template']}."] if "chat_template" in figures else []
    if info.head != "lm":
        batches = (
            "Batches may be padded, with the tokenizer's own padding token."
            if figures.get("pads", True)
            else "Give it one text at a time: no token could be found to pad batches with, or the "
            "adapter is a prompt."
        )
        lines += [
            "",
            "The tokenizer writes the closing eos behind every text; the head reads there. "
            f"{batches}",
        ]
    metadata, body = card_metadata(info, spec.library, origin).to_yaml(), "\n".join(lines)
    return str(ModelCard(f"---\n{metadata}\n---\n\n{body}\n"))


def card_metadata(info: RunInfo, library: str, origin: str) -> ModelCardData:
    """Return what the hub reads of a card: licence, base, library, task, evaluation."""
    head = HEADS[info.head]
    data = Path(str(info.facts.get("evaluation data") or "held-out data")).name
    results = [
        EvalResult(
            task_type=head.pipeline,
            dataset_type="custom",
            dataset_name=data,
            metric_type=key,
            metric_value=round(value, 6),
        )
        for key, value in info.metrics.items()
        if isinstance(value, float) and math.isfinite(value)
    ]
    return ModelCardData(
        license="apache-2.0",
        library_name=library,
        pipeline_tag=head.pipeline,
        tags=["gptj", "deepspeed"],
        model_name=info.name,
        base_model=next((x for x in (info.base, origin) if REPO.match(x)), None),
        eval_results=results or None,
    )


def proof_lines(figures: dict[str, Any]) -> list[str]:
    """Return what was compared, by which engine, and the figures."""
    if not figures.get("verified"):
        return ["Not verified."]
    if figures.get("method") == "tensors":
        return [
            f"Verified tensor by tensor: {figures['tensors']} tensors, read back from the files, "
            "are those that were trained."
        ]
    if "token_agreement" in figures:
        return [
            f"Reopened with {figures['engine']}: at {figures['positions']} positions of training "
            f"text the mean difference of the likeliest tokens' log-probabilities is "
            f"{figures['mean_logprob_difference']:.3g}, the next token the same at "
            f"{100 * figures['token_agreement']:.2f}%."
        ]
    return [
        f"Reopened with plain {figures['engine']}: on {figures['positions']} positions of training "
        f"text the largest output difference is {figures['max_difference']:.3g}, the mean "
        f"{figures['mean_difference']:.3g}, "
        f"the arg-max the same at {100 * figures['argmax_agreement']:.2f}%."
    ]


def loading_lines(info: RunInfo, whole: bool, base: str, revision: str | None) -> list[str]:
    """Return the lines of Python that load the export's model and tokenizer.

    Args:
        base: of an adapter, with its `revision` on the hub.
    """
    auto, dtype = HEADS[info.head].auto_class, Dtype(info.dtype).torch_name
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained('THIS_FOLDER')"
    if whole:
        return [
            f"from transformers import AutoTokenizer, {auto}",
            "",
            f"model = {auto}.from_pretrained('THIS_FOLDER', dtype='{dtype}')",
            tokenizer,
        ]
    # A head needs the adapter's own config: number of labels, and the padding token.
    has_config = info.head != "lm"
    names = "AutoConfig, AutoTokenizer" if has_config else "AutoTokenizer"
    more = ", config=config" if has_config else ""
    more += f", revision={revision!r}" if revision else ""
    return [
        "from peft import PeftModel",
        f"from transformers import {names}, {auto}",
        "",
        *(["config = AutoConfig.from_pretrained('THIS_FOLDER')"] if has_config else []),
        f"model = {auto}.from_pretrained({base!r}, dtype='{dtype}'{more})",
        "model = PeftModel.from_pretrained(model, 'THIS_FOLDER')",
        tokenizer,
    ]
