"""Inputs of a training run: tokenizer, task, and the encoded training and evaluation data.

`absent` checks up front that the configured data and weights exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from finetune.assets.paths import resolve
from finetune.check import check, length_problems
from finetune.config import (
    GPTJ_POSITIONS,
    Config,
    DataConfig,
    Init,
    WeightBy,
    own_tokens,
    plain_config,
)
from finetune.data.batches import Drawn, Order
from finetune.data.cache import build_store
from finetune.data.columns import Store, open_store
from finetune.data.fields import digest
from finetune.data.mixture import (
    DataSource,
    draws,
    eval_sources,
    held_out_amount,
    hold_out,
    train_sources,
)
from finetune.data.packing import Sequences, efficiency, joined, sequence_tokens
from finetune.data.sources import data_notes, file_options, open_source
from finetune.data.tokenizer import (
    TokenLimit,
    load_tokenizer,
    token_ids,
    token_limit,
    token_problems,
)
from finetune.dist import World
from finetune.errors import UserError, plural
from finetune.gptj.adapter_init import init_problems
from finetune.gptj.adapter_start import start_problems, start_task
from finetune.gptj.load import local_folder, refuse_pointers, tokenizer_of
from finetune.planning.shape import load_shape
from finetune.reporting.redact import refuse_secrets
from finetune.reporting.terminal import Phase
from finetune.tasks.base import Batch, Task
from finetune.tasks.build import build_task
from finetune.tasks.preview import preview
from finetune.training.evaluate import EvalSet

TOO_LARGE = (
    "Take the model's own tokenizer (leave model.tokenizer out), or GPT-J's, which reads such "
    "marks as text: model.tokenizer=asset:tokenizer; or give the model the rows: "
    "model.resize_token_embeddings(len(tokenizer)) in "
    "transformers, saved as another model.path."
)
"""Remedy for a tokenizer that has more entries than the embedding has rows."""


@dataclass
class TrainSource:
    """One source of the training data, without the examples that are held out."""

    name: str
    examples: int
    tokens: int
    rows: int
    """Sequences that its examples are packed into."""
    drawn: int
    """Sequences that an epoch draws of it."""


@dataclass
class Inputs:
    tokenizer: Any
    task: Task
    train: Store
    rows: Sequences
    """Training examples that share a row, source by source."""
    sources: list[TrainSource]
    eval: dict[str, EvalSet]
    """Evaluation sets by name; the only one has the name "", and there may be none."""
    identity: str
    """A name that changes with the training data, the rows held out of them, and the mixture."""
    notes: dict[str, list[str]]
    """Remarks on the files, and on what encoding did to the data (texts cut), by train and eval."""
    tokens: dict[str, int] = field(default_factory=dict)
    """The task's own tokens and their ids."""

    def collate(self, indices: list[int]) -> Batch:
        """Return these rows of the training data as one numpy batch."""
        return self.task.collate(self.train, self.rows, indices)

    def order(self, seed: int) -> Order:
        """Return the order in which rows are trained on."""
        counts = [source.drawn for source in self.sources]
        return Order([source.rows for source in self.sources], seed, shuffle=True, counts=counts)

    def drawn(self, seed: int) -> Drawn:
        """Return the counter of what each source has given to the training so far."""
        names = [source.name for source in self.sources]
        return Drawn(self.order(seed), names, sequence_tokens(self.rows))

    def about(self) -> dict[str, Any]:
        """Return what the head learned from the data, for evaluation and export."""
        task = self.task
        about = task.describe() | ({"num_labels": task.num_labels} if task.num_labels else {})
        return about | ({"tokens": self.tokens} if self.tokens else {})

    def statistics(self, max_length: int) -> dict[str, Any]:
        """Return the content of data_stats.json."""
        train = self.train.stats | {
            "examples": sum(source.examples for source in self.sources),
            "tokens": sum(source.tokens for source in self.sources),
            "rows": len(self.rows),
            "packing_efficiency": efficiency(self.rows, max_length),
            "notes": self.notes["train"],
        }
        if len(self.sources) > 1:
            train["sources"] = {
                s.name: asdict(s) | {"tokens_per_epoch": round(s.tokens * s.drawn / s.rows)}
                for s in self.sources
            }
        found = {"train": train}
        for name, part in self.eval.items():
            own = {"notes": [] if len(found) > 1 else self.notes["eval"]}
            if part.store is self.train:
                own |= {"rows": len(part.rows), "tokens": int(part.rows.lengths.sum())}
            else:
                own = part.store.stats | own
            found[f"eval {name}".strip()] = own
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
    tokenizer = load_tokenizer(tokenizer_of(cfg.model), cfg.task)
    task = build_task(cfg.task, tokenizer, cfg.train.packing)
    limit = token_limit(tokenizer, vocab_size, TOO_LARGE)
    if limit and task.head == "lm" and cfg.train.sample_every:
        encode = getattr(
            task, "prompt_ids", lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        for prompt in cfg.train.sample_prompts:
            limit.check(encode(prompt), "train.sample_prompts")
    encoded = partial(
        encode_sources, data=cfg.data, task=task, limit=limit, world=world, phase=phase
    )

    # Encode the sources into one store, and pack what of each is not held out.
    sources = train_sources(cfg.data)
    train = encoded(sources)
    # An adapter that is trained on keeps the order of its labels.
    task.prepare(train, start_task(cfg.adapter) if task.head == "classify" else None)
    held = held_out(train, cfg.data)
    chosen = [
        start + np.flatnonzero(~held[start:end]) if held is not None else np.arange(start, end)
        for start, end in pairwise(train.bounds)
    ]
    for source, examples in zip(sources, chosen, strict=True):
        if not len(examples):
            raise UserError(
                "every row of this source has the text of a row that is held out for evaluation",
                source.path,
                "Leave the source out, or give evaluation data of their own: data.eval=FILE.",
            )
    packed = [
        task.rows(train, None if len(examples) == len(train) else examples) for examples in chosen
    ]
    tokens = [int(rows.lengths.sum(dtype=np.int64)) for rows in packed]
    sizes, by = [len(rows) for rows in packed], cfg.data.weight_by
    if by is WeightBy.auto:
        by = WeightBy.tokens if task.head == "lm" else WeightBy.rows
    drawn = draws(sources, sizes, tokens, [len(examples) for examples in chosen], by)
    parts = [
        TrainSource(source.name, len(examples), *counts)
        for source, examples, *counts in zip(sources, chosen, tokens, sizes, drawn, strict=True)
    ]
    identity = train.fingerprint
    if held is not None or drawn != sizes or len(sources) > 1:
        identity = digest(identity, held_out_amount(cfg.data), sizes, drawn)
    evaluated = evaluation_sets(cfg.data, task, train, encoded)
    rows = joined(packed)
    if cfg.data.preview:
        say(preview(task, train, rows, tokenizer, cfg.data.preview))

    # Tell what is remarkable about the files, and what encoding left out or cut.
    notes = world.on_main(lambda: data_notes(cfg.data))
    stores = {"train": train} | {
        f"eval {name}".strip(): part.store
        for name, part in evaluated.items()
        if part.store is not train
    }
    for name, store in stores.items():
        own = notes["train" if store is train else "eval"]
        if store is not train:
            own += overlap_note(store, train, own)
        # Stores of older versions do not count rows without an example.
        if left_out := store.stats.get("left_out", 0):
            own.append(
                f"{left_out:,} of {store.stats['documents']:,} rows are empty or left out by their "
                "own mark"
            )
        own += task.notes(store)
        for line in own:
            say(f"{name} data: {line}")
        if bad := store.stats["bad_rows"]:
            say(
                f"{name} data: {plural(bad, 'bad row')} left out; "
                f"{store.stats['bad_row_messages'][0]}"
            )
    tokens = token_ids(tokenizer, cfg.task)
    return Inputs(tokenizer, task, train, rows, parts, evaluated, identity, notes, tokens)


def encode_sources(
    sources: list[DataSource],
    data: DataConfig,
    task: Task,
    limit: TokenLimit | None,
    world: World,
    phase: Callable[[str], AbstractContextManager[Phase | None]] = lambda name: nullcontext(),
) -> Store:
    """Return the store of some sources, one behind the other; rank 0 builds it. Collective."""

    def build() -> Path:
        with phase(f"tokenising {', '.join(source.path for source in sources)}") as shown:

            def progress(done: float, total: float, tokens: int) -> None:
                shown.total = total
                shown.update(done)

            store = build_store(
                sources,
                task.encoder(),
                on_bad_row=data.on_bad_row.value,
                cache_dir=Path(data.cache_dir).expanduser() if data.cache_dir else None,
                max_bad_rows=data.max_bad_rows,
                options=file_options(data),
                progress=progress if shown else None,
                limit=limit,
            )
        return store.path

    return open_store(world.on_main(build))


def held_out(train: Store, data: DataConfig) -> np.ndarray | None:
    """Return which examples of the training data are evaluated and not trained on, (N,) bool; None: none is."""
    amount = held_out_amount(data)
    if amount is None:
        return None
    windows = train.column("window") if "window" in train.columns else np.zeros(len(train))
    return hold_out(np.asarray(train.column("text")), windows == 0, train.bounds, amount)


def evaluation_sets(
    data: DataConfig, task: Task, train: Store | None, encoded: Callable[[list[DataSource]], Store]
) -> dict[str, EvalSet]:
    """Return the evaluation sets by name, "" where there is only one. Collective.

    Args:
        train: the store of the training data; None: it is encoded where rows are held out of it.
        encoded: sources -> their store.
    """
    if held_out_amount(data) is not None:
        store = encoded(train_sources(data)) if train is None else train
        return {"": EvalSet(store, task.rows(store, np.flatnonzero(held_out(store, data))))}
    sources = eval_sources(data)
    named = isinstance(data.eval, list) or (isinstance(data.eval, dict) and "path" not in data.eval)
    stores = {source.name if named else "": encoded([source]) for source in sources}
    return {name: EvalSet(store, task.rows(store)) for name, store in stores.items()}


def overlap_note(store: Store, train: Store, notes: list[str]) -> list[str]:
    """Return a note on evaluation rows whose texts are trained on, unless `notes` has one on their files."""
    both = int(np.isin(store.column("text"), train.column("text")).sum())
    if not both or any(note.startswith("trained on as well") for note in notes):
        return []
    return [
        f"trained on as well: the texts of {both:,} of {len(store):,} examples; figures on these "
        "tell how well the model remembers them, not how well it does on new ones"
    ]


def refuse_problems(cfg: Config, world: World) -> None:
    """Check the whole configuration before anything is read or written; on rank 0.

    Raises:
        UserError: a secret among the settings, alone, as other problems may repeat it; or all other
            problems.
    """
    refuse_secrets(plain_config(cfg), "the configuration")
    check(cfg, world.size, world.device.type == "cuda", absent)


# Check up front that the configured data and weights exist, and that the model is long enough.
BITS = "quant", ("bitsandbytes",)
TEXTS = "metrics of generated answers need", "eval", ("rouge_score", "sacrebleu")
SUITE = "lm-eval's tasks need", "eval", ("lm_eval", "accelerate")
"""Who needs optional packages, the extra that installs them, and their names."""
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
    for key, read in (("data.train", train_sources), ("data.eval", eval_sources)):
        try:
            sources = read(data)
        except UserError:
            continue  # reported by `check`
        for source in sources:
            yield from problem(
                partial(open_source, source.path, source.split, source.config, file_options(data)),
                key,
                FETCHED.get(str(Path(source.path).parent), ""),
            )
    fetch, needs_weights = download and not too_long, model.init is Init.pretrained
    yield from problem(lambda: refuse_pointers(local_folder(model, fetch), needs_weights))
    if known is None and not too_long:  # the download may have brought a config.json
        yield from length_problems(cfg, positions() or GPTJ_POSITIONS)
    if own_tokens(cfg.task):
        with suppress(UserError):  # a model or tokenizer that cannot be read is reported elsewhere
            rows = load_shape(str(local_folder(model, download=False))).vocab_size
            yield from token_problems(tokenizer_of(model), cfg.task, rows)
    yield from start_problems(cfg)
    yield from init_problems(cfg)
    quantize, optimizer, evaluation = model.quantize.value, cfg.optim.name.value, cfg.eval
    for wanted, key, value, usual, user, extra, packages in (
        (quantize != "none", "model.quantize", quantize, "none", f"{quantize} needs", *BITS),
        (optimizer == "adamw8bit", "optim.name", optimizer, "adamw", f"{optimizer} needs", *BITS),
        (evaluation.generate, "eval.generate", evaluation.generate, 0, *TEXTS),
        (evaluation.lm_eval, "eval.lm_eval", evaluation.lm_eval, "[]", *SUITE),
    ):
        for package in packages if wanted else ():
            if not find_spec(package):
                yield UserError(
                    f"{user} {package}, which is not installed",
                    f"{key} = {value}",
                    f"Install it: pip install -e '.[{extra}]', or try {key}={usual}.",
                )
    if cfg.eval.task_dir and not Path(cfg.eval.task_dir).expanduser().is_dir():
        yield UserError(
            f"there is no directory {cfg.eval.task_dir}",
            "eval.task_dir",
            "It holds lm-eval's task yaml files.",
        )
    folder = Path(resolve(model.tokenizer or ".")).expanduser()
    if str(folder).startswith("/") and not folder.is_dir():
        yield UserError(
            f"there is no directory {folder}",
            "model.tokenizer",
            "Check the path, or leave model.tokenizer out.",
        )
