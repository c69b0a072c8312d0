"""Tiny models of ours and Hugging Face's with the same weights, and several ranks played by threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GPTJConfig

from finetune.config import HEADS
from finetune.data.columns import Store
from finetune.data.packing import Sequences
from finetune.gptj.model import MODELS, copy_config
from finetune.tasks.base import to_device
from finetune.training.evaluate import EvalSet, evaluate_set

CPU = torch.device("cpu")
EOS = 50256
NEWLINE = 198


@dataclass
class Made:
    task: Any
    store: Store
    rows: Sequences

    def example(self, i: int) -> dict[str, list]:
        """The i-th example's token columns and scalars, as lists."""
        a, b = self.store.offsets[i : i + 2]
        columns = {
            n: c
            for n, c in self.store.columns.items()
            if n != "text" and c.kind in ("token", "scalar")
        }
        return {
            name: self.store.column(name)[a:b].tolist()
            if column.kind == "token"
            else self.store.column(name)[i].item()
            for name, column in columns.items()
        }

    def batch(self, indices=None) -> dict[str, Any]:
        return self.task.collate(
            self.store, self.rows, range(len(self.rows)) if indices is None else indices
        )

    def loss(self, model, indices=None) -> torch.Tensor:
        return self.task.loss(model, to_device(self.batch(indices), CPU))


def models(head: str, num_labels: int = 2, seed: int = 0, checkpointing: bool | str = False):
    """Our model and Hugging Face's eager one, fp32, with the same weights."""
    config = GPTJConfig(
        vocab_size=50400,
        n_embd=32,
        n_layer=2,
        n_head=2,
        rotary_dim=8,
        n_positions=256,
        num_labels=num_labels,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    torch.manual_seed(seed)
    ours = MODELS[head](config, checkpointing=checkpointing)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else torch.nn.init.normal_(
            parameter, 0.5, 0.2
        )
    config = copy_config(config)  # ours left its kind of attention on the other
    config._attn_implementation = "eager"
    config.pad_token_id = None  # one sequence at a time: the last token is the last token
    theirs = getattr(transformers, HEADS[head].architecture)(config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance: float = 2e-5) -> None:
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in b.values())
    for name in b:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


@dataclass
class Rank:
    """A World whose ranks are threads."""

    rank: int
    size: int
    shared: dict
    barrier: threading.Barrier
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(30)
        values = [self.shared[rank] for rank in range(self.size)]
        self.barrier.wait(30)
        return values

    def sum(self, values):
        return [float(sum(column)) for column in zip(*self.gather(values), strict=True)]

    def on_main(self, work):
        return self.gather(work() if self.main else None)[0]


def evaluate_on(size: int, model, made: Made, batch: int = 2):
    """Metrics on every one of `size` ranks; and the predictions of rank 0."""
    shared, barrier, found = {}, threading.Barrier(size), [None] * size

    def run(rank):
        world, part = Rank(rank, size, shared, barrier), EvalSet(made.store, made.rows)
        found[rank] = evaluate_set(model, made.task, part, world, batch)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [metrics for metrics, _ in found], found[0][1]
