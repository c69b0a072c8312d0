"""The small files of an export: config.json, generation_config.json, tokenizer.

A tokenizer of a classification export writes the closing eos behind every text (between the texts
of a pair the same newline as in training), and pads with a token that no text holds. So plain
transformers pools the token that was trained, in batches padded on either side and alone:

    ids   t t t E P P      config.pad_token_id = P: the last id that is not P is E, the pooled one

With pad = eos, as is usual for GPT-J, transformers would pool the last t; with a pad that has no
row in the embedding, padded batches would fail. So `set_padding` looks for another. Question
answering exports read "question, newline, context, eos" the same way. An instruction export carries
its template as the tokenizer's chat_template, with eos behind every answer whether the template
writes it or not: `apply_chat_template` gives the ids that training read.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GPTJConfig

from finetune.config import HEADS, Dtype
from finetune.data.instruct_template import Template
from finetune.data.tokenizer import spare_tokens
from finetune.export.run_info import RunInfo
from finetune.files import read_json, write_json

NEW_PAD = "<|pad|>"
"""Name of a padding token where the vocabulary has no spare one."""
NO_TEXT_BYTES = "ÿþýüûúùø÷öõÁÀ"
"""Names, in a byte-level vocabulary, of the bytes that UTF-8 never holds (FF to F5, C1, C0): no
text yields their tokens."""
PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""A classification task's problem -> transformers' name for it."""


def tokenizer_for(tokenizer, head: str, task: dict[str, Any], rows: int, pads: bool = True):
    """Return a copy of `tokenizer` that prepares text elsewhere as training did here.

    Args:
        task: `Task.describe()`.
        rows: of the model's embedding: a padding token must have one.
        pads: False where padded batches are wrong whatever they are padded with, as behind a prompt.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if head == "lm":
        spare = first_spare(tokenizer, rows)
        if spare and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.pad_token = spare
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
            # Attention masks hide it, and nothing looks for it.
            tokenizer.pad_token = tokenizer.eos_token
    elif not pads or not set_padding(tokenizer, rows):
        tokenizer.pad_token = None
    tokenizer.padding_side = "left" if head == "lm" else "right"
    if head != "lm":
        close_with_eos(tokenizer, task.get("pair_separator") or task.get("separator") or "\n")
        tokenizer.model_max_length = task.get("max_length") or tokenizer.model_max_length
    if text := task.get("template_text"):
        eos, bos = tokenizer.eos_token, tokenizer.bos_token or ""
        template = Template(task.get("template") or "chat", text, eos, bos)
        tokenizer.chat_template = template.chat_template
    return tokenizer


def set_padding(tokenizer, rows: int) -> bool:
    """Give `tokenizer` a padding token that is not its eos, has a row in the embedding and stands for no text.

    In this order: its own; GPT-J's first spare token; a new one in a row that no token uses; in a
    full byte-level vocabulary a token that no text can yield, renamed. GPT-2's 50257 entries have
    thirteen of those.

    Returns:
        False: there is none, and nothing was changed.
    """
    vocabulary = tokenizer.get_vocab()
    eos, used = tokenizer.eos_token_id, set(vocabulary.values())
    if tokenizer.pad_token_id not in (None, eos) and tokenizer.pad_token_id < rows:
        return True
    if spare := first_spare(tokenizer, rows):
        tokenizer.pad_token = spare
        return True
    if NEW_PAD in vocabulary:
        return False
    if len(used) == max(used) + 1 < rows:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
        return True

    # The vocabulary must be one of bytes, and no merge may build on the byte's token.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    before, model = state["pre_tokenizer"] or {}, state["model"]
    steps = {step.get("type") for step in [before, *before.get("pretokenizers", [])]}
    if model["type"] != "BPE" or "ByteLevel" not in steps or model.get("byte_fallback"):
        return False
    taken = {character for pair in model["merges"] for part in pair for character in part}
    taken |= {token["content"] for token in state["added_tokens"]}
    free = [name for name in NO_TEXT_BYTES if vocabulary.get(name, rows) < rows]
    unused = next((name for name in free if name not in taken), None)
    if unused is None:
        return False
    model["vocab"][NEW_PAD] = model["vocab"].pop(unused)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    return True


def first_spare(tokenizer, rows: int) -> str | None:
    """Return the first token that GPT-J's embedding has a row for and no text uses; None if there is none."""
    vocabulary = tokenizer.get_vocab()
    return next((name for name in spare_tokens(tokenizer) if vocabulary[name] < rows), None)


def close_with_eos(tokenizer, separator: str) -> None:
    """Make single texts `text eos`, pairs `text separator text eos`."""
    backend = tokenizer.backend_tokenizer
    glue = backend.encode(separator, add_special_tokens=False)
    eos = tokenizer.eos_token
    pair = " ".join(["$A", *glue.tokens, "$B:1", f"{eos}:1"])
    special = dict(zip(glue.tokens, glue.ids, strict=True)) | {eos: tokenizer.eos_token_id}
    backend.post_processor = TemplateProcessing(
        single=f"$A {eos}", pair=pair, special_tokens=list(special.items())
    )


def config_values(
    config: GPTJConfig, head: str, base: str, dtype: str, task: dict[str, Any], tokenizer
) -> dict[str, Any]:
    """Return the config.json of an exported model.

    Args:
        config: the one that was trained.
        dtype: bf16, fp16 or fp32.
        tokenizer: from `tokenizer_for`.
    """
    values = config.to_dict()
    for name in ("transformers_version", "_attn_implementation_autoset", "num_labels"):
        values.pop(name, None)
    values |= {
        "architectures": [HEADS[head].architecture],
        "dtype": Dtype(dtype).torch_name,
        "use_cache": True,
        "_name_or_path": base,
    }
    if head == "classify":
        names = task.get("labels") or [f"LABEL_{i}" for i in range(config.num_labels)]
        values |= {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": PROBLEMS.get(task.get("problem", "")),
        }
    if head == "lm":
        values["eos_token_id"] = tokenizer.eos_token_id
    else:
        # None makes transformers refuse batches of several texts, instead of pooling the wrong token.
        values["pad_token_id"] = tokenizer.pad_token_id
    return values


def write_small_files(
    folder: Path,
    config: GPTJConfig,
    info: RunInfo,
    tokenizer,
    with_config: bool = True,
    pads: bool = True,
) -> bool:
    """Write the tokenizer, and with `with_config` config.json and a language model's generation_config.json.

    Args:
        tokenizer: as it was trained with; what is written is `tokenizer_for` it.
        pads: as in `tokenizer_for`.

    Returns:
        Whether the tokenizer pads, so that the head reads padded batches right.
    """
    ready = tokenizer_for(tokenizer, info.head, info.task, config.vocab_size, pads)
    try:
        ready.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # tokenizers knows nothing narrower for a full disk
        raise OSError(str(error)) from None
    # transformers 5.24 leaves the side out, and whoever generates from a batch needs it.
    file = folder / "tokenizer_config.json"
    write_json(file, read_json(file) | {"padding_side": ready.padding_side})
    if with_config:
        values = config_values(config, info.head, info.base, info.dtype, info.task, ready)
        write_json(folder / "config.json", values)
    if with_config and info.head == "lm":
        pad, eos = ready.pad_token_id, ready.eos_token_id
        values = {"bos_token_id": config.bos_token_id, "eos_token_id": eos}
        values["pad_token_id"] = pad if pad is not None else eos
        write_json(folder / "generation_config.json", values)
    return ready.pad_token_id is not None
