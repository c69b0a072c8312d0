"""report.html and curves.png from the files of a run.

Flow: `read_run` -> a context of plain values, every text still unescaped -> page.html, which escapes -> one
file that asks nothing of the network. `Report` does it while a run goes on, without the picture: matplotlib
would count as memory of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.files import write_atomic, write_json
from finetune.reporting.callbacks import Callback, RunInfo
from finetune.reporting.page import tables
from finetune.reporting.page.charts import draw_all
from finetune.reporting.page.curves import curves
from finetune.reporting.page.data import sections
from finetune.reporting.page.files import DATA, ENVIRONMENT, read_run
from finetune.reporting.page.template import FOLDER, render
from finetune.reporting.redact import redact

PAGE, PICTURE = "report.html", "curves.png"
REBUILD_SECONDS = 30.0


RecipeOf = Callable[[str], Config | None]
"""Name of a recipe -> its config as it is now; None where it is not known."""


def build_report(
    run_dir: Path | str,
    picture: bool = True,
    out: Path | None = None,
    recipe_of: RecipeOf | None = None,
) -> Path:
    """Write run_dir/report.html (and curves.png) from what the run has written so far.

    Args:
        out: the page's place, instead of the run directory.
        recipe_of: for the table of what differs from the run's recipe; None: without that table.

    Returns:
        The page's path.
    """
    run = read_run(run_dir)
    charts = curves(run)
    name, recipe = tables.run_name(run), str(run.config.get("name") or "")
    context = {
        "name": name,
        "run_dir": str(run.run_dir),
        "status": tables.status(run),
        "status_words": tables.status_words(run),
        "running": not run.result,
        "error": run.result.get("error"),
        "tiles": tables.tiles(run),
        "drawings": draw_all(charts),
        "memory": tables.memory(run),
        "evaluations": tables.evaluations(run),
        "later": tables.later(run),
        "groups": tables.groups(run),
        "sources": tables.sources(run),
        "confusion": tables.confusion(run),
        "data": sections(run.data),
        "samples": tables.samples(run),
        "differences": tables.from_recipe(run.config, recipe_of(recipe) if recipe_of else None),
        "recipe": recipe,
        "config": tables.flat(run.config),
        "environment": tables.environment_rows(run),
        "commands": tables.commands(run),
    }
    page = write_atomic(out or run.run_dir / PAGE, render(FOLDER / "page.html", context))
    if picture and charts:
        from finetune.reporting.page.picture import curves_png

        write_atomic(run.run_dir / PICTURE, curves_png(charts, title=name))
    return page


class Report(Callback):
    """Rebuild the page at the start, at steps and evaluations, at most every 30 seconds, and at the end."""

    def __init__(self, run_dir: Path | None = None, recipe_of: RecipeOf | None = None) -> None:
        # Known from the beginning, so that a run which fails before its first step has a page as well.
        self.run_dir, self.recipe_of = run_dir, recipe_of
        self.built = float("-inf")

    def start(self, run: RunInfo) -> None:
        self.run_dir = run.run_dir
        # The page is made from files alone, so what only this process knows becomes one.
        if run.data:
            write_json(run.run_dir / DATA, run.data)
        overrides = [str(word) for word in run.extra.get("overrides") or []]
        about = {"world_size": run.world_size, "total_steps": run.total_steps, **redact(run.extra)}
        # The page's "continue" command is made of these words, which `check` has found free of secrets.
        write_json(run.run_dir / ENVIRONMENT, about | {"overrides": overrides})
        self.rebuild()

    def train_step(self, record: dict[str, Any]) -> None:
        if time.monotonic() - self.built >= REBUILD_SECONDS:
            self.rebuild()

    def evaluation(self, record: dict[str, Any]) -> None:
        self.train_step(record)

    def rebuild(self) -> None:
        """Build the page now, from what the run has written so far, without the picture."""
        if self.run_dir is not None:
            build_report(self.run_dir, picture=False, recipe_of=self.recipe_of)
            self.built = time.monotonic()

    def finish(self, result: dict[str, Any]) -> None:
        if self.run_dir is not None:
            build_report(self.run_dir, recipe_of=self.recipe_of)
