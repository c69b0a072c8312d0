"""Question answering: exact windows and targets, the loss against Hugging Face's, decoding against brute force."""

from __future__ import annotations

import json
import re
import string
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from task_setup import EOS, NEWLINE, assert_same_gradients, evaluate_on, models

from finetune.config import QaConfig
from finetune.data.cache import build_store
from finetune.data.encode_qa import token_span, window_starts
from finetune.data.mixture import DataSource
from finetune.errors import UserError
from finetune.tasks.build import build_task
from finetune.tasks.preview import preview
from finetune.tasks.qa import NOTHING, answered, best_spans
from finetune.tasks.squad_metrics import best_threshold, normalise, score, score_v1, summarise

WHO = [8241, 30]  # "Who?"
ADA = [2782, 64, 1138, 5811, 13]  # "Ada met Bob."
LETTERS = "a b c d e f"
A_TO_F = [64, 275, 269, 288, 304, 277]


def row(context, question="Who?", answers=(), name="q1"):
    return {
        "id": name,
        "context": context,
        "question": question,
        "answers": {
            "text": [text for text, _ in answers],
            "answer_start": [start for _, start in answers],
        },
    }


BOB = row("Ada met Bob.", answers=[("Bob", 8)])
NOBODY = row("Ada met Bob.", "Why?", name="q2")
LONG = row(LETTERS, answers=[("e", 8)], name="q3")
ROWS = [BOB, NOBODY, LONG, row("Hi. Ciao", answers=[("Ciao", 4), ("Hi", 0)], name="q4")]


def cfg(**options) -> QaConfig:
    return QaConfig(**({"max_length": 16, "stride": 1, "n_best": 4} | options))


def test_question_context_and_null_slot(make):
    made = make(cfg(), [BOB])
    assert made.example(0) == {
        "ids": [*WHO, NEWLINE, *ADA, EOS],
        "char_start": [0, 0, 0, 0, 2, 3, 7, 11, 0],
        "char_end": [0, 0, 0, 2, 3, 7, 11, 12, 0],
        "context_at": 3,
        "start": 6,
        "end": 6,
        "window": 0,
        "answers": 1,
    }
    assert json.loads(made.store.blob("question", 0)) == {
        "id": "q1",
        "where": f"{_path(made)}:1 id q1",
        "context": "Ada met Bob.",
        "answers": ["Bob"],
    }


def _path(made):
    return json.loads((made.store.path / "meta.json").read_text())["spec"]


@pytest.mark.parametrize(
    "answers",
    [
        {"text": [""], "answer_start": [-1]},
        [{"text": "", "answer_start": -1}],
        "{'text': [''], 'answer_start': [-1]}",
        [{"text": None, "answer_start": -1}],
        {"text": [], "answer_start": []},
    ],
)
def test_an_empty_answer_at_minus_one_is_no_answer(make, answers):
    article = {
        "paragraphs": [
            {
                "context": "Ada met Bob.",
                "qas": [
                    {"id": "q2", "question": "Why?", "answers": answers, "is_impossible": True}
                ],
            }
        ]
    }
    rows = [BOB, NOBODY | {"answers": answers}] + ([article] if isinstance(answers, list) else [])
    made = make(cfg(), rows)
    assert all(
        (made.example(i)["start"], made.example(i)["answers"]) == (8, 0)
        for i in range(1, len(rows))
    )


def test_no_answer_is_the_trailing_token_which_sees_everything(make):
    made = make(cfg(), [NOBODY])
    assert (made.example(0)["start"], made.example(0)["end"]) == (8, 8)
    assert made.task.unanswerable and not make(cfg(), [BOB]).task.unanswerable


def test_windows_overlap_and_those_without_the_answer_point_at_their_null_slot(make):
    made = make(cfg(max_length=7), [LONG])  # three context tokens a window
    examples = [made.example(i) for i in range(len(made.store))]
    assert [e["ids"] for e in examples] == [
        [*WHO, NEWLINE, *A_TO_F[a:b], EOS] for a, b in ((0, 3), (2, 5), (4, 6))
    ]
    assert [(e["start"], e["end"], e["window"]) for e in examples] == [
        (6, 6, 0),
        (5, 5, 1),
        (3, 3, 2),
    ]
    assert [e["char_start"][3] for e in examples] == [0, 3, 7]
    assert [bool(made.store.blob("question", i)) for i in range(3)] == [True, False, False]
    assert made.task.notes(made.store) == ["1 of 1 contexts are read in several windows: 3 in all"]


