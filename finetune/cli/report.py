"""launch/report.py: the page of one run written anew, or one page about several."""

from __future__ import annotations

import glob
from pathlib import Path

from finetune.cli.schemas import ReportConfig
from finetune.compose import Composed, recipe_config
from finetune.errors import EXIT_DONE, UserError
from finetune.reporting.metrics_log import METRICS
from finetune.reporting.page.build import build_report
from finetune.reporting.page.compare import PAGE, build_comparison
from finetune.reporting.page.files import CONFIG


def run(composed: Composed) -> int:
    """Write the page, and print where it is.

    Raises:
        UserError: no run is named, or a directory is none.
    """
    cfg: ReportConfig = composed.config
    patterns = [cfg.run, *cfg.runs] if cfg.run else cfg.runs
    named = [folder for pattern in patterns for folder in run_folders(pattern)]
    folders = list(dict.fromkeys(named))
    if not folders:
        raise UserError(
            "name a run", remedy="python launch/report.py run=runs/quickstart/...  or  'runs=[A,B]'"
        )
    if len(folders) == 1:
        out = Path(cfg.out) if cfg.out else None
        print(build_report(folders[0], out=out, recipe_of=recipe_config))
    else:
        print(build_comparison(folders, Path(cfg.out or PAGE).expanduser().absolute()))
    return EXIT_DONE


def run_folders(pattern: str) -> list[Path]:
    """Return the run directories that a path or pattern names, job 10 of a sweep after job 9.

    Raises:
        UserError: there is none.
    """
    whole = Path(pattern).expanduser()
    paths = [whole]
    if not whole.exists():  # a folder may be called run[1]
        paths = [Path(path) for path in glob.glob(str(whole))]
        paths.sort(key=lambda p: (str(p.parent), int(p.name) if p.name.isdigit() else 0, p.name))
    folders = [
        path.absolute() for path in paths if (path / METRICS).is_file() or (path / CONFIG).is_file()
    ]
    if not folders:
        raise UserError(
            "this is not a run directory: it holds neither config.yaml nor metrics.jsonl",
            pattern,
            "Pass run=DIR as training printed it.",
        )
    return folders
