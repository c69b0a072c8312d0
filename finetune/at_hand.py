"""Whether the data and weights that a config names are there: asked before anything long begins, and all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.assets_path import resolve
from finetune.config import Config, Init
from finetune.data.records import file_options, open_source
from finetune.errors import UserError
from finetune.gptj.load import local_folder, refuse_pointers

FETCHED = {"data/sotu": "Fetch it: python -m finetune.data.fetch sotu"}
"""Folders of data that a recipe names and the project has a command for."""


def absent(cfg: Config, download: bool) -> Iterator[UserError]:
    """One problem for each thing that cannot be found.

    Args:
        download: fetch the weights of a hub id now, where they are not on this machine; else only look here.
    """
    data = cfg.data
    for key, spec, split in (("data.train", data.train, data.split), ("data.eval", data.eval, data.eval_split)):
        if spec:
            fetch = FETCHED.get(str(Path(spec).parent), "")
            yield from _try(lambda spec=spec, split=split: open_source(spec, split, data.config, file_options(data)), key, fetch)
    yield from _try(lambda: refuse_pointers(local_folder(cfg.model, download), cfg.model.init is Init.pretrained), "", "")
    folder = Path(resolve(cfg.model.tokenizer or ".")).expanduser()
    if str(folder).startswith("/") and not folder.is_dir():
        yield UserError(f"there is no directory {folder}", "model.tokenizer", "Check the path, or leave model.tokenizer out.")


def _try(work: Callable[[], object], key: str, remedy: str) -> Iterator[UserError]:
    try:
        work()
    except UserError as error:
        where = f"{key} = {error.where}" if key and error.where else key or error.where
        yield UserError(error.problem, where, remedy or error.remedy)
