"""Inputs of a training run: tokenizer, task, and the encoded training and evaluation data.

`absent` checks up front that the configured data and weights exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.assets.paths import resolve
from finetune.check import length_problems
from finetune.config import GPTJ_POSITIONS, Config, Init, OptimName, Quantize
from finetune.data.cache import build_store
from finetune.data.columns import Store, open_store
from finetune.data.packing import Sequences, efficiency
from finetune.data.sources import data_notes, file_options, open_source
from finetune.data.tokenizer import load_tokenizer, token_limit
from finetune.dist import World
from finetune.errors import UserError
from finetune.gptj.adapter_start import start_problems, start_task
from finetune.gptj.load import local_folder, refuse_pointers, tokenizer_of
from finetune.planning.shape import load_shape
from finetune.reporting.terminal import Phase
from finetune.tasks.base import Batch, Task
from finetune.tasks.build import build_task
from finetune.tasks.preview import preview

TOO_LARGE = (
    "Take the model's own tokenizer (leave model.tokenizer out), or GPT-J's, which reads such marks as text: "
    "model.tokenizer=asset:tokenizer; or give the model the rows: model.resize_token_embeddings(len(tokenizer)) in "
    "transformers, saved as another model.path."
)
"""What to do about a tokenizer that has more entries than the embedding has rows."""


@dataclass
class Inputs:
    tokenizer: Any
    task: Task
    train: Store
    eval: Store | None
    rows: Sequences
    """Which training examples share a row."""
    notes: dict[str, list[str]]
    """What is remarkable about the files, and what encoding did to the data (texts cut), by train and eval."""

    def collate(self, indices: list[int]) -> Batch:
        """Return these rows of the training data as one numpy batch."""
        return self.task.collate(self.train, self.rows, indices)

    def about(self) -> dict[str, Any]:
        """Return what the head learned from the data, for evaluation and export."""
        task = self.task
        return task.describe() | ({"num_labels": task.num_labels} if task.num_labels else {})

    def statistics(self, max_length: int) -> dict[str, Any]:
        """Return the content of data_stats.json."""
        train = {"rows": len(self.rows), "packing_efficiency": efficiency(self.rows, max_length)}
        found = {"train": self.train.stats | train | {"notes": self.notes["train"]}}
        if self.eval:
            found["eval"] = self.eval.stats | {"notes": self.notes["eval"]}
        return found


def prepare_inputs(
    cfg: Config,
    vocab_size: int,
    world: World,
    phase: Callable[[str], AbstractContextManager[Phase | None]],
    say: Callable[[str], None],
) -> Inputs:
    """Encode the data, or read them from the cache; rank 0 works and the others wait. Collective.

    Args:
        vocab_size: rows of the model's embedding.
        phase: context, by name, that shows progress to the user of rank 0.

    Raises:
        UserError: data, tokenizer or task settings cannot be used; the message names file and line,
            or the key.
    """
    tokenizer = load_tokenizer(tokenizer_of(cfg.model))
    task = build_task(cfg.task, tokenizer, cfg.train.packing)
    limit = token_limit(tokenizer, vocab_size, TOO_LARGE)
    if limit and task.head == "lm" and cfg.train.sample_every:
        encode = getattr(
            task, "prompt_ids", lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        for prompt in cfg.train.sample_prompts:
            limit.check(encode(prompt), "train.sample_prompts")

    def encoded(spec: str, split: str) -> Store:
        def build() -> Path:
            with phase(f"tokenising {spec}") as shown:

                def progress(done: float, total: float, tokens: int) -> None:
                    shown.total = total
                    shown.update(done)

                store = build_store(
                    resolve(spec),
                    split,
                    task.encoder(),
                    on_bad_row=cfg.data.on_bad_row.value,
                    cache_dir=Path(cfg.data.cache_dir).expanduser() if cfg.data.cache_dir else None,
                    max_bad_rows=cfg.data.max_bad_rows,
                    config=cfg.data.config,
                    options=file_options(cfg.data),
                    progress=progress if shown else None,
                    limit=limit,
                )
            return store.path

        return open_store(world.on_main(build))

    train = encoded(cfg.data.train, cfg.data.split)
    # An adapter that is trained on keeps the order of its labels.
    task.prepare(train, start_task(cfg.adapter) if task.head == "classify" else None)
    held_out = encoded(cfg.data.eval, cfg.data.eval_split) if cfg.data.eval else None
    rows = task.rows(train)
    if cfg.data.preview:
        say(preview(task, train, rows, tokenizer, cfg.data.preview))

    # Tell what is remarkable about the files, and what encoding left out or cut.
    notes = world.on_main(lambda: data_notes(cfg.data))
    for name, store in (("train", train), ("eval", held_out)):
        if store is None:
            continue
        # Stores of older versions do not count rows without an example.
        if left_out := store.stats.get("left_out", 0):
            notes[name].append(
                f"{left_out:,} of {store.stats['documents']:,} rows are empty or left out by their "
                "own mark"
            )
        notes[name] += task.notes(store)
        for line in notes[name]:
            say(f"{name} data: {line}")
        if bad := store.stats["bad_rows"]:
            say(
                f"{name} data: {bad} bad row{'s' if bad > 1 else ''} left out; "
                f"{store.stats['bad_row_messages'][0]}"
            )
    return Inputs(tokenizer, task, train, held_out, rows, notes)


# Check up front that the configured data and weights exist, and that the model is long enough.
FETCHED = {"data/sotu": "Fetch it: python -m tools.fetch sotu"}
"""Folders of data that a recipe names and the project has a command for."""


def absent(cfg: Config, download: bool) -> Iterator[UserError]:
    """Yield one problem for each file, folder or model that cannot be found.

    Args:
        download: fetch the weights of a hub id now if they are not on this machine; otherwise only
            look on this machine.
    """
    data, model = cfg.data, cfg.model

    def problem(work: Callable[[], object], key: str = "", remedy: str = "") -> list[UserError]:
        try:
            work()
        except UserError as error:
            where = f"{key} = {error.where}" if key and error.where else key or error.where
            return [UserError(error.problem, where, remedy or error.remedy)]
        return []

    def positions() -> int | None:
        try:
            return load_shape(resolve(model.path), revision=model.revision).n_positions
        except UserError:
            return None  # config.json is missing or broken, which loading the model reports

    known = positions()
    too_long = list(length_problems(cfg, known or GPTJ_POSITIONS))
    yield from too_long
    for key, spec, split in (
        ("data.train", data.train, data.split),
        ("data.eval", data.eval, data.eval_split),
    ):
        if spec:
            options = file_options(data)
            yield from problem(
                partial(open_source, spec, split, data.config, options),
                key,
                FETCHED.get(str(Path(spec).parent), ""),
            )
    fetch, needs_weights = download and not too_long, model.init is Init.pretrained
    yield from problem(lambda: refuse_pointers(local_folder(model, fetch), needs_weights))
    if known is None and not too_long:  # the download may have brought a config.json
        yield from length_problems(cfg, positions() or GPTJ_POSITIONS)
    yield from start_problems(cfg)
    for key, value, usual in (
        ("model.quantize", model.quantize, Quantize.none),
        ("optim.name", cfg.optim.name, OptimName.adamw),
    ):
        wanted = value is not usual and value is not OptimName.adafactor
        if wanted and not find_spec("bitsandbytes"):
            yield UserError(
                f"{value.value} needs bitsandbytes, which is not installed",
                f"{key} = {value.value}",
                f"Install it: pip install -e '.[quant]', or try {key}={usual.value}.",
            )
    folder = Path(resolve(model.tokenizer or ".")).expanduser()
    if str(folder).startswith("/") and not folder.is_dir():
        yield UserError(
            f"there is no directory {folder}",
            "model.tokenizer",
            "Check the path, or leave model.tokenizer out.",
        )
