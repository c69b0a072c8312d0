"""Check up front that the data and weights that a config names are there, and that the model is long enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.assets_path import resolve
from finetune.check import length_problems
from finetune.config import GPTJ_POSITIONS, Config, Init, ModelConfig
from finetune.data.records import file_options, open_source
from finetune.errors import UserError
from finetune.gptj.load import local_folder, refuse_pointers
from finetune.shape import load_shape

FETCHED = {"data/sotu": "Fetch it: python -m finetune.data.fetch sotu"}
"""Folders of data that a recipe names and the project has a command for."""


def absent(cfg: Config, download: bool) -> Iterator[UserError]:
    """One problem for each thing that cannot be found.

    Args:
        download: fetch the weights of a hub id now, where they are not on this machine; else only look here.
    """
    data = cfg.data
    positions = _positions(cfg.model)
    too_long = list(length_problems(cfg, positions or GPTJ_POSITIONS))
    yield from too_long
    for key, spec, split in (("data.train", data.train, data.split), ("data.eval", data.eval, data.eval_split)):
        if spec:
            fetch = FETCHED.get(str(Path(spec).parent), "")
            yield from _try(lambda spec=spec, split=split: open_source(spec, split, data.config, file_options(data)), key, fetch)
    yield from _try(lambda: refuse_pointers(local_folder(cfg.model, download and not too_long),
                                            cfg.model.init is Init.pretrained), "", "")
    if positions is None and not too_long:
        yield from length_problems(cfg, _positions(cfg.model) or GPTJ_POSITIONS)
    folder = Path(resolve(cfg.model.tokenizer or ".")).expanduser()
    if str(folder).startswith("/") and not folder.is_dir():
        yield UserError(f"there is no directory {folder}", "model.tokenizer", "Check the path, or leave model.tokenizer out.")


def _positions(cfg: ModelConfig) -> int | None:
    """The model's n_positions; None where its config.json is not here, or is broken, as loading will tell."""
    try:
        return load_shape(resolve(cfg.path), revision=cfg.revision).n_positions
    except UserError:
        return None


def _try(work: Callable[[], object], key: str, remedy: str) -> Iterator[UserError]:
    try:
        work()
    except UserError as error:
        where = f"{key} = {error.where}" if key and error.where else key or error.where
        yield UserError(error.problem, where, remedy or error.remedy)
