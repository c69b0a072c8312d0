"""TensorBoard and Weights & Biases as callbacks.

Flow: `build_trackers` before training (a missing package is a UserError there, before any work is done) ->
callback moments -> `finish`. Both libraries are imported only when asked for. After a resume TensorBoard hides
the repeated steps and wandb goes on under the same run id, which travels in the checkpoint by `state`.
metrics.jsonl stays the record; nothing is read back from here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.config import TensorboardConfig, TrackerConfig, WandbConfig
from finetune.errors import UserError
from finetune.files import dumps
from finetune.reporting.callbacks import Callback, RunInfo
from finetune.reporting.redact import redact, redact_words

__all__ = ["TensorboardTracker", "WandbTracker", "build_trackers", "redact", "scalars"]

WANDB_MODES = ("online", "offline", "disabled")

log = logging.getLogger("finetune")


def build_trackers(cfg: TrackerConfig) -> list[Callback]:
    """The trackers that are enabled.

    Raises:
        UserError: the package of an enabled tracker is missing, or an option has no meaning.
    """
    trackers: list[Callback] = []
    if cfg.tensorboard.enabled:
        trackers.append(TensorboardTracker(cfg.tensorboard))
    if cfg.wandb.enabled:
        trackers.append(WandbTracker(cfg.wandb))
    return trackers


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Finite numbers of a record under the tracker's names: `train/loss`, `eval/perplexity`, `eval/ArXiv/loss`."""
    kind = record.get("kind", "train")
    found = {f"{kind}/{key}": value for key, value in record.items() if key != "step"}
    for name, row in (record.get("subsets") or record.get("per_class") or {}).items():
        if isinstance(row, dict):
            found |= {f"{kind}/{name}/{key}": value for key, value in row.items()}
    return {key: float(value) for key, value in found.items() if _is_number(value)}


