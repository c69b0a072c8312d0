"""lm-eval's tasks for a model in training: the figures of its own `hf` model, and what cannot be asked."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from task_setup import CPU, models

from finetune.check import check
from finetune.compose import compose_train
from finetune.config import SweepConfig, direction_of
from finetune.errors import Interrupted, UserError
from finetune.inference import lm_eval as suite
from finetune.inference.lm_eval import ask, ask_in_training, check_metric, judged, load_tasks
from finetune.process import LAUNCHER_VARIABLES
from finetune.sweep.search import build_goal
from tests.lm_eval_tasks import NAMES, write_tasks


@pytest.fixture(scope="module")
def pair():
    return models("lm")


@pytest.fixture(scope="module")
def folder(pair, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own; the reference answer is what the model answers to the first question."""
    ids = torch.tensor([tokenizer("The number 0 of the")["input_ids"]])
    new = pair[1].generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=50256)
    answer = tokenizer.decode(new[0, ids.shape[1] :]).split("\n")[0]
    return write_tasks(tmp_path_factory.mktemp("tasks"), rows=6, answer=answer)


def test_figures_are_those_of_its_own_hf_model(pair, folder, tokenizer, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in LAUNCHER_VARIABLES:  # with those of an earlier call, lm-eval joins a group
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pair
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batches: list[int] = []
    found = ask_in_training(
        ours,
        tokenizer,
        load_tasks(list(NAMES), str(folder), seed=3),
        4,
        after_batch=lambda: batches.append(1),
        batch=4,
        seed=3,
        device=CPU,
    )
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    wanted = simple_evaluate(
        HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4),
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=4,
        bootstrap_iters=0,
    )["results"]
    for task, metrics in found.items():
        assert metrics == {
            name: pytest.approx(wanted[task][f"{name},none"], rel=1e-5) for name in metrics
        }
    assert found["own_answer"]["exact_match"] > 0 and len(batches) == 4


def test_a_request_to_stop_interrupts_it(pair, folder, tokenizer):
    def stop() -> None:
        raise Interrupted

    lm = judged(pair[0], tokenizer, 4, device=CPU, after_batch=stop)
    with pytest.raises(Interrupted):
        ask(lm, load_tasks(["own_words"], str(folder), seed=0), limit=None, seed=0, bars=False)


def test_the_better_end_is_lm_evals():
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import is_higher_better, metric_registry

    ends = {name: is_higher_better(name) for name in metric_registry}
    assert {"acc", "word_perplexity", "ter"} <= set(ends)
    assert {name: direction_of(f"task/{name}") == "max" for name in ends} == ends


def test_what_cannot_be_loaded_is_refused(folder, tmp_path, monkeypatch):
    own = partial(suite.task_index, defaults=False)  # lm-eval's own list takes ten seconds
    monkeypatch.setattr(suite, "task_index", lambda include, defaults=True: own(include))
    load = partial(load_tasks, seed=0, section="eval.")
    with pytest.raises(UserError, match=r"no task no_such\n.*lm-eval ls tasks.*eval\.task_dir="):
        load(["own_words", "no_such"], str(folder))
    tasks = load(["own_words"], str(folder))
    check_metric(tasks, "own_words/acc")
    with pytest.raises(UserError, match=r"own_words/f1 is no metric .*\n.*own_words/acc"):
        check_metric(tasks, "own_words/f1")

    values = yaml.safe_load((folder / "own_words.yaml").read_text())
    values["metric_list"][0]["higher_is_better"] = False
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(values | {"task": "turned"}))
    with pytest.raises(UserError, match="higher_is_better: false"):
        check_metric(load(["turned"], str(tmp_path)), "turned/acc")
    values["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "none.jsonl")}}
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(values | {"task": "turned"}))
    with pytest.raises(UserError, match="cannot load turned"):
        load(["turned"], str(tmp_path))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["task=classify"], "lm-eval asks language models, which classify does not train"),
        (["data.eval=null"], "asked beside evaluation data, and there are none"),
        (["data.eval={piqa: a.jsonl}"], "are both named piqa"),
        (["train.metric=piqa/acc", "eval.lm_eval_every=2"], "needs a figure at every evaluation"),
        (["train.metric=arc/acc"], "no evaluation set arc, nor such a task in eval.lm_eval"),
    ],
)
def test_what_cannot_be_asked_is_refused(words, problem):
    with pytest.raises(UserError, match=problem):
        words = ["recipe=clm_pile_lora", "debug=tiny", "eval.lm_eval=[piqa]", *words]
        check(compose_train(words), 1, False)


def test_a_sweep_compares_by_a_task():
    words = ["recipe=clm_pile_lora", "debug=tiny", "eval.lm_eval=[piqa,wikitext]"]
    job, named = compose_train(words), compose_train([*words, "train.metric=wikitext/ter"])
    check(named, 1, False)
    assert build_goal(SweepConfig(metric="piqa/acc_norm"), job).maximize
    assert not build_goal(SweepConfig(metric="wikitext/word_perplexity"), job).maximize
    goal = build_goal(SweepConfig(), named)
    assert (goal.metric, goal.maximize) == ("wikitext/ter", False)
