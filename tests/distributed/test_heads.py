"""All heads: losses on any ranks, stage and accumulation are an independent torch loop's; evaluations agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from finetune.assets.paths import asset
from finetune.process import free_port
from tests.distributed import heads_reference
from tests.distributed.ranks import ROOT, evaluate, losses, metrics, run_cases

STEPS, BATCH, EVALUATED = 6, 8, 13
LORA = ["adapter=lora", "adapter.targets=all-linear", "adapter.rank=4"]
ADAPTERS = {
    "full": ["adapter=full"],
    "lora": LORA,
    "dora": ["adapter=dora", *LORA[1:]],
    "ia3": ["adapter=ia3"],
    "prompt": ["adapter=prompt", "adapter.virtual_tokens=3"],
    "prefix": ["adapter=prefix", "adapter.virtual_tokens=3"],
}
ALONE = {
    "classify-full": 0,
    "classify-lora": 0,
    "classify-prompt": 1,
    "qa-full": 1,
    "qa-dora": 0,
    "qa-prefix": 0,
    "instruct-lora": 0,
    "instruct-prompt": 0,
    "instruct-ia3": 2,
}
"""Run on one rank, with accumulation 1 -> ZeRO stage."""
TOGETHER = {
    "classify-full": 2,
    "classify-lora": 3,
    "classify-prompt": 3,
    "qa-full": 0,
    "qa-dora": 3,
    "qa-prefix": 3,
    "instruct-lora": 1,
    "instruct-prompt": 2,
    "instruct-ia3": 3,
}
"""The same on two ranks, with accumulation 4."""
EXPORTED = ("classify-lora", "qa-prefix", "instruct-prompt")
pytestmark = pytest.mark.slow


def overrides(root: Path, small: Path, name: str, ranks: int) -> list[str]:
    task, _, adapter = name.partition("-")
    stage = (ALONE if ranks == 1 else TOGETHER)[name]
    return [
        f"recipe={task}_lora",
        f"model.path={small}",
        "model.dtype=fp32",
        *ADAPTERS[adapter],
        f"zero=stage{stage}",
        f"data.train={root / task}-train.json",
        f"data.eval={root / task}-eval.json",
        f"run_dir={root / name}-{ranks}",
        "task.max_length=160",
        f"train.steps={STEPS}",
        f"train.global_batch={BATCH}",
        "train.packing=false",
        "seed=4",
        f"train.micro_batch={BATCH if ranks == 1 else 1}",
        "train.eval_batch=2",
        "train.eval_every=0",
        "checkpoint.every=0",
        "train.activation_checkpointing=false",
        "optim.lr=2e-3",
        "optim.schedule=constant",
        "optim.warmup=0",
        f"export.enabled={str(name in EXPORTED and ranks == 1).lower()}",
        *(["task.stride=16"] if task == "qa" else []),
    ]


def write_data(root: Path) -> None:
    """A few real rows of each task; an odd number to evaluate on, so that two ranks never have the same share."""
    for task in ("classify", "instruct"):
        for name, count in (("train", 24), ("eval", EVALUATED)):
            with (asset("data") / task / f"{name}.jsonl").open(encoding="utf-8") as f:
                (root / f"{task}-{name}.json").write_text(
                    "".join(_short(line) for line in islice(f, count))
                )
    for name, count in (("train", 3), ("eval", 2)):
        articles = json.loads((asset("data") / f"qa/{name}.json").read_text())["data"][:count]
        (root / f"qa-{name}.json").write_text(json.dumps({"version": "v2.0", "data": articles}))


def _short(line: str) -> str:
    """Long completions would be bad rows at 160 tokens."""
    row = json.loads(line)
    return json.dumps({key: " ".join(value.split()[:24]) for key, value in row.items()}) + "\n"


@pytest.fixture(scope="module")
def root(pocket_gptj: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    write_data(root)
    run_cases(2, [overrides(root, pocket_gptj, name, 2) for name in TOGETHER])
    run_cases(1, [overrides(root, pocket_gptj, name, 1) for name in ALONE])
    return root


@pytest.mark.parametrize("name", ALONE)
def test_losses_are_plain_torchs_on_any_ranks_stage_and_accumulation(root, pocket_gptj, name):
    """The norm as well: Adam would hide a gradient that is off by a factor."""
    wanted, norms = heads_reference.train(overrides(root, pocket_gptj, name, 1))
    assert len(set(wanted)) == STEPS
    for ranks in (1, 2):
        assert losses(root / f"{name}-{ranks}") == pytest.approx(wanted, rel=1e-5), ranks
        assert [line["grad_norm"] for line in metrics(root / f"{name}-{ranks}")] == pytest.approx(
            norms, rel=1e-4
        ), ranks


def test_the_size_of_class_weights_does_not_matter(root, pocket_gptj, tmp_path):
    """Only their ratio: also where those of a whole step add up to less than one."""
    weights = {name: [scale, 2 * scale] for name, scale in (("small", 1e-3), ("large", 1.0))}
    run_cases(
        1,
        [
            [
                *overrides(root, pocket_gptj, "classify-full", 1),
                f"task.class_weights={values}",
                f"run_dir={tmp_path / name}",
                "train.micro_batch=2",
                "data.eval=null",
            ]
            for name, values in weights.items()
        ],
    )
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=1e-6)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 4)])
def test_hugging_faces_trainer_multiplies_this_loss_by_accumulation_and_ranks(
    pocket_gptj, tmp_path, ranks, accumulation
):
    """Above, classify-full has one loss at accumulation 1 on one rank and 4 on two. There the Trainer logs 8 times as much."""
    script = [
        str(Path(heads_reference.__file__).with_name("hf_trainer.py")),
        str(pocket_gptj),
        str(tmp_path),
        str(accumulation),
    ]
    found = json.loads(start(ranks, script)[0].split("FOUND")[1].splitlines()[0])
    assert found["logged"] == pytest.approx(accumulation * ranks * found["mean"], rel=1e-3)


@pytest.mark.parametrize("name", ALONE)
def test_evaluation_in_training_is_the_same_on_one_rank_and_two(root, name):
    """Thirteen rows in batches of 2: unequal shares, nothing dropped and nothing counted twice."""
    alone, together = (metrics(root / f"{name}-{ranks}", "eval")[-1] for ranks in (1, 2))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        assert together[key] == (
            pytest.approx(value, rel=2e-4) if isinstance(value, float) else value
        ), key
    counted = {"classify": "examples", "qa": "questions"}.get(name.partition("-")[0])
    questions = json.loads((root / "qa-eval.json").read_text())["data"]
    expected = {
        "examples": EVALUATED,
        "questions": sum(len(p["qas"]) for a in questions for p in a["paragraphs"]),
    }
    assert counted is None or alone[counted] == expected[counted]


def start(ranks: int, words: list[str]) -> list[str]:
    """`python words...` as so many ranks; their outputs."""
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "LOCAL_SIZE": str(ranks),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(ranks)
    ]
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)[-5000:]
    return outputs


@pytest.fixture(scope="module")
def evaluated(root) -> Path:
    """Every exported run by its checkpoint and by its export, on one rank, and by its export on two."""
    one, two = [], []
    for name in EXPORTED:
        run, data = root / f"{name}-1", f"data.eval={root / name.partition('-')[0]}-eval.json"
        one += [
            [f"run={run}", f"out={root / name}-run", "batch=3"],
            [f"model={run / 'export'}", data, f"out={root / name}-export"],
        ]
        two += [[f"model={run / 'export'}", data, f"out={root / name}-ranks", "batch=2"]]
    evaluate(1, one)
    evaluate(2, two)
    return root


@pytest.mark.parametrize("name", EXPORTED)
def test_a_run_its_export_and_two_ranks_give_the_same_figures_and_predictions(evaluated, name):
    trained = metrics(evaluated / f"{name}-1", "eval")[-1]
    texts = {}
    for kind in ("run", "export", "ranks"):
        found = json.loads((evaluated / f"{name}-{kind}" / "eval.json").read_text())
        for key, value in trained.items():
            if key not in ("kind", "step"):
                wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                assert found[key] == wanted, (kind, key)
        lines = (evaluated / f"{name}-{kind}" / "predictions.jsonl").read_text().splitlines()
        texts[kind] = [json.loads(line) for line in lines]
    said = "loss" if name.startswith("instruct") else "prediction"
    for kind, rows in texts.items():
        same = pytest.approx if said == "loss" else list
        assert [row[said] for row in rows] == same([row[said] for row in texts["run"]]), kind
        assert [row["where"] for row in rows] == [row["where"] for row in texts["run"]] and rows, (
            kind
        )