class TensorboardTracker(Callback):
    """Event files in run_dir/tensorboard."""

    def __init__(self, cfg: TensorboardConfig):
        self.cfg = cfg
        _require("tensorboard", "tracker=[tensorboard]")
        self.writer: Any = None

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of the attempt that died, steps beyond its last checkpoint are repeated now: purge_step hides the old ones.
        purge = run.start_step + 1 if run.resumed else None
        self.writer = SummaryWriter(
            str(run.run_dir / "tensorboard"), purge_step=purge, flush_secs=10
        )
        self.writer.add_text("config", _markdown(redact(run.config)), run.start_step)

    def train_step(self, record: dict[str, Any]) -> None:
        self._write(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._write(record)
        self.writer.flush()

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.writer.add_text("sample", f"**{prompt}**\n\n{text}", step)

    def finish(self, result: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.close()

    def _write(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])


class WandbTracker(Callback):
    """One wandb run per run directory. The API key comes from the environment or `wandb login`, never from a config."""

    def __init__(self, cfg: WandbConfig):
        if cfg.mode not in WANDB_MODES:
            raise UserError(
                f"'{cfg.mode}' is none of {', '.join(WANDB_MODES)}", "tracker.wandb.mode"
            )
        self.cfg = cfg
        self.wandb = _require("wandb", "tracker=[wandb]")
        self.run_id: str | None = None
        self.run: Any = None
        self.run_dir = Path()
        self.evaluations: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "evaluations": list(self.evaluations)} if self.run_id else {}

    def restore(self, state: dict[str, Any]) -> None:
        self.run_id, self.evaluations = state["run_id"], list(state.get("evaluations", []))

    def start(self, run: RunInfo) -> None:
        self.run_dir = run.run_dir
        with _redacted_argv():
            self.run = self.wandb.init(**self._options(run))
        self.run_id = self.run.id
        # `step` is a figure like any other: wandb's own counter only grows, so steps that a resumed run repeats
        # would be refused.
        self.run.define_metric("train/*", step_metric="step")
        self.run.define_metric("eval/*", step_metric="step")

    def train_step(self, record: dict[str, Any]) -> None:
        self.run.log({"step": record["step"], **scalars(record)})

    def evaluation(self, record: dict[str, Any]) -> None:
        row = {"step": record["step"], **scalars(record)}
        self.evaluations.append(row)
        self.run.log(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.run.log(
            {"step": step, "sample": self.wandb.Html(_sample_html(prompt, text), inject=False)}
        )

    def finish(self, result: dict[str, Any]) -> None:
        if self.run is None:
            return
        status = result.get("status", "failed")
        self.run.summary.update(
            {f"result/{key}": value for key, value in redact(result).items() if _is_plain(value)}
        )
        if self.evaluations:
            self.run.log({"evaluations": self._table()})
        if self.cfg.artifact and status == "done" and result.get("export"):
            self.run.log_artifact(self._artifact(self.run_dir / str(result["export"])))
        if status == "preempted":
            self.run.mark_preempting()
        offline, files = self.run.offline, Path(self.run.dir).parent
        self.run.finish(exit_code=0 if status == "done" else 1)
        if offline:
            print(
                f"wandb was offline: its files are in {files}; to upload them: wandb sync {shlex.quote(str(files))}",
                flush=True,
            )

    def _options(self, run: RunInfo) -> dict[str, Any]:
        mode = self._mode()
        options = {
            "project": self.cfg.project,
            "entity": self.cfg.entity,
            "group": self.cfg.group,
            "tags": self.cfg.tags,
            "name": f"{run.name}/{run.run_dir.name}",
            "dir": str(run.run_dir),
            "config": redact(run.config),
            "id": self.run_id,
            "mode": mode,
            "resume": "allow" if mode == "online" else None,
            # Console capture would store the bar's every redraw; git and code would store remotes with passwords.
            "settings": self.wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                init_timeout=60,
                silent=True,
            ),
        }
        return {key: value for key, value in options.items() if value is not None}

    def _mode(self) -> str:
        """WANDB_MODE wins: clusters without a way out set it for everybody. Without a key wandb would ask for one."""
        mode = os.environ.get("WANDB_MODE") or self.cfg.mode
        if mode == "online" and not self.wandb.api.api_key:
            log.warning(
                "wandb knows no API key (WANDB_API_KEY, or wandb login): logging offline; the end of the run says "
                "where, and how to upload it"
            )
            return "offline"
        return mode

    def _artifact(self, export: Path) -> Any:
        """The export as a model; wandb allows few characters in a name."""
        parts = "-".join(export.absolute().parts[-3:-1])
        artifact = self.wandb.Artifact(re.sub(r"[^\w.-]+", "-", parts), type="model")
        artifact.add_dir(str(export))
        return artifact

    def _table(self) -> Any:
        columns = sorted(
            {key for row in self.evaluations for key in row}, key=lambda key: (key != "step", key)
        )
        return self.wandb.Table(
            columns=columns, data=[[row.get(key) for key in columns] for row in self.evaluations]
        )


def _require(package: str, wanted_by: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"the package '{package}' is not installed",
            wanted_by,
            f"pip install {package}  (or leave the tracker out)",
        ) from None


@contextlib.contextmanager
def _redacted_argv() -> Iterator[None]:
    """wandb stores the command line as it finds it: show it one without secrets."""
    argv = sys.argv
    sys.argv = [argv[0], *redact_words(argv[1:])] if argv else argv
    try:
        yield
    finally:
        sys.argv = argv


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, bool)) or _is_number(value)


def _markdown(config: dict[str, Any]) -> str:
    indented = dumps(config, indent=2).replace("\n", "\n    ")
    return f"    {indented}"


def _sample_html(prompt: str, text: str) -> str:
    import html

    return (
        f"<pre style='white-space:pre-wrap'><b>{html.escape(prompt)}</b>\n{html.escape(text)}</pre>"
    )
