"""Tables of differences in settings: between a run and its recipe, and between several runs."""

from __future__ import annotations

from typing import Any

from finetune.config import Config, plain_config
from finetune.reporting.page.tables import Table, flat

NOT_SETTINGS = ("run_dir", "name")
ABSENT = "-"


def from_recipe(config: dict[str, Any], recipe_config: Config | None) -> Table | None:
    """Return the keys whose value differs from the recipe's; None if the recipe is not known here.

    Compares with the recipe as it is now. The page says so, since a recipe may change after a run.
    """
    if recipe_config is None:
        return None
    recipe, ours = dict(flat(plain_config(recipe_config))), dict(flat(config))
    # Keys that only the recipe has were added after the run.
    keys = [key for key in ours if key not in NOT_SETTINGS and recipe.get(key) != ours[key]]
    return Table(
        ["key", "recipe", "this run"], [[key, recipe.get(key, ABSENT), ours[key]] for key in keys]
    )


def between(names: list[str], settings: list[dict[str, Any]]) -> Table:
    """Return the keys that differ between several configs or environments; one column each."""
    columns = [dict(flat(values)) for values in settings]
    keys = dict.fromkeys(key for column in columns for key in column)
    different = [
        key
        for key in keys
        if key not in NOT_SETTINGS and len({column.get(key, ABSENT) for column in columns}) > 1
    ]
    return Table(
        ["key", *names],
        [[key, *(column.get(key, ABSENT) for column in columns)] for key in different],
    )
