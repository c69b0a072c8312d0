"""What a sweep varies, which job comes next, and on which devices: without processes."""

from __future__ import annotations

import base64
import json
import math
import sys
from pathlib import Path

import pytest

from finetune.cli.train import sweep_words
from finetune.config import ClassifyConfig, ClmConfig, Config, DataConfig, SweepConfig, TrainConfig
from finetune.errors import UserError
from finetune.sweep import pool as pools
from finetune.sweep.job import DONE, FAILED, Job
from finetune.sweep.pool import build_pool
from finetune.sweep.search import Goal, Listed, build_goal, build_search
from finetune.sweep.show import render, write_summary
from finetune.sweep.space import Choice, Interval, draw, grid, read_space, settings_words
from finetune.sweep.sweep import sweep

CLM = Config(task=ClmConfig(), data=DataConfig(eval="e.jsonl"))


def test_words_become_fixed_words_and_parameters():
    space = read_space(
        [
            "recipe=r",
            "optim.lr=1e-5,3e-5",
            "adapter.rank=range(2,9,3)",
            "optim.betas=[0.9,0.99]",
            "optim.warmup=int(interval(0,10))",
            "optim.eps=tag(log,interval(1e-9,1e-6))",
        ],
        {},
    )
    assert space.fixed == ("recipe=r", "optim.betas=[0.9,0.99]")
    assert space.parameters == (
        Choice("optim.lr", ("1e-05", "3e-05")),
        Choice("adapter.rank", ("2", "5", "8")),
        Interval("optim.warmup", 0, 10, log=False, whole=True),
        Interval("optim.eps", 1e-9, 1e-6, log=True, whole=False),
    )


def test_a_typed_key_replaces_the_configured_one():
    space = read_space(["optim.lr=1e-4", "recipe=r"], {"optim.lr": "1,2", "adapter.rank": "4,8"})
    assert space.fixed == ("optim.lr=1e-4", "recipe=r") and space.parameters == (
        Choice("adapter.rank", ("4", "8")),
    )


def test_grid_is_every_combination_in_order():
    space = read_space(["a=1,2", "b=x,y,z", "c=0"], {})
    assert [space.words(job) for job in grid(space)] == [
        ["c=0", f"a={a}", f"b={b}"] for a in "12" for b in "xyz"
    ]
    assert grid(read_space(["a=1"], {})) == [{}]


def test_a_grid_refuses_a_range():
    with pytest.raises(UserError, match="sweep=random"):
        grid(read_space(["optim.lr=interval(1e-5,1e-3)"], {}))


@pytest.mark.parametrize("word", ["optim.lr=tag(log,interval(0,1))", "optim.lr=interval(2,1)"])
def test_an_empty_range_is_refused(word):
    with pytest.raises(UserError, match="range"):
        read_space([word], {})


def test_random_draws_follow_the_seed_alone_and_fill_the_range():
    space = read_space(["a=tag(log,interval(1e-6,1e-2))", "b=int(interval(1,3))", "c=x,y"], {})
    jobs = [draw(space, 7, n) for n in range(400)]
    assert jobs == [draw(space, 7, n) for n in range(400)] and jobs[0] != draw(space, 8, 0)
    powers = [math.log10(float(job["a"])) for job in jobs]
    assert all(-6 <= p <= -2 for p in powers) and 0.4 < sum(p < -4 for p in powers) / 400 < 0.6
    assert {job["b"] for job in jobs} == {"1", "2", "3"} and {job["c"] for job in jobs} == {
        "x",
        "y",
    }


def test_settings_stay_out_of_the_jobs_and_keep_their_commas():
    own, jobs = settings_words(
        ["sweep=random", "sweep.include=localhost:0,1", "optim.lr=1,2", "sweep.trials=3"]
    )
    assert own == ["sweep=random", "sweep.include=localhost:0,1", "sweep.trials=3"] and jobs == [
        "optim.lr=1,2"
    ]