def test_an_answer_cut_by_a_window_is_not_its_target(make):
    made = make(cfg(max_length=7), [row(LETTERS, answers=[("c d", 4)])])
    assert [(made.example(i)["start"], made.example(i)["end"]) for i in range(3)] == [
        (6, 6),
        (3, 4),
        (5, 5),
    ]


def test_of_several_answers_the_first_that_is_whole_in_a_window_counts(make):
    made = make(cfg(max_length=7), [row(LETTERS, answers=[("f", 10), ("a", 0)])])
    assert [(made.example(i)["start"], made.example(i)["end"]) for i in range(3)] == [
        (3, 3),
        (6, 6),
        (4, 4),
    ]


def test_tokens_of_one_character_belong_together(make):
    context = "Zoë 🦜🙂 met Bob."  # the parrot takes several tokens with the same offsets
    made = make(
        cfg(max_length=32),
        [row(context, answers=[("🦜", 4)]), row(context, answers=[("🦜🙂 met", 4)])],
    )
    chars = np.stack([made.store.column("char_start"), made.store.column("char_end")], 1)
    for i, text in enumerate(("🦜", "🦜🙂 met")):
        a, b = (int(made.store.offsets[i]) + made.example(i)[name] for name in ("start", "end"))
        assert context[chars[a, 0] : chars[b, 1]].strip() == text
    assert made.example(0)["end"] > made.example(0)["start"]


def test_spans_and_window_starts():
    chars = np.array([[0, 2], [2, 3], [3, 7], [7, 11], [11, 12]])
    assert [token_span(chars, *span) for span in ((0, 3), (4, 7), (8, 12))] == [
        (0, 1),
        (2, 2),
        (3, 4),
    ]
    assert (
        window_starts(6, 3, 1) == [0, 2, 4]
        and window_starts(3, 3, 1) == [0]
        and window_starts(7, 3, 1) == [0, 2, 4]
    )


def test_every_answer_of_the_shipped_data_is_found_again(tokenizer):
    task = build_task(QaConfig(max_length=512, stride=128), tokenizer, False)
    store = build_store([DataSource("asset:data/qa/eval.json")], task.encoder())
    starts, ends, context = (store.column(n) for n in ("char_start", "char_end", "context_at"))
    found, text = 0, ""
    for i in range(len(store)):
        question = json.loads(store.blob("question", i) or "null") or question  # noqa: F821
        a, b = (int(store.offsets[i]) + int(store.column(name)[i]) for name in ("start", "end"))
        if b < store.offsets[i + 1] - 1:
            text = question["context"][starts[a] : ends[b]]
            found += 1
            # An annotation may end inside a token ("patients" of "patients'"): then the tokens around it are meant.
            assert any(answer in text for answer in question["answers"]), (
                text,
                question["answers"],
            )
    assert found >= 50 and (context > 0).all()


def test_articles_and_flat_rows_give_the_same_windows(make):
    flat = make(cfg(), [BOB, NOBODY])
    qas = [
        {
            "id": "q1",
            "question": "Who?",
            "answers": [{"text": "Bob", "answer_start": 8}],
            "is_impossible": False,
        },
        {
            "id": "q2",
            "question": "Why?",
            "answers": [],
            "is_impossible": True,
            "plausible_answers": [{"text": "Ada", "answer_start": 0}],
        },
    ]
    article = {"title": "T", "paragraphs": [{"context": "Ada met Bob.", "qas": qas}]}
    nested = make(cfg(), [article])
    assert [nested.example(i) for i in range(2)] == [flat.example(i) for i in range(2)]


def test_a_batch_selects_context_and_null_slot(make):
    made = make(cfg(), [BOB, NOBODY])
    batch = made.batch()
    assert batch["pool"].tolist() == [3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17] and batch[
        "sizes"
    ] == [6, 6]
    assert batch["starts"].tolist() == [3, 5] and batch["ends"].tolist() == [3, 5]
    assert made.task.count(batch) == 2 and batch["tokens"] == 18


def _reference(theirs, made) -> torch.Tensor:
    """Mean loss from Hugging Face's module, one window at a time, the question masked out of the softmax."""
    losses = []
    for i in range(len(made.store)):
        example = made.example(i)
        out = theirs(input_ids=torch.tensor([example["ids"]]))
        for logits, target in (
            (out.start_logits, example["start"]),
            (out.end_logits, example["end"]),
        ):
            masked = logits[0].clone()
            masked[: example["context_at"]] = float("-inf")
            losses.append(F.cross_entropy(masked[None], torch.tensor([target])))
    return torch.stack(losses).mean()


