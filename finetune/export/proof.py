"""The proof of an export: what the trained model says, and what a fresh process reads from the files.

texts of the training data -> the trained model's outputs on each of them, alone ->
`finetune.export.verify` reopens the export in a process of its own and compares.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.data.columns import Store
from finetune.data.encode_instruct import chat_template_differs
from finetune.data.instruct_template import TRIALS, Message, Template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import RunFailed, UserError
from finetune.process import LAUNCHER_VARIABLES

REFERENCE_TOKENS = 64
"""Length of each text that trained and exported model are compared on."""
REFERENCE_TEXTS = 4
SHORT_TOKENS = 24
"""Length of the longest text of a padded batch; the others have a half, a third, ... of it."""


def reference_texts(store: Store) -> list[list[int]]:
    """Return the beginnings of some training examples, to compare trained and exported model on."""
    ids, offsets = store.column("ids"), store.offsets
    chosen = list(range(0, len(store), max(1, len(store) // REFERENCE_TEXTS)))[:REFERENCE_TEXTS]
    return [
        ids[offsets[i] : min(offsets[i + 1], offsets[i] + REFERENCE_TOKENS)].tolist()
        for i in chosen
    ]


def reference_outputs(
    module: nn.Module, texts: list[list[int]], head: str, eos: int, device: torch.device
) -> dict[str, Tensor]:
    """Compute the trained model's outputs on each text alone. Collective at stage 3.

    Beginnings of the texts with unequal lengths follow, for a padded batch. They end with the eos
    that the heads of classification and question answering read.

    Returns:
        {"ids.0": (T,), "outputs.0": (T, V)}, and for the beginnings "short_ids.0" and
        "short_outputs.0".
    """
    short = []
    for i, ids in enumerate(texts):
        ids = [token for token in ids if token != eos][: max(1, SHORT_TOKENS // (i + 1))]
        short.append([*ids, eos] if head != "lm" or not ids else ids)
    was_training = module.training
    module.eval()
    reference: dict[str, Tensor] = {}
    with torch.no_grad():
        for prefix, rows in (("", texts), ("short_", short)):
            for i, ids in enumerate(rows):
                batch = torch.tensor([ids], device=device)
                out = module(input_ids=batch)
                reference[f"{prefix}ids.{i}"] = batch[0].cpu()
                reference[f"{prefix}outputs.{i}"] = out[0].float().cpu().contiguous()
    module.train(was_training)
    return reference


def verify_export(folder: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Reopen `folder` with its engine's own code in a fresh process and compare outputs.

    Raises:
        RunFailed: it does not load, or its outputs differ from the trained model's.
    """
    file = folder.with_name(f"{folder.name}.reference.safetensors")
    try:
        save_file(reference, file)
        line = fresh_process("finetune.export.verify", [str(folder), str(file)], str(folder))
    finally:
        file.unlink(missing_ok=True)
    figures = json.loads(line)
    if not figures["equal"]:
        raise RunFailed(f"the export is not equal to the trained model: {figures}", str(folder))
    return {"verified": True, **figures}


def fresh_process(module: str, words: list[str], where: str) -> str:
    """Run one of the package's modules in a new process without GPUs; return its last line.

    Raises:
        RunFailed: the process failed; the message is its last line.
    """
    # Without the launcher's variables, and without the GPUs, which the trained model still occupies.
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        killed = " (killed: not enough memory?)" if done.returncode < 0 else ""
        raise RunFailed(f"{module} failed{killed}: {reason}", where)
    return lines[-1]


def compare_chat_template(
    folder: Path, task: dict[str, Any], conversations: list[list[Message]]
) -> str:
    """Compare how the exported tokenizer renders conversations with what training read.

    Args:
        task: `Task.describe()` of an instruction task.
        conversations: of the training data; trial ones are added.
    """
    tokenizer = load_tokenizer(str(folder))
    eos, bos = str(tokenizer.eos_token), str(tokenizer.bos_token or "")
    template = Template(task["template"], task["template_text"], eos, bos)
    answered = [
        messages
        for messages in TRIALS
        if any(message["role"] == "assistant" for message in messages)
    ]
    count, differences = 0, []
    for messages in [*conversations, *answered]:
        if any(mark in m["content"] for mark in template.marks for m in messages):
            continue  # refused by training
        try:
            difference = chat_template_differs(tokenizer, template, messages)
        except UserError:  # a template without system messages, or for one turn
            continue
        count += 1
        differences += [difference] if difference else []
    if not differences:
        return f"training's ids on {count} conversations"
    return (
        f"other ids than training's in {len(differences)} of {count} conversations: "
        f"{differences[0]}"
    )