def test_launcher_options_among_the_words():
    assert sweep_words(["-m", "--num_gpus", "2", "--hostfile=h", "a=1", "--local_rank=0"]) == [
        "sweep.num_gpus=2",
        "sweep.hostfile=h",
        "a=1",
    ]
    with pytest.raises(UserError, match="--gpus"):
        sweep_words(["-m", "--gpus", "2"])


def test_jobs_are_found_again_by_their_words(tmp_path):
    def words(lr: str):
        return (["recipe=r", f"optim.lr={lr}"], {"optim.lr": lr})

    first = Listed([words("1"), words("2")], tmp_path)
    for job in first.jobs:
        job.run_dir.mkdir()
        job.status = DONE
        job.save()
    second = Listed([words("3"), words("2"), words("1")], tmp_path)
    assert [(job.number, job.status) for job in second.jobs] == [
        (2, "waiting"),
        (1, DONE),
        (0, DONE),
    ]
    assert [job.number for job in second.waiting] == [2]


def test_goal_ranks_by_direction():
    assert build_goal(SweepConfig(), CLM) == Goal("loss", False)
    assert build_goal(SweepConfig(metric="accuracy"), CLM).maximize
    assert build_goal(SweepConfig(metric="pearson"), CLM).maximize
    assert not build_goal(SweepConfig(metric="accuracy", direction="minimize"), CLM).maximize


def test_auto_is_what_the_jobs_take_for_best():
    def classify(problem: str, metric: str | None, held_out: str | None) -> Config:
        data, train = DataConfig(eval=held_out), TrainConfig(metric=metric)
        return Config(task=ClassifyConfig(problem=problem), data=data, train=train)

    auto = SweepConfig()
    assert build_goal(auto, classify("single_label", None, "e.jsonl")) == Goal("accuracy", True)
    assert build_goal(auto, classify("regression", None, "e.jsonl")) == Goal("mse", False)
    assert build_goal(auto, classify("single_label", "loss", "e.jsonl")) == Goal("loss", False)
    assert build_goal(auto, classify("single_label", None, None)) == Goal("loss", False)
    with pytest.raises(UserError, match="Choose from accuracy, f1, loss"):
        build_goal(auto, classify("single_label", "mse", "e.jsonl"))


def test_goal_reads_the_evaluation_before_the_training_loss(tmp_path):
    job = Job(0, tmp_path, [], {}, status=DONE)
    assert build_goal(SweepConfig(), CLM).value(job) is None
    (tmp_path / "result.json").write_text(
        json.dumps({"status": "done", "loss": 3.0, "eval": {"loss": 2.0, "f1": 0.5}})
    )
    values = [
        build_goal(SweepConfig(metric=metric), CLM).value(job)
        for metric in ("auto", "loss", "f1", "accuracy")
    ]
    assert values == [2.0, 2.0, 0.5, None]


def test_wrong_settings_are_refused_before_a_job_starts(tmp_path):
    words = ["recipe=quickstart", "sweep.strategy=bayes", "sweep.direction=upwards"]
    with pytest.raises(UserError) as caught:
        sweep([*words, f"sweep.dir={tmp_path / 'new'}"], Path("train.py"))
    assert "sweep.strategy = bayes" in str(caught.value)
    assert "sweep.direction = upwards" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_missing_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    space = read_space(["optim.lr=1,2"], {})
    with pytest.raises(UserError, match=r"pip install -e '.\[sweep\]'"):
        build_search(SweepConfig(strategy="optuna"), space, Goal("loss", False), tmp_path)


def options(monkeypatch, gpus: int, **settings) -> list[tuple[str, ...]]:
    monkeypatch.setattr(pools, "gpu_free_bytes", lambda: [1] * gpus)
    return [place.options for place in build_pool(SweepConfig(**settings)).places]


def test_one_job_at_a_time_gets_the_options_as_typed(monkeypatch):
    assert options(monkeypatch, 8) == [()]
    assert options(monkeypatch, 8, num_gpus=4) == [("--num_gpus", "4")]
    assert options(monkeypatch, 8, include="localhost:2,3", launcher="--bind_cores_to_rank") == [
        ("--include", "localhost:2,3", "--bind_cores_to_rank")
    ]