def test_loss_and_gradient_are_hugging_faces_one_window_at_a_time(make):
    made = make(cfg(max_length=8), ROWS)
    ours, theirs = models("qa")
    loss = made.loss(ours) / made.task.count(made.batch())
    expected = _reference(theirs, made)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


def test_accumulation_and_ranks_leave_loss_and_gradient_alone(make):
    made = make(cfg(max_length=8), ROWS)
    whole, parts = models("qa")[0], models("qa")[0]
    (made.loss(whole) / len(made.rows)).backward()
    for i in range(len(made.rows)):
        (made.loss(parts, [i]) / len(made.rows)).backward()
    assert_same_gradients(parts, whole)


def test_a_rank_without_rows_takes_part_with_loss_zero(make):
    made = make(cfg(), ROWS)
    ours, _ = models("qa")
    loss = made.loss(ours, [])
    loss.backward()
    assert (
        float(loss.detach()) == 0
        and made.task.count(made.batch([])) == 0
        and made.batch([])["tokens"] == 0
    )
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def _brute_force(window, max_tokens):
    spans = [
        (window[a, 0] + window[b, 1] - window[-1].sum(), a, b)
        for a in range(len(window) - 1)
        for b in range(a, min(len(window) - 1, a + max_tokens))
    ]
    return sorted(spans, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_decoding_is_brute_force_over_valid_spans(seed):
    window = np.random.default_rng(seed).normal(size=(12, 2)).astype(np.float32)
    first, last, scores = best_spans(window, 11, 4)
    expected = _brute_force(window, 4)[:11]
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [(a, b) for _, a, b in expected]
    np.testing.assert_allclose(scores, [s for s, _, _ in expected], rtol=1e-5)


def test_decoding_without_a_valid_span():
    window = np.array([[0.0, 9.0], [5.0, 0.0], [9.0, 0.0], [0.0, 0.0]], np.float32)
    _, _, scores = best_spans(window, 1, 4)  # the only start stands behind the only end
    assert scores.tolist() == [np.float32(NOTHING)]


def _official(prediction, answers):
    """evaluate-v2.0.py, as published."""

    def normalize(s):
        s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s).split())

    def f1(gold, pred):
        gold, pred = normalize(gold).split(), normalize(pred).split()
        same = sum((Counter(gold) & Counter(pred)).values())
        if len(gold) == 0 or len(pred) == 0:
            return int(gold == pred)
        if same == 0:
            return 0
        precision, recall = same / len(pred), same / len(gold)
        return 2 * precision * recall / (precision + recall)

    gold = [a for a in answers if normalize(a)] or [""]
    return max(int(normalize(a) == normalize(prediction)) for a in gold), max(
        f1(a, prediction) for a in gold
    )


CASES = [
    ("the Cat!", ["cat"]),
    ("a cat sat", ["cat sat", "the dog"]),
    ("", []),
    ("cat", []),
    ("", ["cat"]),
    ("The", ["the", "cat"]),
    ("cat cat dog", ["cat dog dog"]),
    ("24 mm Hg", ["24 mm-Hg", "mm Hg"]),
]


@pytest.mark.parametrize(("prediction", "answers"), CASES)
def test_scores_are_the_official_scripts(prediction, answers):
    assert score(prediction, answers) == pytest.approx(_official(prediction, answers))


def _official_v1(prediction, answers):
    """evaluate-v1.1.py, as published."""

    def normalize(s):
        s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())

    def f1(gold, pred):
        gold, pred = normalize(gold).split(), normalize(pred).split()
        same = sum((Counter(pred) & Counter(gold)).values())
        if same == 0:
            return 0
        precision, recall = same / len(pred), same / len(gold)
        return 2 * precision * recall / (precision + recall)

    return max(int(normalize(a) == normalize(prediction)) for a in answers), max(
        f1(a, prediction) for a in answers
    )


@pytest.mark.parametrize(("prediction", "answers"), [(p, a) for p, a in CASES if a])
def test_without_unanswerable_questions_the_rules_of_v1_hold(prediction, answers):
    assert score_v1(prediction, answers) == pytest.approx(_official_v1(prediction, answers))


def test_blanks_around_an_answer_do_not_move_its_tokens(make):
    plain, blank = (
        make(cfg(), [row("Ada met Bob. Hi", answers=[answer])]).example(0)
        for answer in (("Bob", 8), (" Bob. ", 7))
    )
    assert (plain["start"], plain["end"]) == (6, 6) and (blank["start"], blank["end"]) == (6, 7)


