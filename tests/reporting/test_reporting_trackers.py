"""Trackers against the real libraries: TensorBoard's reader, wandb offline; and what counts as a secret."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import pytest
import wandb

from finetune.config import (
    CometConfig,
    MlflowConfig,
    TensorboardConfig,
    TrackerConfig,
    WandbConfig,
)
from finetune.errors import UserError
from finetune.reporting.callbacks import CallbackList, RunInfo
from finetune.reporting.redact import redact, redact_words
from finetune.reporting.trackers import (
    CometTracker,
    MlflowTracker,
    TensorboardTracker,
    WandbTracker,
    build_trackers,
)
from tests.conftest import ROOT

SECRET = "SENTINEL0123456789"
HF, OPENAI, HEX = (
    "hf_" + "A1b2" * 8,
    "sk-" + "a1B2" * 10,
    "0123456789abcdef0123456789abcdef01234567",
)
EVAL = {
    "kind": "eval",
    "step": 4,
    "loss": 1.5,
    "perplexity": 4.48,
    "subsets": {"ArXiv": {"loss": 1.25}},
}


def train(step: int, loss: float) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "lr": 0.1, "grad_norm": None}


def run_info(run_dir: Path, start: int = 0, config: dict | None = None) -> RunInfo:
    return RunInfo(run_dir, "quick", 4, start, config or {"seed": 0}, resumed=start > 0)


def test_nothing_is_built_unless_enabled():
    assert build_trackers(TrackerConfig()) == []


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorboardTracker(TensorboardConfig(enabled=True))
    first.start(run_info(tmp_path, config={"hf_token": SECRET}))
    for step in (1, 2, 3):
        first.train_step(train(step, 10.0 + step))
    first.finish({})
    second = TensorboardTracker(TensorboardConfig(enabled=True))
    second.start(run_info(tmp_path, start=2))
    for step, loss in ((3, 3.0), (4, float("nan"))):
        second.train_step(train(step, loss))
    second.evaluation(EVAL)
    second.sample(4, "The", " end")
    second.finish({"status": "done"})

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 11.0),
        (2, 12.0),
        (3, 3.0),
    ]
    assert [(e.step, round(e.value, 2)) for e in events.Scalars("eval/ArXiv/loss")] == [(4, 1.25)]
    assert "train/grad_norm" not in events.Tags()["scalars"]
    assert not any(
        SECRET.encode() in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()
    )


def test_wandb_offline_resumes_its_id_and_stores_no_secret(tmp_path: Path, monkeypatch, capsys):
    key = "f" * 20 + HEX[:20]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    words = ["recipe=quick", f"hub_token={SECRET}", f"note={HF}", "--api_key", SECRET]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    config = {
        "model": {"path": "PUBLICPATH", "token": SECRET},
        "url": f"https://me:{SECRET}@host/x",
        "note": OPENAI,
    }
    state: dict = {}
    for start in (0, 2):
        callbacks = CallbackList(
            [WandbTracker(WandbConfig(enabled=True, group="sweep", tags=["t"]))]
        )
        callbacks.restore(state)
        callbacks.start(run_info(tmp_path, start, config))
        for step in (start + 1, start + 2):
            callbacks.train_step(train(step, float("nan") if step == 1 else 1.0))
        callbacks.evaluation(EVAL)
        callbacks.sample(4, "<b>", "text")
        state, before = callbacks.state(), state
        kept = [found["WandbTracker"]["run_id"] for found in (before, state) if found]
        assert len(set(kept)) == 1, "a resumed run keeps its id"
        callbacks.finish({"status": "done", "loss": 1.0, "error": None, "wandb_key": SECRET})
        assert len(callbacks.callbacks) == 1, "the tracker was switched off"
    synced = [
        shlex.split(line.partition("wandb sync ")[2])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("wandb was offline")
    ]
    assert sorted(synced) == sorted(
        [str(path)] for path in (tmp_path / "wandb").glob("offline-run-*")
    )
    files = [
        path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and not path.is_symlink()
    ]
    stored = b"\n".join(path.read_bytes() for path in files)
    assert b"PUBLICPATH" in stored and b"sweep" in stored, "the run itself must be there"
    assert {path.name for path in files if path.suffix == ".wandb"} == {
        f"run-{state['WandbTracker']['run_id']}.wandb"
    }
    for secret in (SECRET, HF, OPENAI, key):
        assert secret.encode() not in stored
    assert sys.argv[2] == f"hub_token={SECRET}", "the program's own command line is untouched"


def test_wandb_keeps_the_export_as_an_artifact_when_asked(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "adapter_model.safetensors").write_bytes(b"ARTIFACTBYTES")
    stored = {}
    for asked in (True, False):
        run_dir = tmp_path / str(asked)
        run_dir.mkdir()
        (run_dir / "export").symlink_to(tmp_path / "export")
        callbacks = CallbackList([WandbTracker(WandbConfig(enabled=True, artifact=asked))])
        callbacks.start(run_info(run_dir))
        callbacks.finish({"status": "done", "export": "export"})
        assert len(callbacks.callbacks) == 1, "the tracker was switched off"
        wandb.teardown()  # wandb's own process has written everything then
        stored[asked] = b"".join(path.read_bytes() for path in (run_dir / "wandb").rglob("*.wandb"))
    assert (
        b"adapter_model.safetensors" in stored[True]
        and b"adapter_model.safetensors" not in stored[False]
    )


def test_wandb_without_a_key_goes_on_offline(monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = WandbTracker(WandbConfig(enabled=True))
    monkeypatch.setattr(type(tracker.wandb.api), "api_key", None)
    assert tracker.mode() == "offline" and "logging offline" in caplog.text


@pytest.mark.parametrize(
    ("tracker", "package", "pip"),
    [
        ("wandb", "wandb", "wandb"),
        ("mlflow", "mlflow", "mlflow-skinny"),
        ("trackio", "trackio", "trackio"),
        ("comet", "comet_ml", "comet_ml"),
    ],
)
def test_a_missing_package_is_told_before_training(monkeypatch, tracker, package, pip):
    monkeypatch.setitem(sys.modules, package, None)
    cfg = TrackerConfig()
    getattr(cfg, tracker).enabled = True
    with pytest.raises(UserError, match=rf"(?s)tracker=\[{tracker}\].*pip install {pip} "):
        build_trackers(cfg)


CONFIG = {"optim": {"lr": 1e-3}, "model": {"path": "PUBLICPATH", "token": SECRET}, "note": OPENAI}


def two_attempts(kind, cfg, run_dir: Path) -> None:
    """A run that is stopped after step 2 and resumed, as the trainer's calls are."""
    state: dict = {}
    for start, status in ((0, "preempted"), (2, "done")):
        callbacks = CallbackList([kind(cfg)])
        callbacks.restore(state)
        callbacks.start(run_info(run_dir, start, CONFIG))
        for step in (start + 1, start + 2):
            callbacks.train_step(train(step, float("nan") if step == 1 else 10.0 + step))
        callbacks.evaluation(EVAL | {"step": start + 2})
        callbacks.sample(start + 2, "The", " end")
        state = callbacks.state()
        callbacks.finish({"status": status, "loss": 1.0, "error": None, "api_key": SECRET})
        assert len(callbacks.callbacks) == 1, "the tracker was switched off"


