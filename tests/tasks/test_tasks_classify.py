"""Classification: exact ids, targets and weights, losses against Hugging Face's, metrics by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from task_setup import CPU, EOS, NEWLINE, assert_same_gradients, evaluate_on, models

from finetune.config import ClassifyConfig
from finetune.data.encode_classify import cut_text, shares, sort_names
from finetune.errors import UserError
from finetune.tasks.base import to_device
from finetune.tasks.build import build_task
from finetune.tasks.classify_metrics import (
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)
from finetune.tasks.preview import preview

A_TO_F = [64, 275, 269, 288, 304, 277]  # "a b c d e f"
SUM = [17, 10, 17, 30]  # "2+2?"
ROWS = [
    {"text": "a b c d e f", "label": "no"},
    {"text": "2+2?", "label": "yes"},
    {"text": "Hi", "label": "no"},
    {"text": "4", "label": "maybe"},
    {"text": "a b", "label": "yes"},
]
TAGS = [
    {"text": "a b c d e f", "label": ["x", "y"]},
    {"text": "2+2?", "label": []},
    {"text": "Hi", "label": ["z"]},
    {"text": "4", "label": ["z", "x"]},
]
NUMBERS = [
    {"text": "a b c d e f", "label": 1.5},
    {"text": "2+2?", "label": -2},
    {"text": "Hi", "label": "0.25"},
]


def cfg(**options) -> ClassifyConfig:
    return ClassifyConfig(**options)


def test_single_labels(make):
    made = make(cfg(), ROWS)
    assert made.task.names == ["maybe", "no", "yes"] and made.task.num_labels == 3
    batch = made.batch([0, 1])
    assert batch["ids"].tolist() == [*A_TO_F, EOS, *SUM, EOS]
    assert batch["cu_seqlens"].tolist() == [0, 7, 12] and batch["pool"].tolist() == [6, 11]
    assert batch["targets"].tolist() == [1, 2] and batch["weights"].tolist() == [1, 1]
    assert made.task.count(batch) == 2 and batch["tokens"] == 12 and "labels" not in batch


def test_pairs_are_joined_by_a_newline(make):
    rows = [{"text": "2+2?", "b": "4", "label": 0}, {"text": "Hi", "b": "a b", "label": 1}]
    made = make(cfg(text_pair_field="b"), rows)
    assert made.example(0)["ids"] == [*SUM, NEWLINE, 19, EOS]
    assert made.example(1)["ids"] == [17250, NEWLINE, 64, 275, EOS]


@pytest.mark.parametrize(
    ("truncation", "kept"), [("head", [64, 275, 269, 288]), ("head_tail", [64, 275, 304, 277])]
)
def test_too_long_texts_lose_tokens_but_never_the_eos(make, truncation, kept):
    made = make(cfg(max_length=5, truncation=truncation), ROWS)
    assert made.example(0) == {"ids": [*kept, EOS], "cut": 2}
    assert made.example(1) == {"ids": [*SUM, EOS], "cut": 0}
    assert made.task.notes(made.store) == [
        f"1 of 5 texts lost tokens (truncation {truncation}): 2 in all (task.max_length = 5)"
    ]


def test_of_a_pair_the_longer_text_gives_first(make):
    row = {"text": "2+2?", "b": "a b c d e f", "label": 0}
    made = make(cfg(max_length=10, text_pair_field="b"), [row, row | {"label": 1}])
    assert made.example(0) == {"ids": [*SUM, NEWLINE, 64, 275, 269, 288, EOS], "cut": 2}
    assert shares([[0] * 4, [0] * 9], 8) == [4, 4] and shares([[0] * 9, [0] * 9], 7) == [3, 4]
    assert shares([[0] * 9, [0] * 2], 8) == [6, 2] and shares([[0] * 3, [0] * 4], 8) == [3, 4]
    assert cut_text(list(range(9)), 5, "head_tail") == [0, 1, 2, 7, 8]


def test_names_are_sorted_and_integers_by_value(make):
    assert sort_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert sort_names(["b", "10", "9"]) == ["10", "9", "b"]
    made = make(cfg(), [{"text": "Hi", "label": label} for label in (10, 9, 2.0, "11", " 2 ")])
    assert made.task.names == ["2", "9", "10", "11"]
    assert made.batch()["targets"].tolist() == [2, 1, 0, 3, 0]
    assert make(cfg(), [{"text": "Hi", "label": b} for b in (True, False)]).task.names == [
        "false",
        "true",
    ]


def test_given_names_fix_the_order_and_integers_count_in_them(make):
    made = make(
        cfg(labels=["no", "yes"]),
        [{"text": "Hi", "label": label} for label in ("yes", 0, "1", "no")],
    )
    assert made.task.names == ["no", "yes"] and made.batch()["targets"].tolist() == [1, 0, 1, 0]


def test_given_names_that_are_integers_are_names_and_truth_counts(make, tmp_path):
    stars = cfg(labels=[1, 2, 3])
    assert make(stars, [{"text": "Hi", "label": label} for label in (1, 3, "2")]).batch()[
        "targets"
    ].tolist() == [0, 2, 1]
    with pytest.raises(UserError, match=r"label '0' is unknown: task\.labels has '1', '2', '3'"):
        make(stars, [{"text": "Hi", "label": label} for label in (1, 0)])
    made = make(
        cfg(labels=["no", "yes"]), [{"text": "Hi", "label": truth} for truth in (True, False)]
    )
    assert made.batch()["targets"].tolist() == [1, 0]
    assert make(cfg(labels=[False, True]), [{"text": "Hi", "label": True}]).task.names == [
        "false",
        "true",
    ]
    assert sort_names(["01", "1", "001"]) == sort_names(["1", "001", "01"]) == ["001", "01", "1"]


@pytest.mark.parametrize(
    ("names", "labels", "targets"),
    [
        (
            ["True", "False"],
            [True, False, "true", "FALSE"],
            [0, 1, 0, 1],
        ),  # as Hydra hands over [true,false]
        (["yes", "no"], [True, False, "Yes"], [0, 1, 0]),
        (["yes", "no"], [0, 1], [0, 1]),
        (["false", "true"], [0, 1, "1.0", True], [0, 1, 1, 1]),
        (["1", "0"], [0, 1, True, "1", 1.0], [1, 0, 0, 0, 0]),
        (["1.0", "2.0"], [1, "2", 2.0], [0, 1, 1]),
        (["negative", "Positive"], ["POSITIVE", "negative", 0], [1, 0, 0]),
        (["us", "US"], ["US", "us"], [1, 0]),
    ],
)
def test_a_name_wins_over_its_place_whatever_its_type_and_case(make, names, labels, targets):
    made = make(cfg(labels=names), [{"text": "Hi", "label": label} for label in labels])
    assert made.batch()["targets"].tolist() == targets and made.task.describe()["labels"] == names


@pytest.mark.parametrize(
    ("names", "label", "problem"),
    [
        (["true", "false"], 1, "label 1 could be 'true' by its meaning and 'false' by its place"),
        (["true", "false"], "0", "could be 'false' by its meaning and 'true'"),
        (["us", "US"], "Us", "label 'Us' could be 'us', 'US'"),
        (
            ["negative", "positive"],
            True,
            "label true is a boolean, and none of task.labels = 'negative', 'positive'",
        ),
    ],
)
def test_a_label_that_could_be_two_names_is_refused(tokenizer, names, label, problem):
    encoder = build_task(cfg(labels=names), tokenizer, True).encoder()
    (fault,) = encoder.encode([("d:1", {"text": "Hi", "label": label})])
    with pytest.raises(UserError, match=problem):
        raise fault


def test_collected_names_that_differ_in_spelling_alone_are_refused(make):
    for labels in (["Positive", "positive"], ["1", "1.0", "2"]):
        with pytest.raises(UserError, match="differ in their spelling alone"):
            make(cfg(), [{"text": "Hi", "label": label} for label in labels])
    names = ["Positive", "positive"]
    assert make(cfg(labels=names), [{"text": "Hi", "label": n} for n in names]).batch()[
        "targets"
    ].tolist() == [0, 1]


def test_evaluation_data_may_spell_a_collected_name_otherwise(make):
    made = make(
        cfg(),
        [{"text": "Hi", "label": label} for label in (True, False)],
        [{"text": "Hi", "label": label} for label in ("True", "FALSE", "true", 0)],
    )
    assert made.task.names == ["false", "true"] and made.batch()["targets"].tolist() == [1, 0, 1, 0]


def test_an_export_names_its_outputs_as_training_did(make, tokenizer):
    from finetune.export.hf_files import config_values, tokenizer_for

    made = make(
        cfg(labels=["True", "False"]), [{"text": "Hi", "label": label} for label in (True, False)]
    )
    about = made.task.describe()
    values = config_values(
        models("classify")[0].config,
        "classify",
        "base",
        "fp32",
        about,
        tokenizer_for(tokenizer, "classify", about, 50400),
    )
    for i, name in enumerate(("True", "False")):
        assert (
            values["id2label"][i] == name
            and values["label2id"][name] == i == made.batch()["targets"][i]
        )


@pytest.mark.parametrize(
    "row", [[1.0, 0.0], [0.0, 1.0], [True, False], [1.0], [0, 1], [1, 0], [1, 0, 1]]
)
def test_zeros_and_ones_are_no_labels(tokenizer, row):
    encoder = build_task(cfg(problem="multi_label", labels=["x", "y"]), tokenizer, True).encoder()
    (fault,) = encoder.encode([("d:1", {"text": "Hi", "label": row})])
    with pytest.raises(UserError, match="List the labels that apply, not zeros and ones"):
        raise fault


def test_zeros_and_ones_in_every_row_are_no_labels_and_numbers_of_labels_are(make):
    with pytest.raises(
        UserError,
        match=r"train.jsonl:1: .*a 0 and a 1 in every row.*\n  List the labels that apply",
    ):
        make(
            cfg(problem="multi_label"),
            [{"text": "Hi", "label": label} for label in ([0, 1], [1, 0])],
        )
    made = make(
        cfg(problem="multi_label"), [{"text": "Hi", "label": label} for label in ([0, 1], [1], [])]
    )
    assert made.batch()["targets"].tolist() == [[1, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("separator", "cells"),
    [
        (None, ['["x", "y"]', "['z']", "[]"]),
        ("comma", ["x,y", " z ", ""]),
        ("pipe", ["y | x", "z", " "]),
        ("space", ["x  y", "z ", ""]),
        (" and ", ["x and y", "z", ""]),
        ("comma", [["x", "y"], "['z']", []]),
    ],
)
def test_cells_with_several_labels(make, separator, cells):
    made = make(
        cfg(problem="multi_label", label_separator=separator),
        [{"text": "Hi", "label": cell} for cell in cells],
    )
    assert made.task.names == ["x", "y", "z"] and made.batch()["targets"].tolist() == [
        [1, 1, 0],
        [0, 0, 1],
        [0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("cell", "word"), [("x,y", "comma"), ("x;y", "semicolon"), ("x|y", "pipe"), ("x", "comma")]
)
def test_a_cell_that_is_no_array_names_the_key_that_splits_it(tokenizer, cell, word):
    encoder = build_task(cfg(problem="multi_label"), tokenizer, True).encoder()
    (fault,) = encoder.encode([("d:1", {"text": "Hi", "label": cell})])
    assert isinstance(fault, UserError) and fault.remedy.endswith(f"task.label_separator={word}.")


def test_several_labels(make):
    made = make(cfg(problem="multi_label"), TAGS)
    assert made.task.names == ["x", "y", "z"]
    assert made.batch()["targets"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1]]


def test_numbers(make):
    made = make(cfg(problem="regression"), NUMBERS)
    assert made.task.num_labels == 1
    assert made.batch()["targets"].tolist() == [1.5, -2.0, 0.25]


def _reference(theirs, made, problem, weights=None):
    """Mean loss from Hugging Face's module, one unpadded example at a time, and torch's own criterion."""
    logits = torch.cat(
        [
            theirs(input_ids=torch.tensor([made.example(i)["ids"]]), use_cache=False).logits
            for i in range(len(made.store))
        ]
    )
    targets = torch.tensor(made.batch()["targets"])
    if problem == "single_label":
        return F.cross_entropy(logits, targets, weight=weights)
    if problem == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)
    return F.mse_loss(logits[:, 0], targets)


@pytest.mark.parametrize(
    ("problem", "rows", "weights"),
    [
        ("single_label", ROWS, None),
        ("single_label", ROWS, [0.5, 2.0, 0.0]),
        ("multi_label", TAGS, None),
        ("multi_label", TAGS, [0.5, 2.0, 1.0]),
        ("regression", NUMBERS, None),
    ],
)
def test_loss_and_gradient_are_those_of_torch_and_hugging_face(make, problem, rows, weights):
    made = make(cfg(problem=problem, class_weights=weights), rows)
    ours, theirs = models("classify", made.task.num_labels)
    loss = made.loss(ours) / made.task.count(made.batch())
    expected = _reference(theirs, made, problem, None if weights is None else torch.tensor(weights))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


def test_balanced_weights_are_those_of_scikit_learn(make):
    rows = [ROWS[i] for i in (0, 1, 1, 2, 1, 0)]
    made = make(cfg(class_weights="balanced"), rows)
    targets = made.batch()["targets"]
    wanted = compute_class_weight("balanced", classes=np.unique(targets), y=targets)
    assert made.task.class_weights == pytest.approx(wanted.tolist())
    assert made.batch()["weights"] == pytest.approx(wanted[targets])
    again = make(cfg(class_weights="balanced"), rows[:2], previous=made.task.describe())
    assert again.task.class_weights == made.task.class_weights, "an export keeps them"


def test_accumulation_and_ranks_leave_loss_and_gradient_alone(make):
    made = make(cfg(class_weights=[3.0, 1.0, 0.5]), [ROWS[i % 5] for i in range(8)])
    whole, parts = models("classify", 3)[0], models("classify", 3)[0]
    count = made.task.count(made.batch())
    (made.loss(whole) / count).backward()
    total = sum(made.task.count(made.batch([i])) for i in range(8))
    for i in range(8):  # accumulation 4 x 2 ranks
        (made.loss(parts, [i]) / total).backward()
    assert total == count
    assert_same_gradients(parts, whole)


def test_a_rank_without_rows_takes_part_with_loss_zero(make):
    for problem, rows in (("single_label", ROWS), ("multi_label", TAGS), ("regression", NUMBERS)):
        made = make(cfg(problem=problem), rows)
        ours, _ = models("classify", made.task.num_labels)
        loss = made.loss(ours, [])
        loss.backward()
        assert (
            float(loss.detach()) == 0
            and made.task.count(made.batch([])) == 0
            and made.batch([])["tokens"] == 0
        )
        assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_single_label_metrics_of_a_table_worked_out_by_hand():
    truth = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    decided = np.array([0, 0, 0, 1, 1, 2, 2, 0])
    found = single_label_metrics(truth, decided, ["a", "b", "c", "never"])
    assert found["accuracy"] == 5 / 8 and found["examples"] == 8
    assert found["confusion"] == [[3, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert found["per_class"]["a"] == pytest.approx(
        {"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "count": 4}
    )
    assert found["per_class"]["b"] == pytest.approx(
        {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "count": 2}
    )
    assert found["per_class"]["never"] == {"precision": 0, "recall": 0, "f1": 0, "count": 0}
    assert found["f1"] == pytest.approx(
        (3 / 4 + 1 / 2 + 1 / 2) / 3
    )  # a class that never occurs is no part of it


def test_multi_label_metrics_of_a_table_worked_out_by_hand():
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]])
    decided = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 0]])
    found = multi_label_metrics(truth, decided, ["x", "y", "never"])
    assert found["accuracy"] == 2 / 4  # two rows are right as a whole
    assert found["per_class"]["x"] == pytest.approx(
        {"precision": 1, "recall": 2 / 3, "f1": 4 / 5, "count": 3}
    )
    assert found["per_class"]["y"] == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "f1": 4 / 5, "count": 2}
    )
    assert found["f1"] == pytest.approx((4 / 5 + 4 / 5 + 0) / 3)
    assert found["micro_f1"] == pytest.approx(2 * 4 / (5 + 5))


def test_multi_label_metrics_of_one_label():
    found = multi_label_metrics(
        np.array([[1], [1], [0], [0]]), np.array([[1], [0], [0], [0]]), ["x"]
    )
    assert found["accuracy"] == 3 / 4
    assert found["f1"] == found["micro_f1"] == found["per_class"]["x"]["f1"] == pytest.approx(2 / 3)
    assert found["per_class"]["x"]["count"] == 2


def test_regression_metrics_worked_out_by_hand():
    truth, decided = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
    found = regression_metrics(truth, decided)
    assert found == pytest.approx({"mse": 2 / 3, "pearson": 0.5, "examples": 3})
    assert regression_metrics(np.ones(3), decided)["pearson"] is None
    diverged = regression_metrics(truth, np.array([1.0, np.nan, 2.0]))
    assert np.isnan(diverged["mse"]) and diverged["pearson"] is None


@pytest.mark.parametrize(
    ("problem", "rows", "weights"),
    [
        ("single_label", ROWS, [0.5, 2.0, 1.0]),
        ("multi_label", TAGS, None),
        ("regression", NUMBERS, None),
    ],
)
def test_one_rank_and_three_report_the_same(make, problem, rows, weights):
    made = make(cfg(problem=problem, class_weights=weights), rows)
    ours, theirs = models("classify", made.task.num_labels)
    (alone,), predictions = evaluate_on(1, ours, made, batch=1)
    several, theirs_too = evaluate_on(3, ours, made, batch=1)
    assert several == [alone] * 3 and theirs_too == predictions and alone["examples"] == len(rows)
    expected = _reference(theirs, made, problem, None if weights is None else torch.tensor(weights))
    assert alone["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_evaluation_and_predictions_say_what_the_model_decided(make):
    made = make(cfg(), ROWS)
    ours, _ = models("classify", 3)
    (found,), predictions = evaluate_on(1, ours, made)
    outputs = ours(
        **{
            "input_ids": torch.tensor(made.batch()["ids"])[None],
            "position_ids": torch.tensor(made.batch()["positions"])[None],
            "cu_seqlens": torch.tensor(made.batch()["cu_seqlens"]),
            "positions": torch.tensor(made.batch()["pool"]),
        }
    )
    decided = [made.task.names[i] for i in outputs.argmax(-1)]
    assert [p["prediction"] for p in predictions] == decided
    assert [p["label"] for p in predictions] == [row["label"] for row in ROWS]
    assert predictions[2]["where"].endswith("train.jsonl:3")
    right = sum(a == row["label"] for a, row in zip(decided, ROWS, strict=True))
    assert (
        found["accuracy"] == right / 5
        and np.sum(found["confusion"]) == 5
        and found["labels"] == made.task.names
    )


def test_a_description_brings_the_names_back(make, tokenizer):
    described = make(cfg(), ROWS).task.describe()
    made = make(cfg(), [{"text": "Hi", "label": "yes"}], previous=described)
    assert made.task.names == ["maybe", "no", "yes"] and made.batch()["targets"].tolist() == [2]
    task = build_task(cfg(labels=["yes", "no", "maybe"]), tokenizer, False)
    with pytest.raises(UserError, match="the model was trained with"):
        task.prepare(None, described)


def test_labels_unseen_in_training_name_their_line(make):
    with pytest.raises(
        UserError, match=r"eval.jsonl:2: label 'perhaps' is unknown: .* 'maybe', 'no', 'yes'"
    ):
        make(cfg(), ROWS, [ROWS[0], {"text": "Hi", "label": "perhaps"}])
    skipped = make(cfg(), ROWS, [ROWS[0], {"text": "Hi", "label": "perhaps"}], on_bad_row="skip")
    assert len(skipped.store) == 1 and skipped.store.stats["bad_rows"] == 1


def test_a_store_encoded_before_the_names_were_known_is_checked_too(make, tokenizer):
    first, second = make(cfg(), ROWS), make(cfg(), [*ROWS[:1], {"text": "Hi", "label": "perhaps"}])
    with pytest.raises(UserError, match=r"train.jsonl:2: label 'perhaps' is unknown"):
        first.task.rows(second.store)


CONFIGS = [
    (dict(problem="ranking"), "task.problem = ranking is unknown"),
    (dict(truncation="tail"), "task.truncation = tail is unknown"),
    (dict(class_weights=[1.0, 2.0]), "has 2 numbers for 3 labels"),
    (dict(class_weights=[1.0, 2.0, -1.0]), "must not be negative"),
    (dict(class_weights=[0.0, 0.0, 0.0]), "nor all zero"),
    (dict(problem="regression", class_weights=[1.0]), "no meaning for a regression"),
    (dict(problem="regression", labels=["a"]), "no meaning for a regression"),
    (dict(labels=["a", "a"]), "names a label twice"),
]


@pytest.mark.parametrize(("options", "problem"), CONFIGS)
def test_wrong_settings(make, options, problem):
    with pytest.raises(UserError, match=problem) as error:
        make(cfg(**options), ROWS)
    assert error.value.remedy


def test_one_label_alone_is_nothing_to_learn(make):
    with pytest.raises(UserError, match="1 label \\(no\\): there is nothing to tell apart"):
        make(cfg(), [ROWS[0], ROWS[2]])


def test_a_preview_that_a_person_can_check(make):
    made = make(cfg(max_length=5, class_weights=[1, 2, 1]), ROWS)
    assert preview(made.task, made.store, made.rows, made.task.tokenizer, 1) == (
        '-- row 0, example 0: 5 tokens, target "no", weight 2, 2 cut off\na b c d\n⟦<|endoftext|>⟧'
    )


def test_eos_and_pad_need_not_differ(make):
    """Pooling goes by position: an eos inside the text changes nothing, where Hugging Face's stops at it."""
    made = make(cfg(), [{"text": "Hi<|endoftext|>", "label": "no"}, {"text": "4", "label": "yes"}])
    assert made.batch()["ids"].tolist() == [17250, EOS, EOS, 19, EOS] and made.batch()[
        "pool"
    ].tolist() == [2, 4]
    ours, theirs = models("classify")
    theirs.config.pad_token_id = EOS
    batch = to_device(made.batch([0]), CPU)
    ours_logits = ours(
        input_ids=batch["ids"][None],
        position_ids=batch["positions"][None],
        cu_seqlens=batch["cu_seqlens"],
        positions=batch["pool"],
    )
    theirs_logits = theirs(input_ids=batch["ids"][None], use_cache=False).logits
    assert not torch.allclose(ours_logits, theirs_logits, atol=1e-3)
    theirs.config.pad_token_id = None
    torch.testing.assert_close(
        ours_logits, theirs(input_ids=batch["ids"][None], use_cache=False).logits
    )


def test_lists_of_labels_may_stand_in_strings_as_csv_files_have_them(make):
    made = make(
        cfg(problem="multi_label"),
        [
            {"text": "Hi", "label": '["x", "z"]'},
            {"text": "4", "label": "[]"},
            {"text": "4", "label": ' ["y"]'},
        ],
    )
    assert made.batch()["targets"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
