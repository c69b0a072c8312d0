"""An independent training loop: Hugging Face's eager GPT-J, one process, torch's AdamW, documents one by one.

Nothing of the trained model, the loss, the packing, the engine or the scheduler is shared with the product; only the
order of rows (a permutation) is asked from it.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPTJForCausalLM

ADAMW = partial(torch.optim.AdamW, foreach=False)


def rows_of(
    documents: list[list[int]], length: int, packing: bool
) -> list[list[tuple[list[int], list[int]]]]:
    """Rows as lists of (ids, targets), one pair per piece of a document; -1 marks a target that does not exist."""
    pieces_by_row: list[list[tuple[list[int], list[int]]]] = []
    if packing:
        flat = [(d, i) for d, ids in enumerate(documents) for i in range(len(ids))]
        chunks = [flat[i : i + length] for i in range(0, len(flat), length)]
    else:
        chunks = [
            [(d, i) for i in range(j, min(j + length, len(ids)))]
            for d, ids in enumerate(documents)
            for j in range(0, len(ids), length)
        ]
    for chunk in chunks:
        row: dict[int, tuple[list[int], list[int]]] = {}
        for d, i in chunk:
            ids, targets = row.setdefault(d, ([], []))
            ids.append(documents[d][i])
            targets.append(documents[d][i + 1] if i + 1 < len(documents[d]) else -1)
        pieces_by_row.append(list(row.values()))
    return pieces_by_row


def train(
    checkpoint: Path,
    data: Path,
    tokenizer,
    *,
    steps: int,
    global_batch: int,
    length: int,
    packing: bool,
    lr: float,
    weight_decay: float,
    clip: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
    wrap=None,
    quantization=None,
    make_optimizer=ADAMW,
    optimizer=None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of each step, and the first step's clipped gradients by name.

    Args:
        optimizer: (model) -> an optimizer with its own groups; None: AdamW.
    """
    from finetune.data.batches import permutation

    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    documents = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    rows = rows_of(documents, length, packing)
    loading = {"quantization_config": quantization, "device_map": "cpu"} if quantization else {}
    model = GPTJForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", **loading
    ).train(quantization is not None)  # bitsandbytes would round activations to int8
    model = wrap(model) if wrap else model
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decay, plain = (
        [p for p in named.values() if p.ndim >= 2],
        [p for p in named.values() if p.ndim < 2],
    )
    optimizer = (
        optimizer(model)
        if optimizer
        else make_optimizer(
            [
                {"params": decay, "weight_decay": weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=lr,
        )
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses, first = [], {}
    for step in range(steps):
        chosen = []
        for position in range(step * global_batch, (step + 1) * global_batch):
            epoch, place = divmod(position, len(rows))
            chosen.append(rows[int(permutation(seed, epoch, len(rows))[place])])
        pieces = [piece for row in chosen for piece in row]
        count = sum(t >= 0 for _, targets in pieces for t in targets)
        total = 0.0
        optimizer.zero_grad()
        for ids, targets in pieces:
            if all(t < 0 for t in targets):
                continue
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
            loss = F.cross_entropy(logits, torch.tensor(targets), ignore_index=-1, reduction="sum")
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(list(named.values()), clip)
        if step == 0:
            first = {n: p.grad.clone() for n, p in named.items()}
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        losses.append(total / count)
    return losses, first


def three_steps(checkpoint: Path, data: Path, tokenizer, **how) -> list[float]:
    """Losses of three packed steps of 4 rows of 64 tokens at 1e-2: `train` with usual numbers."""
    usual = dict(steps=3, global_batch=4, length=64, packing=True, lr=1e-2, weight_decay=0.1)
    return train(checkpoint, data, tokenizer, clip=1.0, seed=3, **usual, **how)[0]
