"""Independent training of the three heads: Hugging Face's eager GPT-J, plain peft, one text at a time, torch's AdamW.

Accumulation 1 and world size 1 by construction. From the product come the examples (their ids are tested elsewhere),
the first weights and the order of rows; nothing of its model, its losses, its batches or its engine.
"""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
import transformers

from finetune.compose import compose_train
from finetune.config import HEADS
from finetune.data.batches import permutation
from finetune.data.cache import build_store
from finetune.data.mixture import DataSource
from finetune.data.tokenizer import load_tokenizer
from finetune.gptj import adapters
from finetune.gptj.load import build_model
from finetune.tasks.build import build_task
from tests.peft_reference import run_peft

LAYERS = {name: head.module for name, head in HEADS.items()}


def train(overrides: list[str], step_loss=None) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of each step of the run that `overrides` describe: constant learning rate, no weight decay,
    unpacked.

    Args:
        step_loss: (model, task, store, examples, model before training) -> loss of a step; None: `mean_loss`.
    """
    cfg = compose_train(overrides)
    tokenizer = load_tokenizer(cfg.model.path)
    task = build_task(cfg.task, tokenizer, packing=False)
    store = build_store([DataSource(cfg.data.train)], task.encoder())
    task.prepare(store, None)
    model, base = _model(cfg, task), _model(cfg, task, trained=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = tuple(cfg.optim.betas)
    optimizer = torch.optim.AdamW(
        trained, lr=cfg.optim.lr, betas=betas, weight_decay=0.0, foreach=False
    )
    losses, norms = [], []
    for step in range(cfg.train.steps):
        first = step * cfg.train.global_batch
        chosen = [
            _row(position, cfg.seed, len(store))
            for position in range(first, first + cfg.train.global_batch)
        ]
        loss = (step_loss or mean_loss)(model, task, store, chosen, base)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, cfg.optim.grad_clip)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def mean_loss(model, task, store, chosen: list[int], base) -> torch.Tensor:
    parts = [_loss(model, task, store, i) for i in chosen]
    return sum(part for part, _ in parts) / sum(n for _, n in parts)


def _row(position: int, seed: int, rows: int) -> int:
    epoch, place = divmod(position, rows)
    return int(permutation(seed, epoch, rows)[place])


def _model(cfg, task, trained: bool = True):
    ours = build_model(
        cfg.model, task.head, device=torch.device("cpu"), seed=cfg.seed, num_labels=task.num_labels
    )
    config = transformers.GPTJConfig.from_pretrained(
        cfg.model.path, num_labels=task.num_labels or 2
    )
    config._attn_implementation, config.pad_token_id = "eager", None
    theirs = getattr(transformers, HEADS[task.head].architecture)(config)
    theirs.load_state_dict(ours.state_dict())
    if type(cfg.adapter).__name__ == "FullConfig" or not trained:
        return theirs
    torch.manual_seed(cfg.seed)
    return peft.get_peft_model(
        theirs, adapters.peft_config(cfg.adapter, task.head), autocast_adapter_dtype=False
    )


def _loss(model, task, store, i: int) -> tuple[torch.Tensor, float]:
    """Summed loss of one example, and what it counts."""
    a, b = store.offsets[i : i + 2]
    ids = torch.tensor(store.column("ids")[a:b].astype("int64"))
    found: list[torch.Tensor] = []
    layer = [
        module
        for name, module in model.named_modules()
        if name.endswith((LAYERS[task.head], f"{LAYERS[task.head]}.modules_to_save.default"))
    ][-1]
    hook = layer.register_forward_hook(lambda module, given, output: found.append(output[0]))
    run_peft(model, ids)
    hook.remove()
    out = found[0][-len(ids) :]
    if task.head == "classify":
        names = sorted(store.names("label"))
        target = names.index(store.names("label")[store.column("label")[i]])
        return F.cross_entropy(out[-1], torch.tensor(target)), 1
    if task.head == "qa":
        first = int(store.column("context_at")[i])
        sides = [
            F.cross_entropy(out[first:, side], torch.tensor(int(store.column(name)[i]) - first))
            for side, name in enumerate(("start", "end"))
        ]
        return (sides[0] + sides[1]) / 2, 1
    scored = torch.tensor(store.column("scored")[a:b].astype(bool))
    return F.cross_entropy(out[:-1][scored[1:]], ids[1:][scored[1:]], reduction="sum"), int(
        scored[1:].sum()
    )
