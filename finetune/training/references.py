"""The reference model's log-probabilities, computed before training and kept beside the tokens.

For preference tuning whose reference is not the trained model with its adapter switched off. The
file lies in the store's folder, under a name that changes with the model, and is written every few
batches: a run that was interrupted goes on where it was, and the next one finds all of it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from finetune.config import Config, FullConfig, Init, PeftConfig
from finetune.data.batches import eval_batches
from finetune.data.columns import Store
from finetune.data.fields import digest
from finetune.dist import World
from finetune.files import write_atomic
from finetune.gptj.adapter_init import starts_from_base
from finetune.gptj.adapter_start import start_folder
from finetune.gptj.load import local_folder, weights_identity
from finetune.sharding.engine import Engine
from finetune.tasks.base import Model, to_device
from finetune.tasks.preference import PreferenceTask
from finetune.training.evaluate import gather_columns
from finetune.training.inputs import Inputs

ROUND = 32
"""Batches of each rank between two writes."""


def reference_folder(cfg: Config) -> Path | None:
    """Return the weights that training starts from; None if it can switch its adapter off instead.

    Without an adapter that began from the base's weights, only a part of them is left.
    """
    if isinstance(cfg.adapter, PeftConfig) and cfg.adapter.start:
        return start_folder(cfg.adapter.start)
    changes_base = isinstance(cfg.adapter, FullConfig) or starts_from_base(cfg.adapter)
    return local_folder(cfg.model) if changes_base else None


def add_references(
    cfg: Config, engine: Engine, inputs: Inputs, world: World, beat: Callable[[], None]
) -> None:
    """Give the task the log-probabilities of every example, training and evaluation. Collective.

    Args:
        engine: the model as training starts from it.
        beat: called after every batch.
    """
    task = inputs.task
    assert isinstance(task, PreferenceTask) and task.reference
    name = world.on_main(
        lambda: reference_name(
            Path(task.reference),
            cfg.model.dtype.value,
            str(vars(cfg.adapter)),
            cfg.model.init,
            cfg.seed,
        )
    )
    engine.train(False)
    stores = [inputs.train, *(part.store for part in inputs.eval.values())]
    for store in {store.fingerprint: store for store in stores}.values():
        task.references[store.fingerprint] = reference_logps(
            engine, task, store, world, cfg.train.eval_batch, name, beat
        )
    engine.train()


def reference_name(
    folder: Path, dtype: str, adapter: str = "", init: Init = Init.pretrained, seed: int = 0
) -> str:
    """Return a name that changes with the reference model.

    Args:
        folder: of its weights.
        adapter: the settings of an adapter in it.
        seed: of weights that are drawn.
    """
    drawn = seed if init is Init.random else None
    return digest(weights_identity(folder), dtype, adapter, drawn)[:16]


def reference_logps(
    model: Model,
    task: PreferenceTask,
    store: Store,
    world: World,
    batch: int,
    name: str,
    beat: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return (examples, `task.reference_width`) log-probabilities, from the store's folder or computed.

    Every rank computes its share. Which examples share a batch does not depend on the number of
    ranks.
    """
    rows, width = task.rows(store), task.reference_width
    file = store.path / f"reference-{name}-{width}.npy"
    logps = world.on_main(lambda: np.load(file) if file.is_file() else None)
    if logps is None:
        logps = np.full((len(store), width), np.nan)
    missing = np.isnan(logps).any(1)
    batches = eval_batches(len(rows), batch, world.size, world.rank)
    for start in range(0, len(batches), ROUND):
        share, parts = batches[start : start + ROUND], []
        examples = [
            rows.examples[rows.pointers[i] : rows.pointers[i + 1]] for b in share for i in b
        ]
        mine = bool(examples) and bool(missing[np.concatenate(examples)].any())
        if not world.sum([mine])[0]:
            continue
        with torch.no_grad():
            for indices in share:
                collated = to_device(task.collate(store, rows, indices), world.device)
                parts.append(task.reference_logps(model, collated))
                beat()
        columns = gather_columns(parts, world)
        logps[columns["example"]] = columns["logps"]
        content = io.BytesIO()
        np.save(content, logps)
        world.on_main(partial(write_atomic, file, content.getvalue()))
    return logps