def assert_no_secret(folder: Path) -> None:
    stored = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert stored and SECRET.encode() not in stored and OPENAI.encode() not in stored


def test_mlflow_keeps_one_run_in_the_run_directory(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    two_attempts(MlflowTracker, MlflowConfig(enabled=True), tmp_path)
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'finetune-gptj'")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(2, 12.0), (3, 13.0), (4, 14.0)]
    assert run.data.metrics["eval/ArXiv/loss"] == 1.25 and run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001" and run.data.params["model.path"] == "PUBLICPATH"
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 2
    assert_no_secret(tmp_path)
    out = capsys.readouterr().out
    assert f"MLflow was offline: its files are in {tmp_path / 'mlruns'}" in out
    assert "mlflow ui --backend-store-uri" in out


def test_trackio_keeps_one_run_in_its_database(tmp_path: Path, monkeypatch, capsys):
    """In a process of its own: trackio reads its folder when it is imported."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from finetune.config import TrackioConfig
from finetune.reporting.trackers import TrackioTracker
from test_reporting_trackers import two_attempts
two_attempts(TrackioTracker, TrackioConfig(enabled=True), Path({str(tmp_path / "run")!r}))
import json, trackio
print(json.dumps(trackio.SQLiteStorage.get_logs("finetune-gptj", "quick-run")))
"""
    folder = tmp_path / "trackio"
    environment = os.environ | {"TRACKIO_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"trackio was offline: its files are in {folder}; to look at them" in done.stdout
    assert done.stdout.count("trackio sync --project finetune-gptj") == 2
    rows = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    found = {row["step"]: row["train/loss"] for row in rows if row.get("train/loss")}
    assert found == {2: 12.0, 3: 13.0, 4: 14.0}
    assert_no_secret(folder)


def test_comet_writes_archives_that_its_own_command_uploads(tmp_path: Path, monkeypatch, capsys):
    for name in ("COMET_API_KEY", "COMET_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    two_attempts(CometTracker, CometConfig(enabled=True), tmp_path)
    archives = sorted((tmp_path / "comet").glob("*.zip"))
    assert len(archives) == 2 and len({path.name[:32] for path in archives}) == 1, "one experiment"
    found = {}
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            assert SECRET.encode() not in b"".join(
                archive.read(name) for name in archive.namelist()
            )
            lines = archive.read("messages.json").decode().splitlines()
        messages = [json.loads(line)["payload"] for line in lines]
        metrics = [message["metric"] for message in messages if message.get("metric")]
        found |= {
            message["metric"]["step"]: float(message["metric"]["metricValue"])
            for message in messages
            if message.get("metric") and message["metric"]["metricName"] == "train/loss"
        }
        assert any(metric["metricName"] == "eval/ArXiv/loss" for metric in metrics)
    assert found == {2: 12.0, 3: 13.0, 4: 14.0}
    assert f"comet upload {tmp_path / 'comet'}/*.zip" in capsys.readouterr().out


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path: Path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    callbacks = CallbackList(
        build_trackers(TrackerConfig(tensorboard=TensorboardConfig(enabled=True)))
    )
    callbacks.start(run_info(tmp_path))
    callbacks.train_step(train(1, 1.0))
    assert callbacks.callbacks == []


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "hubToken",
        "use_auth_token",
        "api_key",
        "apiKey",
        "WANDB_API_KEY",
        "wandb_key",
        "password",
        "db-password",
        "client_secret",
        "Authorization",
        "aws_secret_access_key",
        "ssh_private_key",
        "credentials",
        "tracker.wandb.api_key",
    ],
)
def test_secret_keys(key):
    assert redact({key: "value"}) == {key: "***"}
    assert redact({key: {"nested": "value"}}) == {key: "***"}


@pytest.mark.parametrize(
    "key",
    [
        "sort_key",
        "text_key",
        "tokenizer",
        "tokens",
        "max_new_tokens",
        "sample_tokens",
        "eos_token",
        "pad_token",
        "bos_token_id",
        "token_count",
        "author",
        "keys",
        "key",
        "monkey",
        "model.tokenizer",
    ],
)
def test_innocent_keys(key):
    assert redact({key: "value"}) == {key: "value"}


@pytest.mark.parametrize("value", [HF, OPENAI, HEX, "ghp_" + "a1B2" * 9])
def test_secret_values(value):
    assert redact({"note": value, "list": [value], "text": f"use {value} here"}) == {
        "note": "***",
        "list": ["***"],
        "text": "use *** here",
    }


def test_values_that_only_look_alike_stay():
    config = {
        "revision": HEX,
        "model": {"commit": HEX},
        "path": "hf_models/sk-learn",
        "n": 3,
        "on": True,
        "no": None,
        "password": None,
        "use_auth_token": False,
        "hash64": "ab" * 32,
        "model.path": f"/cache/snapshots/{HEX}",
        "train": f"/cache/snapshots/{HEX}/*.jsonl",
        "note": f"read train-{HEX}.jsonl, {HEX}.csv, a\\{HEX}",
        "folder": "sk-bank-reviews-2024-train",
        "file": "sk-learn_classification_data_v2_20240131.jsonl",
        "words": "bearer internationalization",
        "host": "hdfs-namenode.example.org?x=1",
        "eval": HEX,
    }
    assert redact(config) == config


def test_command_lines():
    words = [
        "recipe=r",
        "hf_token=x",
        "--api-key",
        "x",
        f"a.b={HF}",
        f"model.revision={HEX}",
        "plain",
    ]
    assert redact_words(words) == [
        "recipe=r",
        "hf_token=***",
        "--api-key",
        "***",
        "a.b=***",
        f"model.revision={HEX}",
        "plain",
    ]
