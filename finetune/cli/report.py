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
    """Raises UserError: no run, or a directory that is none."""
    cfg: ReportConfig = composed.config
    found = [
        folder
        for pattern in [*([cfg.run] if cfg.run else []), *cfg.runs]
        for folder in run_folders(pattern)
    ]
    folders = list(dict.fromkeys(found))
    if not folders:
        raise UserError(
            "name a run", remedy="python launch/report.py run=runs/quickstart/...  or  'runs=[A,B]'"
        )
    if len(folders) == 1:
        print(
            build_report(
                folders[0], out=Path(cfg.out) if cfg.out else None, recipe_of=recipe_config
            )
        )
    else:
        print(build_comparison(folders, Path(cfg.out or PAGE).expanduser().absolute()))
    return EXIT_DONE


def run_folders(pattern: str) -> list[Path]:
    """The run directories that a path or pattern names.

    Raises:
        UserError: there is none.
    """
    whole = Path(pattern).expanduser()  # a folder may be called run[1]
    paths = (
        [whole]
        if whole.exists()
        else [Path(path) for path in sorted(glob.glob(str(whole)), key=_natural)]
    )
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


def _natural(path: str) -> tuple[str, int, str]:
    """Job 10 after job 9."""
    name = Path(path).name
    return str(Path(path).parent), int(name) if name.isdigit() else 0, name
