"""What the model will see in a run: tokenizer, task, and the encoded training and evaluation data."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.assets_path import resolve
from finetune.config import Config
from finetune.data.columns import Store, open_store
from finetune.data.packing import Rows, efficiency
from finetune.data.records import data_notes, file_options
from finetune.data.store import build_store
from finetune.data.tokenizer import TokenLimit, load_tokenizer, token_limit
from finetune.display import Display
from finetune.dist import World
from finetune.gptj.load import local_folder, tokenizer_of
from finetune.preview import preview
from finetune.shape import load_shape
from finetune.tasks import build_task
from finetune.tasks.base import Batch, Task

TOO_LARGE = ("Take the model's own tokenizer (leave model.tokenizer out), or GPT-J's, which reads such marks as text: "
             "model.tokenizer=asset:tokenizer; or give the model the rows: model.resize_token_embeddings(len(tokenizer)) in "
             "transformers, saved as another model.path.")
"""What to do about a tokenizer that has more entries than the embedding has rows."""


@dataclass
class Inputs:
    tokenizer: Any
    task: Task
    train: Store
    eval: Store | None
    rows: Rows
    """Which training examples share a row."""
    notes: dict[str, list[str]]
    """What is remarkable about the files, and what encoding did to the data (texts cut), by train and eval."""

    def collate(self, indices: list[int]) -> Batch:
        """These rows of the training data as one numpy batch."""
        return self.task.collate(self.train, self.rows, indices)

    def about(self) -> dict[str, Any]:
        """What the head learned from the data, for evaluation and export."""
        task = self.task
        return task.describe() | ({"num_labels": task.num_labels} if task.num_labels else {})

    def statistics(self, max_length: int) -> dict[str, Any]:
        """The content of data_stats.json."""
        train = {"rows": len(self.rows), "packing_efficiency": efficiency(self.rows, max_length)}
        found = {"train": self.train.stats | train | {"notes": self.notes["train"]}}
        if self.eval:
            found["eval"] = self.eval.stats | {"notes": self.notes["eval"]}
        return found


def prepare_inputs(cfg: Config, world: World, display: Display | None, say) -> Inputs:
    """Encode the data, or find them in the cache; rank 0 works and the others wait. Collective.

    Raises:
        UserError: data, tokenizer or task settings that cannot be used; the message names file and line, or the key.
    """
    tokenizer = load_tokenizer(tokenizer_of(cfg.model))
    task = build_task(cfg.task, tokenizer, cfg.train.packing)
    limit = token_limit(tokenizer, load_shape(str(local_folder(cfg.model))).vocab_size, TOO_LARGE)
    if limit and task.head == "lm" and cfg.train.sample_every:
        encode = getattr(task, "prompt_ids", lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        for prompt in cfg.train.sample_prompts:
            limit.check(encode(prompt), "train.sample_prompts")
    train = _store(cfg, task, cfg.data.train, cfg.data.split, world, display, limit)
    assert train is not None
    task.prepare(train, None)
    held_out = _store(cfg, task, cfg.data.eval, cfg.data.eval_split, world, display, limit)
    rows = task.rows(train)
    if cfg.data.preview:
        say(preview(task, train, rows, tokenizer, cfg.data.preview))
    notes = world.on_main(lambda: data_notes(cfg.data))
    for name, store in (("train", train), ("eval", held_out)):
        notes[name] += _left_out(store) + task.notes(store) if store else []
        for line in notes[name]:
            say(f"{name} data: {line}")
        if store and (bad := store.stats["bad_rows"]):
            say(f"{name} data: {bad} bad row{'s' if bad > 1 else ''} left out; {store.stats['bad_row_messages'][0]}")
    return Inputs(tokenizer, task, train, held_out, rows, notes)


def _left_out(store: Store) -> list[str]:
    """A note on rows without an example; stores of older versions do not count them."""
    rows = store.stats.get("left_out", 0)
    return [f"{rows:,} of {store.stats['documents']:,} rows are empty or left out by their own mark"] if rows else []


def _store(cfg: Config, task: Task, spec: str | None, split: str, world: World, display: Display | None,
           limit: TokenLimit | None) -> Store | None:
    """Encoded data from the cache; built by rank 0 while the others wait."""
    if not spec:
        return None
    data = cfg.data

    def build() -> Path:
        with display.phase(f"tokenising {spec}") if display else nullcontext() as phase:
            def progress(done: float, total: float, tokens: int) -> None:
                phase.total = total
                phase.update(done)

            store = build_store(resolve(spec), split, task.encoder(), on_bad_row=data.on_bad_row.value,
                                cache_dir=Path(data.cache_dir).expanduser() if data.cache_dir else None,
                                max_bad_rows=data.max_bad_rows, config=data.config, options=file_options(data),
                                progress=progress if phase else None, limit=limit)
        return store.path

    return open_store(world.on_main(build))
