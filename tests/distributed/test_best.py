"""checkpoint.best: the best evaluation's weights are kept whatever their age, and they are what is exported."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.checkpointing.format import StateReader, step_folder
from finetune.export.reopen import checkpoint_of
from finetune.training.trainer import better
from tests.distributed.ranks import metrics, run_cases

STEPS = 6
CASES = {
    "full": ["zero=stage2", "adapter=full"],
    "lora": ["zero=stage3", "adapter=lora", "adapter.targets=all-linear"],
}


@pytest.fixture(scope="module")
def runs(
    pocket_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("best")
    # After its start the learning rate is so high that the model gets worse.
    common = [
        "recipe=clm_pile",
        f"model.path={pocket_gptj}",
        "model.dtype=fp32",
        f"data.train={unequal_documents}",
        f"data.eval={unequal_documents}",
        "task.max_length=128",
        f"train.steps={STEPS}",
        "train.global_batch=4",
        "train.micro_batch=2",
        "train.eval_every=1",
        "optim.schedule=constant",
        f"optim.warmup={STEPS}",
        "optim.grad_clip=0",
        "export.verify=false",
        "checkpoint.best=true",
        "seed=5",
    ]
    run_cases(
        2,
        [
            [*common, *words, f"optim.lr={lr}", f"run_dir={root / name}"]
            for (name, words), lr in zip(CASES.items(), (2.0, 60.0), strict=True)
        ],
    )
    return root


@pytest.mark.parametrize(
    ("direction", "values", "best"),
    [
        ("min", [math.nan, 2.0, 1.0, math.nan, 1.5], 2),
        ("max", [math.nan, 0.2, 0.9, math.nan, 0.5], 2),
        ("min", [math.nan, math.inf, 3.0], 2),
        ("max", [0.5, math.nan], 0),
    ],
)
def test_what_is_not_a_number_is_never_the_best(direction, values, best):
    so_far, chosen = None, None
    for place, value in enumerate(values):
        if better(value, so_far, direction):
            so_far, chosen = value, place
    assert chosen == best
    assert not better(math.nan, None, direction)
    assert better(1.0, math.nan, direction)  # as checkpoints of earlier versions hold it


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_best_step_is_kept_and_exported(runs, name):
    run = runs / name
    result = json.loads((run / "result.json").read_text())
    evaluated = {line["step"]: line["loss"] for line in metrics(run, "eval")}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert 1 <= best < STEPS - 2, evaluated  # else the newest two would hold it anyway
    assert result["best_step"] == result["export_step"] == best and result["step"] == STEPS

    folder = step_folder(run / "checkpoints", best)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[0] == folder.name and len(kept) <= 3
    assert checkpoint_of(run) == (run, folder)

    saved = StateReader(folder)
    exported = {
        key: value
        for file in (run / "export").glob("*.safetensors")
        for key, value in load_file(file).items()
    }
    assert exported
    compared = 0
    for name in saved.names():
        key = name.replace(".default.", ".")
        if key not in exported:
            key = f"base_model.model.{key}" if f"base_model.model.{key}" in exported else key
        torch.testing.assert_close(
            exported[key].flatten().float(),
            saved.read(name, "master", 0, exported[key].numel()),
            rtol=0,
            atol=0,
        )
        compared += 1
    assert compared == len(exported)
    lines = metrics(run)
    assert all(len(line["peak_host_bytes_per_rank"]) == 2 for line in lines)
    assert max(lines[-1]["peak_host_bytes_per_rank"]) >= lines[-1]["host_bytes"] > 0
    assert str(best) in (run / "export/README.md").read_text()


@pytest.fixture(scope="module")
def judged(pocket_gptj: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose accuracy and loss are best at different steps, judged by either."""
    root = tmp_path_factory.mktemp("judged")
    data = root / "rows.jsonl"
    rows = [
        {"text": text, "label": label}
        for text, label in zip("abcdefgh", [0, 0, 0, 0, 0, 1, 1, 1], strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "recipe=classify_lora",
        f"model.path={pocket_gptj}",
        "model.dtype=fp32",
        f"data.train={data}",
        f"data.eval={data}",
        "task.max_length=16",
        "train.epochs=null",
        "train.steps=8",
        "train.global_batch=8",
        "train.micro_batch=8",
        "train.eval_every=1",
        "optim.schedule=constant",
        "optim.warmup=0",
        "optim.lr=3e-3",
        "zero=stage0",
        "export.enabled=false",
        "checkpoint.best=true",
        "seed=1",
    ]
    judges = {
        "own": [],
        "loss": ["train.metric=loss"],
        "patient": ["train.early_stopping=2"],
        "patient-loss": ["train.early_stopping=2", "train.metric=loss"],
    }
    run_cases(1, [[*common, *words, f"run_dir={root / name}"] for name, words in judges.items()])
    again = root / "again"
    shutil.copytree(root / "own", again)
    run_cases(1, [[*common, "train.steps=9", "train.metric=loss", f"run_dir={again}"]])
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "better"), [("own", "accuracy", max), ("loss", "loss", min)]
)
def test_best_is_by_the_metric_that_is_named(judged, name, metric, better):
    run = judged / name
    evaluated = {line["step"]: line for line in metrics(run, "eval")}
    assert len(evaluated) == 8
    value = better(line[metric] for line in evaluated.values())
    first = next(step for step, line in evaluated.items() if line[metric] == value)
    result = json.loads((run / "result.json").read_text())
    assert (result["best_metric"], result["best"], result["best_step"]) == (metric, value, first)
    assert step_folder(run / "checkpoints", first).is_dir()


@pytest.mark.slow
def test_early_stopping_follows_the_same_metric(judged):
    by = {
        name: [line[metric] for line in metrics(judged / name, "eval")]
        for name, metric in (("patient", "accuracy"), ("patient-loss", "loss"))
    }
    whole = [line["accuracy"] for line in metrics(judged / "own", "eval")]
    assert len(by["patient"]) < len(by["patient-loss"]) == 8, (
        "the loss still falls where accuracy stands still"
    )
    stop = len(by["patient"])
    assert by["patient"] == whole[:stop] and max(whole[: stop - 2]) >= max(whole[stop - 2 : stop])


@pytest.mark.slow
def test_a_resumed_run_with_another_metric_compares_it_with_no_value_of_the_old_one(judged):
    result = json.loads((judged / "again" / "result.json").read_text())
    last = metrics(judged / "again", "eval")[-1]
    assert last["step"] == 9 and (result["best_metric"], result["best"], result["best_step"]) == (
        "loss",
        last["loss"],
        9,
    )
