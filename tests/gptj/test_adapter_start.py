"""adapter.start: an adapter of another kind, size, head or base is refused, with the words that fit."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest

from finetune.compose import compose_train
from finetune.gptj.adapter_start import start_problems
from finetune.gptj.load import base_record

SAVED = peft.LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"]
)
FITTING = ["adapter.rank=4", "adapter.alpha=8", "adapter.targets=[q_proj,v_proj]"]


def problems(model: Path, start: Path, *words: str) -> str:
    common = ["recipe=clm_pile_lora", f"model.path={model}", f"adapter.start={start}"]
    return "\n".join(p.render() for p in start_problems(compose_train([*common, *words])))


@pytest.fixture
def saved(tmp_path: Path, pocket_gptj: Path) -> Path:
    SAVED.save_pretrained(tmp_path)
    record = {"base": str(pocket_gptj), "base_weights": base_record(pocket_gptj, "lm")}
    (tmp_path / "finetune.json").write_text(json.dumps(record))
    return tmp_path


def test_an_adapter_that_fits_has_no_problem(saved, pocket_gptj):
    assert problems(pocket_gptj, saved, *FITTING) == ""
    (saved / "export").mkdir()
    (saved / "adapter_config.json").rename(saved / "export/adapter_config.json")
    assert problems(pocket_gptj, saved, *FITTING) == "", "a run names its export"


def test_other_sizes_are_told_with_the_words_that_fit(saved, pocket_gptj):
    text = problems(pocket_gptj, saved, "adapter.alpha=8")
    assert "has rank 4 (here 16), targets [v_proj,q_proj] (here [k_proj" in text
    assert "Add adapter.rank=4 'adapter.targets=[v_proj,q_proj]'" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=ia3"], "is of kind lora, this run trains ia3"),
        ([*FITTING, "task=qa"], "was trained with the head 'lm', this task trains 'qa'"),
        ([*FITTING, "model.init=random"], "model.init=random draws other weights"),
    ],
)
def test_other_kinds_heads_and_weights_are_refused(saved, pocket_gptj, words, said):
    assert said in problems(pocket_gptj, saved, *words)


def test_another_base_is_refused(saved, pocket_gptj, small_gptj):
    text = problems(small_gptj, saved, *FITTING)
    assert "these are not the weights that the adapter" in text
    assert f"model.path={pocket_gptj}" in text


def test_a_place_without_an_adapter_says_what_to_do(tmp_path, pocket_gptj):
    assert "holds no adapter" in problems(pocket_gptj, tmp_path)
    assert "To train a whole model further: model.path=" in problems(pocket_gptj, pocket_gptj)
    (tmp_path / "checkpoints").mkdir()
    assert "launch/export.py run=" in problems(pocket_gptj, tmp_path)


def test_what_training_here_does_not_have_is_named(saved, pocket_gptj):
    values = json.loads((saved / "adapter_config.json").read_text())
    values |= {"rank_pattern": {"q_proj": 8}, "bias": "all"}
    (saved / "adapter_config.json").write_text(json.dumps(values))
    assert "was made with rank_pattern, bias" in problems(pocket_gptj, saved, *FITTING)
