"""Instructions: exact ids and labels for every layout, truncation, packing, and the loss against Hugging Face's."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from task_setup import EOS, NEWLINE, assert_same_gradients, evaluate_on, models

from finetune.assets.paths import resolve
from finetune.config import InstructConfig
from finetune.data.cache import build_store
from finetune.data.encode_instruct import windows
from finetune.data.mixture import DataSource
from finetune.data.packing import efficiency
from finetune.errors import UserError
from finetune.tasks.build import build_task
from finetune.tasks.preview import preview

SUM = [17, 10, 17, 30]  # "2+2?"
FOUR = 19
USER, ASSISTANT = [12982, 25], [NEWLINE, NEWLINE, 48902, 25]  # "User:" and "\n\nAssistant:"
HI, HELLO, BYE, CIAO, NICE = [15902], [18435], [47843], [327, 13481], [3856, 3621, 13]

PROMPT = {"prompt": "2+2?", "completion": "4"}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
        {"role": "user", "content": "Still there?"},
    ]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
ALPACA = {"instruction": "Add.", "input": "2+2", "output": "4"}


def plain(**options) -> InstructConfig:
    return InstructConfig(template="plain", **options)


def chat(**options) -> InstructConfig:
    return InstructConfig(template="chat", **options)


def test_a_prompt_and_its_completion(make):
    made = make(plain(), [PROMPT])
    assert made.example(0) == {"ids": [*SUM, FOUR, EOS], "scored": [0, 0, 0, 0, 1, 1], "cut": 0}
    batch = made.batch()
    assert batch["labels"].tolist() == [
        -100,
        -100,
        -100,
        FOUR,
        EOS,
        -100,
    ]  # shifted: labels[t] follows token t
    assert made.task.count(batch) == 2 and batch["tokens"] == 6


def test_messages_score_every_turn_of_the_assistant_and_its_eos(make):
    made = make(chat(), [MESSAGES])
    first = [*NICE, NEWLINE, NEWLINE, *USER, *HI, *ASSISTANT]
    second = [NEWLINE, NEWLINE, *USER, *BYE, *ASSISTANT]
    assert made.example(0) == {
        "ids": [
            *first,
            *HELLO,
            EOS,
            *second,
            *CIAO,
            EOS,
        ],  # what stands behind the last answer is left out
        "scored": [0] * len(first) + [1, 1] + [0] * len(second) + [1, 1, 1],
        "cut": 0,
    }


def turns(kind: str, *said: tuple[str, object]) -> list[dict]:
    role, text = {"messages": ("role", "content"), "conversations": ("from", "value")}[kind]
    return [{role: who, text: words} for who, words in said]


ASKED, SAID = turns("messages", ("user", "Hi")), turns("messages", ("assistant", "Hello"))
VARIANTS = [  # as others write the same two rows: the second with a system message "Be nice."
    {"messages": turns("conversations", ("human", "Hi"), ("gpt", "Hello"))},
    {"conversations": ASKED + SAID},
    {"prompt": ASKED, "completion": SAID},
    {
        "messages": turns(
            "messages", ("user", [{"type": "text", "text": "Hi"}]), ("assistant", "Hello")
        )
    },
    {"messages": ASKED + SAID, "system": None},
    {"messages": ASKED + SAID, "system": "Be nice."},
    {
        "messages": turns(
            "messages", ("developer", "Be nice."), ("user", "Hi"), ("assistant", "Hello")
        )
    },
    {"prompt": ASKED, "completion": SAID, "system": "Be nice."},
    {"prompt": "Hi", "completion": "Hello", "system": "Be nice."},
    SHAREGPT | {"system": "Be nice."},
    {"instruction": "Hi", "output": "Hello", "system": "Be nice."},
]


def test_the_usual_variants_of_a_layout_are_read_too(make):
    made = make(chat(), VARIANTS)
    bare = [*USER, *HI, *ASSISTANT, *HELLO, EOS]
    for i in range(len(VARIANTS)):
        assert made.example(i)["ids"] == ([] if i < 5 else [*NICE, NEWLINE, NEWLINE]) + bare, (
            VARIANTS[i]
        )
        assert sum(made.example(i)["scored"]) == 2


def said(role: str, content: str, **marks) -> dict:
    return {"role": role, "content": content, **marks}


FIRST, SECOND = [*USER, *HI, *ASSISTANT], [NEWLINE, NEWLINE, *USER, *BYE, *ASSISTANT]


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"loss_mask": 0},
        {"masked": True},
        {"weight": "0"},
        {"train": False, "weight": 0},
    ],
)
def test_a_turn_that_is_marked_is_read_and_not_scored(make, mark):
    """Ids are those of the same conversation without marks."""
    rows = [
        {
            "messages": [
                said("user", "Hi"),
                said("assistant", "Hello", **mark),
                said("user", "Bye"),
                said("assistant", "Ciao", weight=1, train=None),
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Bye"},
                {"from": "gpt", "value": "Ciao", **mark},
            ]
        },
    ]
    made = make(chat(), rows)
    assert made.example(0) == {
        "ids": [*FIRST, *HELLO, EOS, *SECOND, *CIAO, EOS],
        "scored": [0] * (len(FIRST) + 2 + len(SECOND)) + [1, 1, 1],
        "cut": 0,
    }
    assert made.example(1) == {
        "ids": [*FIRST, *HELLO, EOS],
        "scored": [0] * len(FIRST) + [1, 1],
        "cut": 0,
    }


@pytest.mark.parametrize(
    ("parts", "scored"),
    [
        (
            [(0, 4, False), (5, 10, True)],
            [0, 0, 0, 1, 1, 1, 1],
        ),  # "a b c" is not scored, " d e f" is, and so is eos
        ([(0, 2, True)], [1, 1, 0, 0, 0, 0, 0]),
        ([(2, 8, True)], [0, 0, 1, 1, 1, 0, 0]),  # " b" is not wholly in it
        ([(0, 10, True)], [1] * 7),
        ([], [1] * 7),
    ],
)
def test_parts_of_a_turn_may_be_marked(make, parts, scored):
    detail = [{"begin_offset": a, "end_offset": b, "train": train} for a, b, train in parts]
    row = {"messages": [said("user", "Hi"), said("assistant", "a b c d e f", train_detail=detail)]}
    assert make(plain(), [row]).example(0) == {
        "ids": [17250, 64, 275, 269, 288, 304, 277, EOS],
        "scored": [0, *scored],
        "cut": 0,
    }
    made = make(chat(), [row])  # the template puts a space in front
    assert made.example(0)["scored"][-7:] == scored


def test_marked_turns_are_cut_like_prompts(make):
    """An answer that no row could hold is no fault where it is not scored."""
    row = {
        "messages": [
            said("user", "Hi"),
            said("assistant", "a b c d e f", weight=0),
            said("user", "Hi"),
            said("assistant", "4"),
        ]
    }
    made = make(plain(max_length=5), [row])
    assert made.example(0) == {
        "ids": [277, EOS, 17250, FOUR, EOS],
        "scored": [0, 0, 0, 1, 1],
        "cut": 6,
    }
    assert len(made.store) == 1


@pytest.mark.parametrize(
    ("marks", "problem"),
    [
        ({"weight": 0}, "no turn of the conversation is scored"),
        ({"weight": 0.5}, r"messages\[1\].weight is 0.5"),
        ({"loss_scale": 2}, r"messages\[1\] has 'loss_scale', which looks like a mark"),
        ({"mask": 1}, "'mask', which looks like a mark"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail has {'begin"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 5, "train": True}]},
            "characters 0 to 4",
        ),
        ({"weight": 1, "train": False}, "marked as scored and as not scored: weight, train"),
    ],
)
def test_marks_that_cannot_be_followed_are_bad_rows(tokenizer, marks, problem):
    row = {"messages": [said("user", "Hi"), said("assistant", "Hello", **marks)]}
    (fault,) = build_task(chat(), tokenizer, True).encoder().encode([("d:1", row)])
    with pytest.raises(UserError, match=problem):
        raise fault
    (fault,) = (
        build_task(chat(), tokenizer, True)
        .encoder()
        .encode([("d:1", {"messages": [said("user", "Hi", weight=1), said("assistant", "Hello")]})])
    )
    with pytest.raises(UserError, match=r"messages\[0\] is the user's and marked as scored"):
        raise fault


def test_conversations_may_be_text_in_a_cell(make):
    turns = [said("user", "Hi"), said("assistant", "Hello")]
    rows = [
        {"messages": json.dumps(turns)},
        {"messages": str(turns)},
        {"conversations": json.dumps(turns)},
        {"prompt": json.dumps(turns[:1]), "completion": json.dumps(turns[1:])},
    ]
    made = make(chat(), rows)
    assert [made.example(i)["ids"] for i in range(4)] == [[*FIRST, *HELLO, EOS]] * 4


@pytest.mark.parametrize("row", [PROMPT, MESSAGES, SHAREGPT, ALPACA])
def test_a_row_may_be_left_out_by_its_own_mark(make, row):
    marks = [
        {"weight": 0},
        {"weight": "0.0"},
        {"train": False},
        {"loss": False},
        {"weight": 1},
        {"weight": None},
        {"loss": 0.3},
    ]
    made = make(chat(), [row | mark for mark in marks])
    assert len(made.store) == 3 and made.store.stats["left_out"] == 4


def test_predictions_are_each_examples_loss(make):
    """As Hugging Face's model gives it, row by row; on three ranks as on one, packed or not."""
    rows = [
        PROMPT,
        SHAREGPT,
        {"prompt": "Hi", "completion": "a b c"},
        {"prompt": "4", "completion": " Hi"},
    ]
    ours, theirs = models("lm")
    made = make(plain(max_length=12), rows)
    (alone,), predictions = evaluate_on(1, ours, made)
    several, again = evaluate_on(3, ours, make(plain(max_length=12), rows, packing=False), batch=1)
    assert [p["where"].rpartition(":")[2] for p in predictions] == ["1", "2", "3", "4"]
    for i, found in enumerate(predictions):
        example = made.example(i)
        ids, scored = (
            torch.tensor(example["ids"]),
            torch.tensor(example["scored"], dtype=torch.bool),
        )
        logits = theirs(input_ids=ids[None], use_cache=False).logits[0]
        wanted = F.cross_entropy(logits[:-1][scored[1:]], ids[1:][scored[1:]])
        assert found["tokens"] == int(scored.sum()) and abs(
            found["loss"] - float(wanted)
        ) < 1e-5 * float(wanted)
        assert abs(again[i]["loss"] - found["loss"]) < 1e-5 * found["loss"]
    mean = sum(p["loss"] * p["tokens"] for p in predictions) / alone["tokens"]
    assert abs(mean - alone["loss"]) < 1e-6 and abs(several[0]["loss"] - alone["loss"]) < 1e-5


