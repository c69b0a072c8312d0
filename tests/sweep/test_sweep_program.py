"""The parent with real processes: failures, Ctrl-C, a kill half-way, pruning; jobs are scripts without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRID = ["recipe=quickstart", "optim.lr=1e-2,1e-3", "optim.eps=1e-8,0.5,1e-7"]


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "tests.sweep.parent", "-m", *words, f"sweep.dir={folder}"]


def start(folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(folder, *words),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, *words), cwd=ROOT, text=True, capture_output=True, timeout=300, check=False
    )


def jobs(folder: Path) -> dict[int, dict]:
    return {job["job"]: job for job in json.loads((folder / "sweep.json").read_text())["jobs"]}


def starts(folder: Path) -> dict[int, int]:
    return {
        int(p.parent.name): len(p.read_text().splitlines()) for p in folder.glob("*/starts.txt")
    }


def wait_until(ready, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_status(folder: Path, number: int, status: str) -> bool:
    noted = folder / str(number) / "job.json"
    return noted.exists() and json.loads(noted.read_text())["status"] == status


def test_a_failed_job_does_not_end_the_sweep(tmp_path):
    done = run(tmp_path, *GRID, "sweep.parallel=3")
    assert done.returncode == 1, done.stdout + done.stderr
    found = jobs(tmp_path)
    assert sorted(found) == list(range(6)) and set(starts(tmp_path).values()) == {1}
    assert [n for n, job in found.items() if job["status"] == "failed"] == [1, 4]
    assert "half is too much" in found[1]["error"] and "Try 1e-8." in found[1]["error"]
    ranked = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [job["value"] for job in ranked[:4]] == pytest.approx([1 + 1 / 6] * 2 + [2 + 1 / 6] * 2)
    assert (
        "optim.lr=0.001" in ranked[0]["overrides"]
        and f"run={tmp_path}/{ranked[0]['job']}" in done.stdout
    )
    page = (tmp_path / "sweep.html").read_text()
    assert (
        page.count("<tr data-job=") == 6
        and page.count('class="way') >= 4
        and "half is too much" in page
    )


def test_all_jobs_are_one_group_in_wandb_unless_the_user_names_one(tmp_path):
    for name, more in (("own", []), ("named", ["tracker.wandb.group=mine"])):
        done = run(
            tmp_path / name, "recipe=quickstart", "optim.lr=1e-2,1e-3", "tracker=[wandb]", *more
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told = [json.loads((tmp_path / name / str(n) / "words.json").read_text()) for n in range(2)]
        assert [words["tracker.wandb.group"] for words in told] == [
            more[0].split("=")[1] if more else name
        ] * 2


def test_on_failure_stop(tmp_path):
    done = run(tmp_path, *GRID, "sweep.on_failure=stop")
    assert done.returncode == 1 and starts(tmp_path) == {0: 1, 1: 1}
    assert jobs(tmp_path)[2]["status"] == "waiting"


def test_a_killed_parent_goes_on_and_repeats_nothing(tmp_path):
    parent = start(tmp_path, *GRID, "train.early_stopping=2")
    wait_until(lambda: (tmp_path / "2/metrics.jsonl").exists())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    # The kernel told the running job to end with its parent.
    wait_until(lambda: (tmp_path / "2/result.json").exists())
    assert has_status(tmp_path, 0, "done") and has_status(tmp_path, 1, "failed")
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert {n: job["status"] for n, job in jobs(tmp_path).items()} == {
        0: "done",
        1: "failed",
        2: "done",
        3: "done",
        4: "failed",
        5: "done",
    }
    assert starts(tmp_path) == {0: 1, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}, (
        "only the failed and the interrupted start again"
    )
    assert {
        f.parent.name: len(f.read_text().splitlines()) for f in tmp_path.glob("*/metrics.jsonl")
    } == {n: 6 for n in "0235"}, "every step is there once"


def test_ctrl_c_lets_the_jobs_save(tmp_path):
    parent = start(tmp_path, *GRID, "sweep.parallel=2", "train.early_stopping=20")
    wait_until(
        lambda: (tmp_path / "0/metrics.jsonl").exists() and (tmp_path / "2/metrics.jsonl").exists()
    )
    parent.send_signal(signal.SIGINT)
    output = parent.communicate(timeout=200)[0]
    assert parent.returncode == 75, output
    assert {jobs(tmp_path)[n]["status"] for n in (0, 2)} == {"stopped"}
    assert json.loads((tmp_path / "0/result.json").read_text())["status"] == "preempted"
    assert f"sweep.dir={tmp_path}" in output.splitlines()[-1]
    assert "jobs done, stopped" in (tmp_path / "sweep.html").read_text()


def test_optuna_prunes_survives_a_kill_and_counts_each_trial_once(tmp_path):
    words = [
        "recipe=quickstart",
        "sweep=optuna",
        "sweep.trials=6",
        "sweep.prune_after=1",
        "optim.warmup=0",
        "optim.lr=tag(log,interval(1e-6,1e-2))",
        "train.early_stopping=3",
    ]
    parent = start(tmp_path, *words)
    wait_until(lambda: (tmp_path / "3/metrics.jsonl").exists())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = jobs(tmp_path)
    assert sorted(found) == list(range(6)) and {job["status"] for job in found.values()} <= {
        "done",
        "pruned",
    }
    assert len({tuple(job["overrides"]) for job in found.values()}) == 6
    assert starts(tmp_path) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert {t.number: t.state.name for t in study.trials} == {
        n: {"done": "COMPLETE", "pruned": "PRUNED"}[job["status"]] for n, job in found.items()
    }
    best = min(
        (job for job in found.values() if job["status"] == "done"), key=lambda job: job["value"]
    )
    assert study.best_trial.number == best["job"] and study.best_value == pytest.approx(
        best["value"]
    )


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_hopeless_job_is_stopped_early(pruner, tmp_path):
    """Two good jobs end at once; the third is far worse and would take a minute."""
    from finetune.config import SweepConfig
    from finetune.sweep.job import DONE, PRUNED
    from finetune.sweep.search import Goal, Study
    from finetune.sweep.space import read_space

    def reports(loss: float) -> list[dict]:
        return [{"kind": "eval", "step": step, "loss": loss} for step in (1, 2)]

    cfg = SweepConfig(strategy="optuna", trials=4, prune_after=2, pruner=pruner)
    study = Study(cfg, read_space(["optim.lr=interval(0.1,1)"], {}), Goal("loss", False), tmp_path)
    for loss in (1.0, 2.0):
        job = study.next()
        job.run_dir.mkdir()
        assert not study.should_prune(job, reports(loss)), "not before two jobs are done"
        (job.run_dir / "result.json").write_text(
            json.dumps({"status": "done", "loss": loss, "eval": {"loss": loss}})
        )
        job.status = DONE
        study.ended(job)
    good, bad = study.next(), study.next()
    assert not study.should_prune(good, reports(1.4)) and study.should_prune(bad, reports(1.6))
    bad.status = PRUNED
    study.ended(bad)
    assert [trial.state.name for trial in study.study.trials] == [
        "COMPLETE",
        "COMPLETE",
        "RUNNING",
        "PRUNED",
    ]
    assert study.next() is None


@pytest.mark.parametrize(
    "words,remedy",
    [
        (["recipe=quickstart", "optim.lrr=1,2"], "Did you mean optim.lr"),
        (["recipe=clm_pille", "optim.lr=1,2"], "Did you mean recipe=clm_pile?"),
        (["recipe=quickstart", "sweep=lr_rnak"], "Did you mean sweep=lr_rank?"),
        (["recipe=quickstart", "sweep.parallel=0"], "sweep.parallel=1"),
        (["recipe=quickstart", "optim.lr=interval(1,2)"], "sweep=random"),
    ],
)
def test_a_wrong_sweep_starts_nothing(words, remedy, tmp_path):
    done = run(tmp_path / "s", *words)
    assert done.returncode == 2 and remedy in done.stderr and "Traceback" not in done.stderr
    assert not starts(tmp_path / "s")