def test_jobs_at_once_share_no_gpu(monkeypatch):
    def shares(gpus: int, **settings) -> list[str]:
        return [
            words[1] for words in options(monkeypatch, gpus, **settings) if words[0] == "--include"
        ]

    assert shares(8, parallel=2) == ["localhost:0,1,2,3", "localhost:4,5,6,7"]
    assert shares(8, parallel=2, gpus_per_job=1) == ["localhost:0", "localhost:1"]
    assert shares(8, parallel=2, exclude="localhost:0,1", gpus_per_job=3) == [
        "localhost:2,3,4",
        "localhost:5,6,7",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert shares(2, parallel=2) == ["localhost:4", "localhost:6"]
    with pytest.raises(UserError, match=r"sweep.parallel=1"):
        options(monkeypatch, 2, parallel=2, gpus_per_job=2)


def test_jobs_over_the_hosts_of_a_hostfile(monkeypatch, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\nworker-0 slots=2\nworker-1 slots=4\n")
    assert options(monkeypatch, 0, parallel=2, gpus_per_job=3, hostfile=str(hosts)) == [
        ("--hostfile", str(hosts), "--include", "worker-0:0,1@worker-1:0"),
        ("--hostfile", str(hosts), "--include", "worker-1:1,2,3"),
    ]
    with pytest.raises(UserError, match="worker-7"):
        options(monkeypatch, 0, parallel=2, include="worker-7", hostfile=str(hosts))


def test_the_launcher_that_started_us_says_which_devices(monkeypatch):
    info = base64.urlsafe_b64encode(json.dumps({"localhost": [2, 3]}).encode()).decode()
    words = ["python", f"--world_info={info}", "train.py"]
    monkeypatch.setattr(pools.psutil.Process, "cmdline", lambda self: words)
    assert options(monkeypatch, 4) == [("--include", "localhost:2,3")]
    assert options(monkeypatch, 4, parallel=2) == [
        ("--include", "localhost:2"),
        ("--include", "localhost:3"),
    ]
    assert options(monkeypatch, 0) == [("--num_gpus", "2")]


def test_cpu_jobs_at_once_share_no_core(monkeypatch):
    monkeypatch.setattr(pools, "gpu_free_bytes", list)
    monkeypatch.setattr(pools.os, "sched_getaffinity", lambda pid: set(range(8)))
    places = build_pool(SweepConfig(parallel=3, gpus_per_job=2)).places
    assert [place.options for place in places] == [("--num_gpus", "2")] * 3
    cores = [place.cores for place in places]
    assert frozenset.union(*cores) == set(range(8)) and sum(map(len, cores)) == 8


def test_failed_jobs_do_not_win(tmp_path):
    goal = build_goal(SweepConfig(), CLM)
    jobs = [
        Job(n, tmp_path / str(n), [], {}, status=status) for n, status in enumerate((FAILED, DONE))
    ]
    for job, loss in zip(jobs, (0.1, 5.0), strict=True):
        job.run_dir.mkdir()
        (job.run_dir / "result.json").write_text(json.dumps({"loss": loss}))
    assert [job.number for job in sorted(jobs, key=goal.rank)] == [1, 0]


def test_a_job_without_a_finite_figure_is_never_the_best(tmp_path):
    goal = build_goal(SweepConfig(), CLM)
    jobs = [Job(n, tmp_path / str(n), [], {}, status=DONE) for n in range(2)]
    for job, loss in zip(jobs, ("null", "5.0"), strict=True):  # as result.json writes NaN
        job.run_dir.mkdir()
        (job.run_dir / "result.json").write_text(f'{{"loss": 1.0, "eval": {{"loss": {loss}}}}}')
    assert [job.number for job in sorted(jobs, key=goal.rank)] == [1, 0]
    assert write_summary(jobs, goal, tmp_path, {})["best"] == 1
    alone = write_summary(jobs[:1], goal, tmp_path, {})
    assert alone["best"] is None and render(alone).endswith(
        "no finished job has a finite eval loss"
    )
