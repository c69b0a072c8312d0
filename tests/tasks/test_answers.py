"""Generated answers: which prompts are asked, greedy text as Hugging Face's, and known values of the metrics."""

from __future__ import annotations

import math
import threading
from functools import partial

import pytest
import torch
from task_setup import CPU, Rank, models

from finetune.check import check
from finetune.compose import compose_train
from finetune.config import ClmConfig, InstructConfig
from finetune.errors import UserError
from finetune.inference.sample import Sampling, continue_flat
from finetune.training.answers import Answers, text_metrics
from finetune.training.evaluate import EvalSet, evaluate

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " Ciao now"},
]


def test_instructions_ask_for_the_last_answer(make, tokenizer):
    made = make(InstructConfig(template="chat", max_length=24), [{"messages": TURNS}])
    prompt, reference = made.task.question(made.store, 0, 4)
    assert prompt == made.task.prompt_ids(TURNS[:3])
    assert tokenizer.decode(reference).strip() == "Ciao now"
    assert made.task.question(made.store, 0, 20)[0] == prompt[-4:]


def test_documents_are_continued_from_their_middle(make, tokenizer):
    text = "one two three four five six"
    made = make(ClmConfig(max_length=8), [{"text": text}, {"text": "one"}])
    assert [tokenizer.decode(ids) for ids in made.task.question(made.store, 0, 2)] == [
        "one two three",
        " four five",
    ]
    assert tokenizer.decode(made.task.question(made.store, 0, 6)[0]) == "one two"
    assert made.task.question(made.store, 1, 2)[0] == []  # nothing to ask: left out


@pytest.mark.parametrize("together", [False, True])
def test_answers_are_hugging_faces_greedy_text_on_any_ranks(make, tokenizer, together):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    records = [{"prompt": " ".join(words[: i + 1]), "completion": words[-i]} for i in range(1, 8)]
    made = make(InstructConfig(template="plain", max_length=64), records)
    ours, theirs = models("lm")
    generate = partial(continue_flat, ours, tokenizer, how=Sampling(6, temperature=0.0), device=CPU)
    answers = Answers(generate, 5, 6, together)

    def on(size: int):
        shared, barrier, results = {}, threading.Barrier(size), [None] * size

        def run(rank: int) -> None:
            world, sets = Rank(rank, size, shared, barrier), {"": EvalSet(made.store, made.rows)}
            results[rank] = evaluate(ours, made.task, sets, world, 2, answers=answers)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    (metrics, rows), *others = on(1) + on(2)
    assert all(other[1] == rows for other in others) and len(rows) == 5
    assert all(other[0]["chrf"] == metrics["chrf"] for other in others)
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        new = theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=50256)
        text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["text"] == text and row["reference"] in words


def test_metrics_have_their_known_values():
    scores = text_metrics(["the cat sat "] * 2, ["the cat sat", "the cat sat down"])
    rouge = (1 + 6 / 7) / 2
    assert {name: scores[name] for name in ("exact_match", "rouge1", "rouge2", "rougeL")} == (
        pytest.approx(
            {"exact_match": 1 / 2, "rouge1": rouge, "rouge2": (1 + 4 / 5) / 2, "rougeL": rouge}
        )
    )
    # Precisions 6/7, 5/6, 4/5, 3/4; the other way round all 1, and a text that is too short by 1 of 7.
    long, short = "the cat sat on the mat now", "the cat sat on the mat"
    assert text_metrics([long], [short])["bleu"] == pytest.approx(100 * (3 / 7) ** 0.25)
    assert text_metrics([short], [long])["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 6))
    assert text_metrics([long], [long])["chrf"] == pytest.approx(100)
    assert set(text_metrics([], []).values()) == {None}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.metric=rougeL"], "train.metric = rougeL is a metric of generated answers"),
        (["eval.generate=4", "data.eval=null"], "eval.generate = 4 needs evaluation data"),
        (["eval.generate=4", "eval.generate_tokens=9999"], "leaves task.max_length"),
        (["eval.generate=4", "task=classify"], "only task=clm and task=instruct generate text"),
    ],
)
def test_what_cannot_be_generated_is_refused(words, problem):
    with pytest.raises(UserError, match=problem):
        check(compose_train(["recipe=clm_pile_lora", "debug=tiny", *words]), 1, False)
