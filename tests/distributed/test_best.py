"""checkpoint.best: the best evaluation's weights are kept whatever their age, and they are what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.checkpoint_files import saved_masters, step_folder
from finetune.saved import checkpoint_of
from tests.distributed.ranks import metrics, run_cases

STEPS = 6
CASES = {"full": ["zero=stage2", "adapter=full"], "lora": ["zero=stage3", "adapter=lora", "adapter.targets=all-linear"]}


@pytest.fixture(scope="module")
def runs(pocket_gptj: Path, unequal_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("best")
    # After its start the learning rate is so high that the model gets worse.
    common = ["recipe=clm_pile", f"model.path={pocket_gptj}", "model.dtype=fp32", f"data.train={unequal_documents}",
              f"data.eval={unequal_documents}", "task.max_length=128", f"train.steps={STEPS}", "train.global_batch=4",
              "train.micro_batch=2", "train.eval_every=1", "optim.schedule=constant", f"optim.warmup={STEPS}",
              "optim.grad_clip=0", "export.verify=false", "checkpoint.best=true", "seed=5"]
    run_cases(2, [[*common, *words, f"optim.lr={lr}", f"run_dir={root / name}"]
                  for (name, words), lr in zip(CASES.items(), (2.0, 60.0), strict=True)])
    return root


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

    saved = saved_masters(folder)
    exported = {key: value for file in (run / "export").glob("*.safetensors") for key, value in load_file(file).items()}
    assert exported
    compared = 0
    for name in saved.names():
        key = name.replace(".default.", ".")
        if key not in exported:
            key = f"base_model.model.{key}" if f"base_model.model.{key}" in exported else key
        torch.testing.assert_close(exported[key].flatten().float(),
                                   saved.read(name, "master", 0, exported[key].numel()), rtol=0, atol=0)
        compared += 1
    assert compared == len(exported)
    lines = metrics(run)
    assert all(len(line["peak_host_bytes_per_rank"]) == 2 for line in lines)
    assert max(lines[-1]["peak_host_bytes_per_rank"]) >= lines[-1]["host_bytes"] > 0
    assert str(best) in (run / "export/README.md").read_text()
