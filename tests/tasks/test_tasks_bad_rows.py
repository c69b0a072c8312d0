"""Bad rows of every format: what is wrong, file:line or id, and a remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune.config import ClassifyConfig, ClmConfig, InstructConfig, QaConfig
from finetune.data.cache import build_store
from finetune.data.mixture import DataSource
from finetune.errors import UserError
from finetune.tasks.build import build_task

MESSAGE, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def said(*turns):
    return {"messages": list(turns)}


def human(role, value):
    return {"conversations": [{"from": role, "value": value}, {"from": "gpt", "value": "Hello"}]}


INSTRUCT = [
    (
        {"text": "Hi"},
        "none of prompt, messages, alpaca and sharegpt; it has 'text'",
        "task.prompt_field=",
    ),
    (
        {"question": "Hi", "response": "x"},
        "none of",
        "task.prompt_field=question task.completion_field=response",
    ),
    ({"prompt": 3, "completion": "x"}, "field 'prompt' is a number, not a string", "Fix"),
    ({"prompt": " ", "completion": "x"}, "field 'prompt' is empty", "Fix"),
    ({"prompt": "Hi", "completion": ["x"]}, "field 'completion' is an array", "Fix"),
    ({"prompt": "Hi", "completion": ""}, "field 'completion' is empty", "Fix"),
    (
        {"prompt": "Hi", "completion": "a b c d e f g h i j k"},
        "a completion has 12 tokens with its eos; task.max_length = 12 leaves 11",
        "raise task.max_length to 13",
    ),
    ({"prompt": "Hi", "completion": "x<|endoftext|>"}, "holds '<|endoftext|>'", "Remove it"),
    ({"messages": "Hi"}, "field 'messages' is a string, not an array", "Fix"),
    (said(), "field 'messages' is an empty array", "Fix"),
    (said("Hi", REPLY), r"messages\[0\] is a string, not an object", "Fix"),
    (said({"content": "Hi"}, REPLY), r"messages\[0\] has no 'role'; it has 'content'", "Fix"),
    (said(MESSAGE, {"role": "assistant"}), r"messages\[1\] has no 'content'", "Fix"),
    (
        said({"role": "User", "content": "Hi"}, REPLY),
        r"messages\[0\] has the unknown role 'User'",
        "Try 'user'",
    ),
    (said({"role": "tool", "content": "Hi"}, REPLY), "unknown role 'tool'", "put what tools say"),
    (
        said({"role": "narrator", "content": "Hi"}, REPLY),
        "unknown role 'narrator'",
        "Write one of system, developer",
    ),
    (
        {"conversations": [{"from": "observation", "value": "x"}]},
        "unknown from 'observation'",
        "put what tools say",
    ),
    (said(MESSAGE, REPLY) | {"system": ["x"]}, "field 'system' is an array", "Fix"),
    ({"prompt": [MESSAGE], "completion": "Hello"}, "field 'prompt' is an array", "Fix"),
    ({"prompt": [MESSAGE], "completion": [MESSAGE]}, "no turn of the assistant", "Fix"),
    (
        {"instruction": "Hi", "output": "x", "history": [["a", "b"]]},
        "field 'history' holds earlier",
        "as messages",
    ),
    (said({"role": None, "content": "Hi"}, REPLY), "unknown role None", "Write one of"),
    (
        said(MESSAGE, {"role": "assistant", "content": None}),
        r"messages\[1\].content is null",
        "Fix",
    ),
    (
        said(MESSAGE, {"role": "assistant", "content": [{"type": "text"}]}),
        r"messages\[1\].content is an array",
        "Fix",
    ),
    (
        said(MESSAGE, {"role": "assistant", "content": "\n"}),
        r"messages\[1\].content is empty",
        "Fix",
    ),
    (said(MESSAGE), "no turn of the assistant", "Fix"),
    (said(REPLY, MESSAGE), "starts with the assistant", "Fix"),
    (said(MESSAGE, MESSAGE, REPLY), "turns 1 and 2 are both of the user", "Join them"),
    (
        said(MESSAGE, REPLY, {"role": "system", "content": "x"}),
        "turn 3 is a system message",
        "Fix",
    ),
    (human("humn", "Hi"), r"conversations\[0\] has the unknown from 'humn'", "Try 'human'"),
    (human("human", ""), r"conversations\[0\].value is empty", "Fix"),
    (
        {"conversations": [{"from": "human", "content": "Hi"}]},
        r"conversations\[0\] has no 'value'",
        "Fix",
    ),
    ({"instruction": "", "output": "x"}, "field 'instruction' is empty", "Fix"),
    ({"instruction": "Hi", "output": None}, "field 'output' is null", "Fix"),
    ({"instruction": "Hi", "input": ["x"], "output": "x"}, "field 'input' is an array", "Fix"),
]

CLASSIFY = [
    ({}, {"label": 1}, "field 'text' is missing", "task.text_field="),
    (
        {},
        {"headline": "Hi", "label": 1},
        "field 'text' is missing",
        "Try task.text_field=headline.",
    ),
    ({}, {"text": None, "label": 1}, "field 'text' is null", "Fix"),
    ({}, {"text": "  ", "label": 1}, "field 'text' is empty", "Fix"),
    (
        {"text_pair_field": "b"},
        {"text": "Hi", "label": 1},
        "field 'b' is missing",
        "task.text_pair_field=",
    ),
    (
        {},
        {"text": "Hi", "sentiment": 1},
        "field 'label' is missing",
        "Try task.label_field=sentiment.",
    ),
    ({}, {"text": "Hi", "label": None}, "field 'label' is null, not a name", "Fix"),
    ({}, {"text": "Hi", "label": ""}, "empty label", "Fix"),
    ({}, {"text": "Hi", "label": 0.5}, "a number '0.5', not a name", "task.problem=regression"),
    ({}, {"text": "Hi", "label": ["a"]}, "an array, not a name", "task.problem=multi_label"),
    (
        {"labels": ["a", "b"]},
        {"text": "Hi", "label": "c"},
        "'c' is unknown: task.labels has 'a', 'b'",
        "task.labels=",
    ),
    ({"labels": ["a", "b"]}, {"text": "Hi", "label": 2}, "label '2' is unknown", "task.labels="),
    (
        {"problem": "multi_label"},
        {"text": "Hi", "label": "a"},
        "a string 'a', not an array",
        "single_label",
    ),
    (
        {"problem": "multi_label"},
        {"text": "Hi", "label": [0, 1, 1]},
        "names label '1' twice",
        "not zeros and ones",
    ),
    ({"problem": "multi_label"}, {"text": "Hi", "label": [{}]}, "an object, not a name", "Fix"),
    (
        {"problem": "regression"},
        {"text": "Hi", "label": "high"},
        "a string 'high', not a number",
        "single_label",
    ),
    (
        {"problem": "regression"},
        {"text": "Hi", "label": True},
        "a boolean 'True', not a finite number",
        "Fix",
    ),
    ({"problem": "regression"}, {"text": "Hi", "label": "nan"}, "not a finite number", "Fix"),
    (
        {"problem": "regression"},
        {"text": "Hi", "label": [1]},
        "an array, not a number",
        "single_label",
    ),
]


def asked(**changes):
    entry = {
        "id": "q7",
        "question": "Who?",
        "answers": [{"text": "Bob", "answer_start": 8}],
    } | changes
    return {"paragraphs": [{"context": "Ada met Bob.", "qas": [entry]}]}


def answered(text, start, context="Ada met Bob."):
    return {
        "id": "q7",
        "context": context,
        "question": "Who?",
        "answers": {"text": [text], "answer_start": [start]},
    }


EMPTY = {"text": [], "answer_start": []}
QA = [
    (
        answered("Bob", 7),
        "id q7: answer 'Bob' does not stand at answer_start = 7; the context has ' Bo' there",
        "It stands at 8, 1 off: try answer_start=8",
    ),
    (answered("Bob", 99), "the context has 12 characters", "It stands at 8"),
    (answered("Bob", -1), "answer_start = -1", "It stands at 8"),
    (answered("Zoe", 8), "the context has 'Bob' there", "nowhere in the context"),
    (answered("bob", 8), "answer 'bob' does not stand", "another case"),
    (
        answered("Bob", 9, "Zoë met Bob."),
        "the context has 'ob.' there",
        "not bytes: it stands at 8",
    ),
    (answered("Bob", "8"), "'answer_start' is a string", "Fix"),
    (answered("Bob", 8.5), "'answer_start' is a number, not a whole number", "Fix"),
    (answered(" ", 3), "an answer's 'text' is empty", "Fix"),
    (answered(None, 3), "an answer's 'text' is null", "Fix"),
    (
        {"title": "T"},
        "neither an article nor a question; it has 'title'",
        "Write each row as a SQuAD article",
    ),
    ({"id": "q7", "question": "Who?", "answers": {}}, "id q7: 'context' is missing", "Fix"),
    ({"id": "q7", "context": "Ada", "answers": EMPTY}, "id q7: 'question' is missing", "Fix"),
    ({"id": "q7", "context": "Ada", "question": "Who?"}, "id q7: 'answers' is missing", "Fix"),
    (
        {"id": "q7", "context": "Ada", "question": "Who?", "answers": "Ada"},
        "'answers' is a string",
        "empty lists for no answer",
    ),
    (
        {
            "id": "q7",
            "context": "Ada",
            "question": "Who?",
            "answers": {"text": ["Ada"], "answer_start": []},
        },
        "1 texts and 0 starts",
        "Fix",
    ),
    (
        {"id": "q7", "context": " ", "question": "Who?", "answers": EMPTY},
        "'context' is empty",
        "Fix",
    ),
    ({"paragraphs": {}}, "'paragraphs' is an object, not an array", "Fix"),
    (
        {"paragraphs": [{"context": "Ada"}]},
        "paragraph 0: 'qas' is missing; there is 'context'",
        "Fix",
    ),
    ({"paragraphs": ["Ada"]}, "should be is a string", "Fix"),
    (asked(answers=[{"text": "Bob"}]), "paragraph 0 id q7: 'answer_start' is missing", "Fix"),
    (
        asked(is_impossible=True),
        "is_impossible is true, yet there is the answer 'Bob'",
        "Empty 'answers'",
    ),
    (
        asked(is_impossible=False, answers=[]),
        "is_impossible is false, yet 'answers' is empty",
        "Add the answer",
    ),
    (asked(question=5), "'question' is a number", "Fix"),
    (
        asked(question="a b c d e f g h i j k"),
        "question has 11 tokens: task.max_length = 12 leaves 0",
        "Shorten it",
    ),
    (
        asked(question="a b c d e f"),
        "leaves 4 for the context, of which windows share task.stride = 4",
        "task.stride",
    ),
]
TABLE = [
    *((InstructConfig(max_length=12, template="plain"), *case) for case in INSTRUCT),
    *((ClassifyConfig(**case[0]), *case[1:]) for case in CLASSIFY),
    *((QaConfig(max_length=12, stride=4), *case) for case in QA),
]


@pytest.fixture(scope="module")
def tasks(tokenizer):
    return {repr(cfg): build_task(cfg, tokenizer, True) for cfg, *_ in TABLE}


@pytest.mark.parametrize(("cfg", "row", "problem", "remedy"), TABLE)
def test_the_message_says_what_where_and_what_to_do(tasks, cfg, row, problem, remedy):
    (fault,) = tasks[repr(cfg)].encoder().encode([("data.jsonl:7", row)])
    assert isinstance(fault, UserError)
    with pytest.raises(UserError, match=problem):
        raise fault
    assert fault.where.startswith("data.jsonl:7")
    assert remedy in fault.remedy, fault.remedy


def test_there_are_many_kinds():
    assert len(TABLE) > 60


@pytest.mark.parametrize(
    "cfg",
    [
        InstructConfig(template="plain"),
        InstructConfig(template="plain", format="alpaca"),
        InstructConfig(template="plain", format="messages"),
        InstructConfig(template="plain", format="prompt"),
    ],
)
def test_a_named_format_is_the_only_one(tokenizer, cfg):
    rows = [
        {"prompt": "Hi", "completion": "x"},
        said(MESSAGE, REPLY),
        {"instruction": "Hi", "output": "x"},
    ]
    results = (
        build_task(cfg, tokenizer, True)
        .encoder()
        .encode([(f"d:{i}", r) for i, r in enumerate(rows)])
    )
    good = {"auto": [0, 1, 2], "prompt": [0], "messages": [1], "alpaca": [2]}[cfg.format]
    assert [i for i, result in enumerate(results) if not isinstance(result, UserError)] == good


def test_an_unknown_format_is_refused_at_once(tokenizer):
    with pytest.raises(UserError, match=r"task.format = xml is unknown"):
        build_task(InstructConfig(format="xml"), tokenizer, True)


def test_bad_rows_stop_the_build_or_are_counted(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Hi", "completion": "x"}\n{"prompt": "Hi", "completion": ""}\n')
    encoder = build_task(InstructConfig(), tokenizer, True).encoder()
    with pytest.raises(UserError, match=r"data.jsonl:2: field 'completion' is empty"):
        build_store([DataSource(str(path))], encoder)
    store = build_store([DataSource(str(path))], encoder, on_bad_row="skip")
    assert len(store) == 1 and store.stats["bad_rows"] == 1


ROWS = [
    (ClmConfig(), {"text": "Hi"}),
    (ClassifyConfig(labels=["a", "b"]), {"text": "Hi", "label": "a"}),
    (QaConfig(), answered("Bob", 8)),
    (InstructConfig(), {"prompt": "Hi", "completion": "x"}),
]


@pytest.mark.parametrize(("cfg", "row"), ROWS)
def test_a_row_weight_is_zero_or_one_in_every_task(tokenizer, cfg, row):
    """A fraction, or a weight in kilograms, is told; texts are no weights, and a field that is named is what it is."""
    values = [0, "0", False, 1, 1.0, "1", None, "", "heavy", 0.5, "72.5"]
    encode = build_task(cfg, tokenizer, True).encoder().encode
    found = encode([(f"d:{i}", row | {"weight": value}) for i, value in enumerate(values)])
    assert [len(examples) for examples in found[:9]] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert all(
        isinstance(fault, UserError) and "task.weight_field=null" in fault.remedy
        for fault in found[9:]
    )
    encode = build_task(replace(cfg, weight_field=None), tokenizer, True).encoder().encode
    assert all(
        len(examples) == 1
        for examples in encode([("d:1", row | {"weight": value}) for value in values])
    )


def test_a_target_called_weight_is_no_row_weight(tokenizer):
    task = build_task(ClassifyConfig(problem="regression", label_field="weight"), tokenizer, True)
    (examples,) = task.encoder().encode([("d:1", {"text": "Hi", "weight": 0.5})])
    assert examples[0]["label"] == 0.5
