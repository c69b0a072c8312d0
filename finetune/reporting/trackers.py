"""TensorBoard and Weights & Biases as callbacks.

Flow: `build_trackers` before training (a missing package is a UserError there, before any work is
done) -> callback events -> `finish`. Both libraries are imported only when asked for. After a resume
TensorBoard hides the repeated steps and wandb continues under the same run id, which travels in the
checkpoint by `state`. metrics.jsonl stays the record; nothing is read back from here.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import logging
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
from finetune.reporting.metrics_log import is_number
from finetune.reporting.redact import redact, redact_words

log = logging.getLogger("finetune")


def build_trackers(cfg: TrackerConfig) -> list[Callback]:
    """Build the trackers that are enabled.

    Raises:
        UserError: the package of an enabled tracker is missing.
    """
    trackers: list[Callback] = []
    if cfg.tensorboard.enabled:
        trackers.append(TensorboardTracker(cfg.tensorboard))
    if cfg.wandb.enabled:
        trackers.append(WandbTracker(cfg.wandb))
    return trackers


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record as `train/loss`, `eval/perplexity`, `eval/ArXiv/loss`."""
    kind = record.get("kind", "train")
    values = {f"{kind}/{key}": value for key, value in record.items() if key != "step"}
    for name, metrics in (record.get("subsets") or record.get("per_class") or {}).items():
        if isinstance(metrics, dict):
            values |= {f"{kind}/{name}/{key}": value for key, value in metrics.items()}
    return {key: float(value) for key, value in values.items() if is_number(value)}


class TensorboardTracker(Callback):
    """Event files in run_dir/tensorboard."""

    def __init__(self, cfg: TensorboardConfig):
        _require("tensorboard")
        self.writer: Any = None

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of the attempt that died, steps beyond its last checkpoint are repeated now: purge_step
        # hides the old ones.
        purge = run.start_step + 1 if run.resumed else None
        folder = str(run.run_dir / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=purge, flush_secs=10)
        # Indented, the config is a block of code in Markdown.
        config = "    " + dumps(redact(run.config), indent=2).replace("\n", "\n    ")
        self.writer.add_text("config", config, run.start_step)

    def train_step(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def evaluation(self, record: dict[str, Any]) -> None:
        self.train_step(record)
        self.writer.flush()

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.writer.add_text("sample", f"**{prompt}**\n\n{text}", step)

    def finish(self, result: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbTracker(Callback):
    """One wandb run per run directory.

    The API key comes from the environment or `wandb login`, never from a config.
    """

    def __init__(self, cfg: WandbConfig):
        self.cfg = cfg
        self.wandb = _require("wandb")
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
        mode = self.mode()
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
            # Console capture would store the bar's every redraw; git and code would store remotes
            # with passwords.
            "settings": self.wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                init_timeout=60,
                silent=True,
            ),
        }
        with _redacted_argv():
            self.run = self.wandb.init(**{k: v for k, v in options.items() if v is not None})
        self.run_id = self.run.id
        # `step` is a figure like any other: wandb's own counter only grows, so steps that a resumed
        # run repeats would be refused.
        self.run.define_metric("train/*", step_metric="step")
        self.run.define_metric("eval/*", step_metric="step")

    def mode(self) -> str:
        """Return the mode of wandb; offline without an API key, for which wandb would ask.

        WANDB_MODE takes precedence: clusters without a connection set it for everybody.
        """
        mode = os.environ.get("WANDB_MODE") or self.cfg.mode
        if mode == "online" and not self.wandb.api.api_key:
            log.warning(
                "wandb knows no API key (WANDB_API_KEY, or wandb login): logging offline; the end of "
                "the run says where, and how to upload it"
            )
            return "offline"
        return mode

    def train_step(self, record: dict[str, Any]) -> None:
        self.run.log({"step": record["step"], **scalars(record)})

    def evaluation(self, record: dict[str, Any]) -> None:
        row = {"step": record["step"], **scalars(record)}
        self.evaluations.append(row)
        self.run.log(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        body = f"<b>{html.escape(prompt)}</b>\n{html.escape(text)}"
        page = self.wandb.Html(f"<pre style='white-space:pre-wrap'>{body}</pre>", inject=False)
        self.run.log({"step": step, "sample": page})

    def finish(self, result: dict[str, Any]) -> None:
        if self.run is None:
            return
        status = result.get("status", "failed")
        self.run.summary.update(
            {
                f"result/{key}": value
                for key, value in redact(result).items()
                if isinstance(value, (str, bool)) or is_number(value)
            }
        )
        if self.evaluations:
            names = {name for row in self.evaluations for name in row} - {"step"}
            columns = ["step", *sorted(names)]
            data = [[row.get(name) for name in columns] for row in self.evaluations]
            self.run.log({"evaluations": self.wandb.Table(columns=columns, data=data)})
        if self.cfg.artifact and status == "done" and result.get("export"):
            export = self.run_dir / str(result["export"])
            # wandb allows few characters in a name.
            name = re.sub(r"[^\w.-]+", "-", "-".join(export.absolute().parts[-3:-1]))
            artifact = self.wandb.Artifact(name, type="model")
            artifact.add_dir(str(export))
            self.run.log_artifact(artifact)
        if status == "preempted":
            self.run.mark_preempting()
        offline, files = self.run.offline, str(Path(self.run.dir).parent)
        self.run.finish(exit_code=0 if status == "done" else 1)
        if offline:
            print(
                f"wandb was offline: its files are in {files}; "
                f"to upload them: wandb sync {shlex.quote(files)}",
                flush=True,
            )


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"the package '{package}' is not installed",
            f"tracker=[{package}]",
            f"pip install {package}  (or leave the tracker out)",
        ) from None


@contextlib.contextmanager
def _redacted_argv() -> Iterator[None]:
    """Redact sys.argv meanwhile: wandb stores the command line as it finds it."""
    argv = sys.argv
    sys.argv = [*argv[:1], *redact_words(argv[1:])]
    try:
        yield
    finally:
        sys.argv = argv