def test_a_span_of_blanks_is_no_answer(make):
    made = make(cfg(), [row("Ada\n\nBob", answers=[("Bob", 5)])])
    slots = len(made.example(0)["ids"]) - made.example(0)["context_at"] - 1

    def best_of(order):
        """The question's answer where these slots score best, the first one most."""
        windows = {
            "example": np.array([0]),
            "first": np.array([order]),
            "last": np.array([order]),
            "score": np.arange(len(order), 0, -1, np.float32)[None],
        }
        return answered(made.store, 0, windows)

    texts = [best_of([i])["span"] for i in range(slots)]
    assert "" in texts and "Bob" in texts
    order = sorted(range(slots), key=lambda i: texts[i] != "")  # the blanks score best
    found = best_of(order)
    assert found["span"] == next(texts[i] for i in order if texts[i]) and "" not in found["n_best"]


def test_answers_that_cannot_be_found_are_counted(make):
    made = make(cfg(max_length=7), [row(LETTERS, answers=[("a b c d", 0)])])
    assert made.task.notes(made.store)[1].startswith("1 answers are whole in no window")
    made = make(cfg(max_answer_tokens=2), [row(LETTERS, answers=[("a b c", 0)])])
    assert made.task.notes(made.store)[0].startswith(
        "1 answers are longer than task.max_answer_tokens = 2"
    )


def test_summary_splits_by_kind_only_with_unanswerable_questions():
    scores = [(1.0, 1.0), (0.0, 0.5), (1.0, 1.0), (0.0, 0.0)]
    assert normalise("The  A-Team, an ox") == "ateam ox"
    assert summarise(scores, [True] * 4) == {"exact_match": 0.5, "f1": 0.625, "questions": 4}
    split = summarise(scores, [True, True, False, False])
    assert split["has_answer"] == {"exact_match": 0.5, "f1": 0.75, "questions": 2}
    assert split["no_answer"] == {"exact_match": 0.5, "f1": 0.5, "questions": 2}


def test_best_threshold_is_brute_forces():
    rng = np.random.default_rng(0)
    for _ in range(20):
        spans, margins = rng.random(9).tolist(), rng.normal(size=9).tolist()
        answerable = (rng.random(9) < 0.6).tolist()
        spans = [s if a else 0.0 for s, a in zip(spans, answerable, strict=True)]

        def total(threshold, spans=spans, margins=margins, answerable=answerable):
            return (
                sum(
                    (m > threshold) * (not a) if m > threshold else s
                    for s, m, a in zip(spans, margins, answerable, strict=True)
                )
                / 9
            )

        threshold, best = best_threshold(spans, margins, answerable)
        assert best == pytest.approx(max(total(t) for t in [min(margins) - 1, *margins]))
        assert total(threshold) == pytest.approx(best)


def _expected_answer(theirs, made, examples, threshold, cfg):
    """One question's answer, window by window, straight from the definition."""
    found = []
    for i in examples:
        e = made.example(i)
        out = theirs(input_ids=torch.tensor([e["ids"]]))
        logits = (
            torch.stack([out.start_logits[0], out.end_logits[0]], 1)
            .detach()
            .numpy()[e["context_at"] :]
        )
        for value, a, b in _brute_force(logits, cfg.max_answer_tokens):
            found.append(
                (value, e["char_start"][e["context_at"] + a], e["char_end"][e["context_at"] + b])
            )
    value, a, b = max(found)
    return "" if -value > threshold else (a, b)


@pytest.mark.parametrize("threshold", [-100.0, 0.0, 100.0])
def test_answers_over_all_windows_of_a_question(make, threshold):
    config = cfg(max_length=7, n_best=99, max_answer_tokens=2, null_threshold=threshold)
    made = make(config, [BOB, NOBODY, LONG])
    ours, theirs = models("qa", seed=3)
    (found,), predictions = evaluate_on(1, ours, made)
    for examples, asked, prediction in zip(
        ([0, 1], [2, 3], [4, 5, 6]), (BOB, NOBODY, LONG), predictions, strict=True
    ):
        expected = _expected_answer(theirs, made, examples, threshold, config)
        text = expected if expected == "" else asked["context"][slice(*expected)].strip()
        assert prediction["prediction"] == text and prediction["id"] == asked["id"]
    official = [_official(p["prediction"], p["answers"]) for p in predictions]
    assert [found["exact_match"], found["f1"]] == pytest.approx(np.mean(official, axis=0))
    assert (
        found["questions"] == 3 and found["has_answer"]["questions"] == 2 and found["windows"] == 7
    )
    assert found["loss"] == pytest.approx(float(_reference(theirs, made).detach()), rel=1e-5)
    assert all(p["prediction"] == "" for p in predictions) == (threshold == -100.0)