def test_sharegpt_and_alpaca_rows_are_the_same_conversation(make):
    made = make(chat(), [SHAREGPT, ALPACA])
    assert made.example(0)["ids"] == [*USER, *HI, *ASSISTANT, *HELLO, EOS]
    assert made.example(1)["ids"] == [
        12982,
        25,
        3060,
        13,
        NEWLINE,
        NEWLINE,
        17,
        10,
        17,
        *ASSISTANT,
        604,
        EOS,
    ]
    assert made.example(1)["scored"] == [0] * 13 + [1, 1]


def test_layouts_are_recognised_row_by_row_or_named(make):
    mixed = make(plain(), [PROMPT, MESSAGES, SHAREGPT, ALPACA])
    for i, (name, row) in enumerate(
        [("prompt", PROMPT), ("messages", MESSAGES), ("sharegpt", SHAREGPT), ("alpaca", ALPACA)]
    ):
        assert make(plain(format=name), [row]).example(0) == mixed.example(i)
    renamed = make(
        plain(prompt_field="q.text", completion_field="a"), [{"q": {"text": "2+2?"}, "a": "4"}]
    )
    assert renamed.example(0) == mixed.example(0)


def test_the_default_is_alpaca(make):
    made = make(InstructConfig(), [PROMPT])
    ids = made.example(0)["ids"]
    assert made.task.tokenizer.decode(ids).endswith(
        "\n\n### Instruction:\n2+2?\n\n### Response:\n4<|endoftext|>"
    )
    assert ids[-3:] == [NEWLINE, FOUR, EOS]
    assert made.example(0)["scored"] == [0] * (len(ids) - 2) + [1, 1]


