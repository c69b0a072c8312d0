"""Experiment trackers as callbacks: TensorBoard, Weights & Biases, MLflow, trackio and Comet.

Flow: `build_trackers` before training (a missing package is a UserError there, before any work is
done) -> callback events -> `finish`, which tells where the files of an offline run are. A library is
imported only when asked for. After a resume TensorBoard hides the repeated steps; the others
continue the same run, whose id travels in the checkpoint by `state` or is the run directory's name.
metrics.jsonl stays the record; nothing is read back from here.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import logging
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from finetune.config import (
    CometConfig,
    MlflowConfig,
    TensorboardConfig,
    TrackerConfig,
    TrackioConfig,
    WandbConfig,
)
from finetune.errors import UserError
from finetune.files import dumps
from finetune.reporting.callbacks import Callback, RunInfo
from finetune.reporting.metrics_log import is_number
from finetune.reporting.redact import redact, redact_words

log = logging.getLogger("finetune")
NO_KEY = (
    "%s knows no API key (%s): logging offline; the end of the run says where, and how to upload it"
)
MLFLOW_VALUE = 6000
"""Characters of a parameter that MLflow takes."""
COMET_OFF = (
    "log_code",
    "log_graph",
    "parse_args",
    "log_git_metadata",
    "log_git_patch",
    "log_env_details",
    "auto_output_logging",
    "auto_param_logging",
    "auto_metric_logging",
)
"""Collections of Comet's own that are off: code, remotes and command lines may hold secrets."""


def build_trackers(cfg: TrackerConfig) -> list[Callback]:
    """Build the trackers that are enabled.

    Raises:
        UserError: the package of an enabled tracker is missing.
    """
    sections = {name: getattr(cfg, name) for name in TRACKERS}
    return [TRACKERS[name](section) for name, section in sections.items() if section.enabled]


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


class RemoteTracker(Callback):
    """Base class of trackers that give a run an id, by which a resumed run continues it."""

    run_id: str | None = None

    def state(self) -> dict[str, Any]:
        return {"run_id": self.run_id} if self.run_id else {}

    def restore(self, state: dict[str, Any]) -> None:
        self.run_id = state["run_id"]


class WandbTracker(RemoteTracker):
    """One wandb run per run directory.

    The API key comes from the environment or `wandb login`, never from a config.
    """

    def __init__(self, cfg: WandbConfig):
        self.cfg = cfg
        self.wandb = _require("wandb")
        self.run: Any = None
        self.run_dir = Path()
        self.evaluations: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        known = super().state()
        return known | {"evaluations": list(self.evaluations)} if known else {}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.evaluations = list(state.get("evaluations", []))

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
        # wandb stores the command line as it finds it.
        argv, sys.argv = sys.argv, [*sys.argv[:1], *redact_words(sys.argv[1:])]
        try:
            self.run = self.wandb.init(**{k: v for k, v in options.items() if v is not None})
        finally:
            sys.argv = argv
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
            log.warning(NO_KEY, "wandb", "WANDB_API_KEY, or wandb login")
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
        self.run.summary.update(final_values(result))
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
            _tell_offline("wandb", files, f"to upload them: wandb sync {shlex.quote(files)}")


class MlflowTracker(RemoteTracker):
    """One MLflow run per run directory, on a server or in run_dir/mlruns."""

    def __init__(self, cfg: MlflowConfig):
        self.cfg = cfg
        self.mlflow = _require("mlflow", pip="mlflow-skinny")
        self.client: Any = None
        self.folder: Path | None = None
        """Folder of an offline run's files; None with a server."""

    def start(self, run: RunInfo) -> None:
        uri = self.cfg.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            self.folder = run.run_dir.absolute() / "mlruns"
            uri = self.folder.as_uri()
            # Files need no database package; MLflow 3 wants to be told that they are meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.client = client = self.mlflow.MlflowClient(uri)
        if self.run_id is None:
            found = client.get_experiment_by_name(self.cfg.experiment)
            identity = (
                found.experiment_id if found else client.create_experiment(self.cfg.experiment)
            )
            name = f"{run.name}/{run.run_dir.name}"
            self.run_id = client.create_run(identity, run_name=name).info.run_id
            for key, value in flat_settings(run.config).items():
                client.log_param(self.run_id, key, value[:MLFLOW_VALUE])
        else:
            client.update_run(self.run_id, status="RUNNING")

    def train_step(self, record: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self.mlflow.entities.Metric(
                re.sub(r"[^\w./: -]", "_", name), value, now, record["step"]
            )
            for name, value in scalars(record).items()
        ]
        self.client.log_batch(self.run_id, metrics=metrics)

    evaluation = train_step

    def sample(self, step: int, prompt: str, text: str) -> None:
        name = re.sub(r"\W+", "-", prompt)[:40]
        self.client.log_text(self.run_id, prompt + text, f"samples/step-{step:08d}-{name}.txt")

    def finish(self, result: dict[str, Any]) -> None:
        if self.client is None:
            return
        for key, value in final_values(result).items():
            self.client.set_tag(self.run_id, key, value)
        statuses = {"done": "FINISHED", "preempted": "KILLED"}
        self.client.set_terminated(self.run_id, statuses.get(str(result.get("status")), "FAILED"))
        if self.folder:
            store, base = shlex.quote(str(self.folder)), shlex.quote(str(self.folder.parent))
            _tell_offline(
                "MLflow",
                str(self.folder),
                "to look at them: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri "
                f"{store}; "
                f"to move them to a server's database: mlflow migrate-filestore --source {base} "
                "--target sqlite:///mlflow.db",
            )