def test_without_unanswerable_questions_something_is_always_answered(make):
    made = make(cfg(null_threshold=-100.0), [BOB, LONG])
    (found,), predictions = evaluate_on(1, models("qa")[0], made)
    assert all(p["prediction"] for p in predictions) and "no_answer" not in found
    # A model that learnt from v1 may stay silent on v2, and one that learnt from v2 on v1.
    made = make(cfg(null_threshold=-100.0), [BOB, LONG], ROWS)
    (found,), predictions = evaluate_on(1, models("qa")[0], made)
    assert not any(p["prediction"] for p in predictions) and found["no_answer"]["f1"] == 1.0
    made = make(cfg(null_threshold=-100.0), ROWS, [BOB, LONG])
    _, predictions = evaluate_on(1, models("qa")[0], made)
    assert not any(p["prediction"] for p in predictions)


def test_one_rank_and_three_report_the_same(make):
    made = make(cfg(max_length=7), ROWS)
    ours, _ = models("qa")
    (alone,), predictions = evaluate_on(1, ours, made, batch=1)
    several, theirs = evaluate_on(3, ours, made, batch=1)
    assert several == [alone] * 3 and theirs == predictions and len(predictions) == 4


@pytest.mark.parametrize(
    "answers",
    [
        {"text": [""], "answer_start": [-1]},
        {"text": [None], "answer_start": [None]},
        [{"text": "", "answer_start": -1}],
        '{"text": [""], "answer_start": [-1]}',
    ],
)
def test_an_empty_text_at_minus_one_is_no_answer(make, answers):
    made = make(cfg(), [NOBODY | {"answers": answers}])
    assert made.example(0) == make(cfg(), [NOBODY]).example(0) and made.task.unanswerable


def test_articles_may_mark_unanswerable_questions_by_an_empty_text(make):
    qas = [
        {
            "id": "a",
            "question": "Why?",
            "is_impossible": True,
            "answers": [{"text": "", "answer_start": start}],
        }
        for start in (-1, 0)
    ] + [{"id": "b", "question": "Why?", "answers": [{"text": "", "answer_start": -1}]}]
    made = make(cfg(), [{"paragraphs": [{"context": "Ada met Bob.", "qas": qas}]}])
    assert [made.example(i)["start"] for i in range(3)] == [8, 8, 8]
    for bad in (
        {"answers": [{"text": "", "answer_start": 0}]},
        {"is_impossible": False, "answers": [{"text": "", "answer_start": -1}]},
        {"answers": [{"text": "Bob", "answer_start": -1}]},
    ):
        article = {
            "paragraphs": [
                {"context": "Ada met Bob.", "qas": [{"id": "a", "question": "Who?"} | bad]}
            ]
        }
        with pytest.raises(UserError, match="id a: "):
            make(cfg(), [article])


def test_a_bad_question_does_not_cost_its_article(make):
    qas = [
        {"id": "good", "question": "Who?", "answers": [{"text": "Bob", "answer_start": 8}]},
        {"id": "bad", "question": "Who?", "answers": [{"text": "Bob", "answer_start": 7}]},
    ]
    made = make(
        cfg(), [{"paragraphs": [{"context": "Ada met Bob.", "qas": qas}]}], on_bad_row="skip"
    )
    assert len(made.store) == 1 and made.store.stats["bad_rows"] == 1
    assert (
        "id bad: answer 'Bob' does not stand at answer_start = 7"
        in made.store.stats["bad_row_messages"][0]
    )


def test_a_preview_that_a_person_can_check(make):
    made = make(cfg(), [BOB, NOBODY])
    assert preview(made.task, made.store, made.rows, made.task.tokenizer, 9) == (
        "-- row 0, example 0: 9 tokens, answer of 1 tokens\nWho?\\n\nAda met\n⟦ Bob⟧\n.<|endoftext|>\n\n"
        "-- row 1, example 1: 9 tokens, no answer: the null slot\nWhy?\\n\nAda met Bob.\n⟦<|endoftext|>⟧"
    )


def test_answers_may_stand_in_a_string_as_csv_files_have_them(make):
    row = {"id": "1", "context": "Paris is big.", "question": "What?"}
    answers = [
        {"text": ["Paris"], "answer_start": [0]},
        {"text": [], "answer_start": []},
        [{"text": "big", "answer_start": 9}],
    ]
    plain = make(QaConfig(), [row | {"answers": answer} for answer in answers])
    quoted = make(QaConfig(), [row | {"answers": json.dumps(answer)} for answer in answers])
    assert [plain.example(i) for i in range(3)] == [quoted.example(i) for i in range(3)]