def test_a_too_long_prompt_loses_tokens_from_its_left_and_is_counted(make):
    made = make(plain(max_length=8), [{"prompt": "a b c d e f", "completion": "2+2?"}, PROMPT])
    assert made.example(0) == {
        "ids": [288, 304, 277, *SUM, EOS],
        "scored": [0, 0, 0, 1, 1, 1, 1, 1],
        "cut": 3,
    }
    assert made.task.notes(made.store) == [
        "1 of 2 prompts lost tokens from their left: 3 in all (task.max_length = 8)"
    ]
    barely = make(plain(max_length=6), [{"prompt": "a b c d e f", "completion": "2+2?"}])
    assert barely.example(0) == {"ids": [277, *SUM, EOS], "scored": [0, 1, 1, 1, 1, 1], "cut": 5}


def test_a_too_long_conversation_scores_every_completion_once(make):
    turns = [("a b", "c"), ("d", "e f"), ("2+2?", "4")]
    row = {
        "conversations": [
            {"from": who, "value": text}
            for pair in turns
            for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
    }
    whole = make(plain(), [row])
    assert whole.example(0)["ids"] == [64, 275, 66, EOS, 67, 68, 277, EOS, *SUM, FOUR, EOS]
    made = make(plain(max_length=8), [row])
    assert [made.example(i) for i in range(len(made.store))] == [
        {"ids": [64, 275, 66, EOS, 67, 68, 277, EOS], "scored": [0, 0, 1, 1, 0, 1, 1, 1], "cut": 0},
        # Filled up with what was said before, which is not scored again.
        {"ids": [277, EOS, *SUM, FOUR, EOS], "scored": [0, 0, 0, 0, 0, 0, 1, 1], "cut": 0},
    ]


def test_windows_cover_every_turn_once():
    assert windows([4, 8, 12], 12) == [(0, 0, 12)]
    assert windows([4, 8, 12], 11) == [(0, 0, 8), (1, 8, 12)]
    assert windows([20, 24], 8) == [(12, 0, 20), (16, 20, 24)]


def test_a_file_with_a_chat_template(make, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    made = make(InstructConfig(template=str(path)), [PROMPT])
    assert made.example(0)["ids"] == [84, 25, *SUM, EOS, 64, 25, FOUR, EOS]
    assert made.example(0)["scored"] == [0] * 9 + [1, 1]


def test_the_template_travels_with_the_description(make, tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    described = make(InstructConfig(template=str(path)), [PROMPT]).task.describe()
    path.unlink()
    again = build_task(InstructConfig(template=str(path)), tokenizer, True)
    again.prepare(None, described)
    assert again.template.text == "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert tokenizer.decode(again.prompt_ids("2+2?")) == "<2+2?>"
    assert again.describe() == described


def test_real_rows_fill_97_percent_of_the_positions(tokenizer, tmp_path):
    for max_length in (512, 1024):
        task = build_task(InstructConfig(max_length=max_length), tokenizer, True)
        store = build_store(
            [DataSource(resolve("asset:data/instruct/train.jsonl"))], task.encoder()
        )
        rows = task.rows(store)
        assert efficiency(rows, max_length) >= 0.97
        assert sorted(rows.examples.tolist()) == list(range(len(store)))


ROWS = [PROMPT, MESSAGES, SHAREGPT, ALPACA, {"prompt": "a b c d e f", "completion": "Ciao"}]


def _reference(theirs, made) -> tuple[torch.Tensor, int]:
    """Sum and count over conversations, one at a time, from Hugging Face's logits."""
    total, count = torch.zeros(()), 0
    for i in range(len(made.store)):
        example = made.example(i)
        ids, scored = torch.tensor([example["ids"]]), torch.tensor(example["scored"])
        logits = theirs(input_ids=ids, use_cache=False).logits[0]
        targets = torch.where(scored[1:] == 1, ids[0, 1:], -100)
        total = total + F.cross_entropy(logits[:-1], targets, reduction="sum")
        count += int(scored.sum())
    return total, count


def test_packed_and_unpacked_equal_hugging_face_one_conversation_at_a_time(make):
    ours, theirs = models("lm")
    for packing, max_length in ((True, 64), (False, 64), (True, 32)):
        made = make(chat(max_length=max_length), ROWS, packing=packing)
        if packing:
            assert len(made.rows) < len(ROWS)
        expected, count = _reference(theirs, made)
        loss = made.loss(ours)
        assert made.task.count(made.batch()) == count
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for model in (ours, theirs):
            model.zero_grad()
        loss.backward()
        expected.backward()
        assert_same_gradients(ours, theirs)


def test_a_rank_without_rows_takes_part_with_loss_zero(make):
    ours, _ = models("lm")
    made = make(plain(), [PROMPT])
    loss = made.loss(ours, [])
    loss.backward()
    assert (
        float(loss.detach()) == 0
        and made.task.count(made.batch([])) == 0
        and made.batch([])["tokens"] == 0
    )
    assert all(not p.grad.any() for p in ours.parameters() if p.grad is not None)


def test_one_rank_and_three_report_the_same(make):
    ours, _ = models("lm")
    made = make(chat(), ROWS, packing=False)
    (alone,), _ = evaluate_on(1, ours, made)
    several, _ = evaluate_on(3, ours, made, batch=1)
    assert several[0] == several[1] == several[2]
    assert (
        several[0]["tokens"]
        == alone["tokens"]
        == sum(sum(made.example(i)["scored"]) for i in range(5))
    )
    assert abs(several[0]["loss"] - alone["loss"]) < 1e-6 * alone["loss"]


def test_a_preview_that_a_person_can_check(make):
    made = make(chat(max_length=24), [SHAREGPT, PROMPT])
    assert preview(made.task, made.store, made.rows, made.task.tokenizer, 2) == (
        "-- row 0, example 0: 9 tokens, 2 scored\n"
        "User: Hi\\n\n\\n\nAssistant:\n"
        "⟦ Hello<|endoftext|>⟧\n\n"
        "-- row 0, example 1: 12 tokens, 2 scored\n"
        "User: 2+2?\\n\n\\n\nAssistant:\n"
        "⟦ 4<|endoftext|>⟧"
    )


def test_columns_that_a_row_has_only_as_null_do_not_decide_its_layout(make):
    """As tables of mixed rows are read: every row has every column."""
    said = [
        {"role": "user", "content": "2+2?", "from": None, "value": None},
        {"role": "assistant", "content": "4", "from": None, "value": None},
    ]
    mixed = {
        "prompt": None,
        "completion": None,
        "instruction": None,
        "output": None,
        "messages": said,
    }
    alone = {"messages": [{"role": m["role"], "content": m["content"]} for m in said]}
    assert make(plain(), [mixed]).example(0) == make(plain(), [alone]).example(0)
    theirs = [
        {"from": "human", "value": "2+2?", "role": None, "content": None},
        {"from": "gpt", "value": "4", "role": None, "content": None},
    ]
    assert make(plain(), [{"messages": None, "conversations": theirs}]).example(0) == make(
        plain(), [alone]
    ).example(0)