class TrackioTracker(Callback):
    """One trackio run per run directory, by its name, in trackio's database on this machine."""

    def __init__(self, cfg: TrackioConfig):
        self.cfg = cfg
        self.trackio = _require("trackio")
        self.run: Any = None

    def start(self, run: RunInfo) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to open its dashboard
            self.run = self.trackio.init(
                project=self.cfg.project,
                name=f"{run.name}-{run.run_dir.name}",
                space_id=self.cfg.space,
                config=flat_settings(run.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def train_step(self, record: dict[str, Any]) -> None:
        self.run.log(scalars(record), step=record["step"])

    evaluation = train_step

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.run.log({"sample": self.trackio.Markdown(f"**{prompt}**\n\n{text}")}, step=step)

    def finish(self, result: dict[str, Any]) -> None:
        if self.run is None:
            return
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()
        if not self.cfg.space:
            project = shlex.quote(self.cfg.project)
            _tell_offline(
                "trackio",
                str(self.trackio.TRACKIO_DIR),
                f"to look at them: trackio show --project {project}; "
                f"to upload them: trackio sync --project {project} --space-id ORG/NAME",
            )


class CometTracker(RemoteTracker):
    """One Comet experiment per run directory.

    The API key comes from the environment or Comet's own file, never from a config.
    """

    def __init__(self, cfg: CometConfig):
        self.cfg = cfg
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        self.comet = _require("comet_ml", tracker="comet")
        self.experiment: Any = None
        self.folder = Path()
        self.offline = False

    def start(self, run: RunInfo) -> None:
        self.offline = self.cfg.offline
        if not self.offline and not self.comet.get_config("comet.api_key"):
            log.warning(NO_KEY, "Comet", "COMET_API_KEY, or comet login")
            self.offline = True
        self.folder = run.run_dir / "comet"
        quiet = dict.fromkeys(COMET_OFF, False)
        self.experiment = self.comet.start(
            workspace=self.cfg.workspace,
            project_name=self.cfg.project,
            online=not self.offline,
            mode="get" if self.run_id else "create",
            experiment_key=self.run_id,
            experiment_config=self.comet.ExperimentConfig(
                name=f"{run.name}/{run.run_dir.name}",
                offline_directory=str(self.folder),
                display_summary_level=0,
                **quiet,
            ),
        )
        self.run_id = self.experiment.get_key()
        self.experiment.log_parameters(flat_settings(run.config))

    def train_step(self, record: dict[str, Any]) -> None:
        self.experiment.log_metrics(scalars(record), step=record["step"])

    evaluation = train_step

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.experiment.log_text(prompt + text, step=step)

    def finish(self, result: dict[str, Any]) -> None:
        if self.experiment is None:
            return
        self.experiment.log_others(final_values(result))
        self.experiment.end()
        if self.offline:
            upload = f"to upload them: comet upload {shlex.quote(str(self.folder))}/*.zip"
            _tell_offline("Comet", str(self.folder), upload)


TRACKERS = {
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "comet": CometTracker,
}
"""Tracker -> callback; each has a section of this name in TrackerConfig."""


def flat_settings(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the config as `optim.lr` -> text, without secrets."""
    flat: dict[str, str] = {}
    for key, value in redact(config).items():
        name = f"{prefix}{key}"
        flat |= flat_settings(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return flat


def final_values(result: dict[str, Any]) -> dict[str, Any]:
    """Return the texts and numbers of result.json as `result/loss`, without secrets."""
    return {
        f"result/{key}": value
        for key, value in redact(result).items()
        if isinstance(value, (str, bool)) or is_number(value)
    }


def _tell_offline(name: str, files: str, what_to_do: str) -> None:
    print(f"{name} was offline: its files are in {files}; {what_to_do}", flush=True)


def _require(package: str, tracker: str = "", pip: str = "") -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"the package '{package}' is not installed",
            f"tracker=[{tracker or package}]",
            f"pip install {pip or package}  (or leave the tracker out)",
        ) from None
