"""Runs whose LoRA begins as components of the base are peft's, on any ranks and stage, resumed, exported, trained on."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from finetune.cli.app import compose_config
from finetune.cli.export import run as export
from finetune.compose import compose_train
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import UserError
from finetune.export.reopen import checkpoint_of, init_of, load_config
from finetune.files import read_json
from finetune.gptj.adapter_init import FILE
from finetune.gptj.adapter_start import start_problems
from finetune.planning.shape import LINEARS
from tests.distributed import reference
from tests.distributed.ranks import evaluate, losses, metrics, run_cases
from tests.distributed.test_knobs import overrides
from tests.export.test_export_matrix import difference, exported, trained

pytestmark = pytest.mark.slow
SIZES = ["adapter.rank=4", "adapter.alpha=8", "seed=3", "optim.min_lr=0", "optim.weight_decay=0.1"]
INITS = {"pissa": ["adapter.init=pissa"], "olora": ["adapter.init=olora", "adapter.rslora=true"]}
CUT = 2


@pytest.fixture(scope="module")
def runs(pocket_gptj: Path, unequal_documents: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("init")

    def case(name: str, *more: str) -> list[str]:
        words = [*SIZES, f"checkpoint.every={CUT}", *INITS[name.partition("-")[0]], *more]
        return overrides(pocket_gptj, unequal_documents, root / name, *words)

    def resumed(name: str) -> str:
        return f"resume={root / name / 'checkpoints' / f'step-{CUT:08d}'}"

    pairs = [
        "recipe=preference_lora", "data=preference_sample", f"model.path={pocket_gptj}", "model.dtype=fp32", "adapter.init=pissa",
        "data.max_rows=8", "task.max_length=512", "task.template=chat", "train.epochs=null", "train.steps=1",
        "train.global_batch=2", "train.micro_batch=2", "train.eval_every=0", "optim.warmup=0",
        "export.enabled=false", f"run_dir={root / 'pairs'}", "zero=stage0", "train.probe=false",
    ]  # fmt: skip
    run_cases(
        1,
        [
            case("pissa-1", "zero=stage0"),
            case("olora-1", "zero=stage1"),
            case("pissa-half", "zero=stage0", "model.dtype=bf16", "task.tokens=[<a>]"),
            case("pissa-drawn", "zero=stage0", "model.init=random", "train.steps=1"),
            pairs,
        ],
    )
    start = [
        f"adapter.start={root / 'olora-2'}",
        "adapter.rank=8",
        f"adapter.alpha={8 * math.sqrt(2)!r}",
    ]
    run_cases(
        2,
        [
            case("pissa-2", "zero=stage2"),
            case("olora-2", "zero=stage3"),
            case("olora-again", "zero=stage3", resumed("olora-2")),
            case("pissa-elsewhere", "zero=stage3", resumed("pissa-1")),
            case("olora-next", "zero=stage3", "adapter.init=default", *start),
        ],
    )
    return root


@pytest.mark.parametrize("init", INITS)
def test_losses_are_those_of_peft(runs, pocket_gptj, unequal_documents, init):
    def wrap(model):
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules=list(LINEARS),
            init_lora_weights=init,
            use_rslora=init == "olora",
        )
        return peft.get_peft_model(model, settings)

    tokenizer = load_tokenizer(str(pocket_gptj))
    wanted = reference.three_steps(pocket_gptj, unequal_documents, tokenizer, wrap=wrap)
    for ranks in (1, 2):
        assert losses(runs / f"{init}-{ranks}") == pytest.approx(wanted, abs=2e-5)


def test_a_resumed_run_is_the_same_run(runs):
    """Bit for bit on the same ranks; elsewhere from the matrices of the run that it continues."""
    assert losses(runs / "olora-again") == losses(runs / "olora-2")[CUT:]
    wanted = losses(runs / "pissa-1")[CUT:]
    assert losses(runs / "pissa-elsewhere") == pytest.approx(wanted, abs=1e-5)
    for name in ("olora-again", "pissa-elsewhere"):
        theirs = name.replace("again", "2").replace("elsewhere", "1")
        assert (runs / name / FILE).read_bytes() == (runs / theirs / FILE).read_bytes()


@pytest.mark.parametrize("name", ["pissa-1", "olora-2", "pissa-drawn"])
def test_exports_open_on_the_original_base(runs, name):
    """As a LoRA of twice the rank, by plain peft; the checkpoint gives the same one, and a merged model."""
    run = runs / name
    ids = torch.tensor([json.loads((run / "reference.json").read_text())[0]])
    wanted = trained(run, "lm", ids)
    folders = [run / "export", exported(run, "adapter"), exported(run, "merged")]
    assert max(difference(folder, "lm", ids, wanted) for folder in folders) < 1e-5
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders[:2])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert read_json(run / "export/adapter_config.json")["r"] == 8


@pytest.mark.parametrize("kind", ["adapter", "phi"])
def test_a_run_in_bf16_is_proven_within_its_rounding(runs, kind, forked, tmp_path):
    """The adapter's base is the original, of which training had the rounded residual; with an own token."""
    words = [f"run={runs / 'pissa-half'}", f"kind={kind}", f"out={tmp_path / kind}"]
    assert export(compose_config(words, "export")) == 0
    figures = read_json(tmp_path / kind / "export.json")
    assert figures["verified"] and figures["relative_difference"] < 0.02


def test_an_export_is_trained_on_as_an_ordinary_lora(runs, pocket_gptj):
    done, after = (metrics(runs / name, "eval") for name in ("olora-2", "olora-next"))
    assert after[0]["loss"] == pytest.approx(done[-1]["loss"], abs=1e-5)
    common = [
        *overrides(pocket_gptj, pocket_gptj, runs, f"adapter.start={runs / 'olora-2'}"),
        "adapter.rslora=true",
    ]
    (problem,) = start_problems(compose_train(common))
    words = shlex.split(re.sub("^Add ", "", problem.remedy))
    assert not [*start_problems(compose_train([*common, *words]))]


def test_a_run_is_evaluated_with_its_own_matrices(runs, unequal_documents, tmp_path):
    words = [f"run={runs / 'pissa-1'}", f"data.eval={unequal_documents}", f"out={tmp_path}"]
    evaluate(1, [words])
    wanted = metrics(runs / "pissa-1", "eval")[-1]["loss"]
    assert read_json(tmp_path / "eval.json")["loss"] == pytest.approx(wanted, abs=1e-5)
    file = runs / "pissa-1" / FILE
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-4] + bytes(4))
        run_dir, checkpoint = checkpoint_of(runs / "pissa-1")
        with pytest.raises(UserError, match="not the matrices that the adapter of this checkpoint"):
            init_of(load_config(run_dir), checkpoint)
    finally:
        file.write_bytes(content)


def test_the_reference_of_preferences_is_the_base(runs):
    """The model before step 1 is the base, so that neither answer is preferred yet."""
    assert losses(runs / "pairs") == pytest.approx([math.log(2)], abs=1e-5)
