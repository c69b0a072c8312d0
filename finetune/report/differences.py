"""What sets runs apart: a run's settings against its recipe's, and the settings of several runs against each other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from finetune.app import compose_train
from finetune.plain import plain_config
from finetune.report.tables import Table, flat

NOT_SETTINGS = ("run_dir", "name")
ABSENT = "-"


def from_recipe(config: dict[str, Any]) -> Table | None:
    """Keys whose value is not the recipe's; None where the recipe is not known here.

    Compared with the recipe as it is now: the page says so, since a recipe may change after a run.
    """
    recipe = _recipe(str(config.get("name") or ""))
    if recipe is None:
        return None
    ours = dict(flat(config))
    # Keys that only the recipe has came after the run.
    keys = [key for key in ours if key not in NOT_SETTINGS and recipe.get(key) != ours[key]]
    return Table(["key", "recipe", "this run"], [[key, recipe.get(key, ABSENT), ours[key]] for key in keys])


def between(names: list[str], settings: list[dict[str, Any]]) -> Table:
    """Keys that are not the same in all of several configs or environments; one column each."""
    columns = [dict(flat(values)) for values in settings]
    keys = dict.fromkeys(key for column in columns for key in column)
    different = [key for key in keys
                 if key not in NOT_SETTINGS and len({column.get(key, ABSENT) for column in columns}) > 1]
    return Table(["key", *names], [[key, *(column.get(key, ABSENT) for column in columns)] for key in different])


@lru_cache(maxsize=8)
def _recipe(name: str) -> dict[str, str] | None:
    try:
        return dict(flat(plain_config(compose_train([f"recipe={name}"] if name != "custom" else []))))
    except Exception:
        # A page must not fail for want of a comparison: config groups may have moved on since the run.
        return None
