"""Text from models: batches and single prompts, sampling, stop strings, files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.cli.app import compose_config
from finetune.cli.generate import Asked, _prompt, _questions, _texts, run
from finetune.config import ClassifyConfig, InstructConfig, QaConfig
from finetune.data.qa_rows import Question
from finetune.errors import UserError
from finetune.inference.answer import answer_questions
from finetune.inference.sample import GumbelNoise, Sampling, Streamer, finished_text
from finetune.inference.speaker import Speaker, load_speaker
from tests.conftest import ROOT

PROMPTS = [
    "The",
    "The Senate of the United States met",
    "An economy",
    "In the year of our independence we have",
]


@pytest.fixture(scope="module")
def speaker():
    """The shipped tiny GPT-J in fp32."""
    return load_speaker("asset:gptj_tiny", compose_config(["dtype=fp32"], "generate").config.dtype)


def texts(speaker, prompts, how):
    ids = speaker.continue_ids([speaker.ids(p, False) for p in prompts], how)
    return [finished_text(speaker.tokenizer, row, how.stop) for row in ids]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(20, 0.0),
        Sampling(20, 1.0, seed=3),
        Sampling(20, 0.8, 0.9, 40, seed=4),
        Sampling(12, beams=3),
    ],
    ids=["greedy", "sampled", "top-p and top-k", "beams"],
)
def test_a_batch_gives_the_same_text_as_one_by_one(speaker, how):
    together = texts(speaker, PROMPTS, how)
    assert together == [texts(speaker, [p], how)[0] for p in PROMPTS]
    assert len(set(together)) == len(PROMPTS) and all(together)


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_text(speaker):
    """transformers compiles on a CPU too: one length of the cache for all of it."""
    compiled = replace(speaker, compiled=True)
    for how in (Sampling(20, 0.0), Sampling(20, 0.8, 0.9, 40, seed=4)):
        assert texts(compiled, PROMPTS, how) == texts(speaker, PROMPTS, how)


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beams_are_those_of_hugging_face(speaker, beams):
    from finetune.assets.paths import asset

    judge = AutoModelForCausalLM.from_pretrained(
        asset("gptj_tiny"), dtype=torch.float32, attn_implementation="eager"
    )
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([speaker.ids(prompt, False)])
        wanted = judge.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=15,
            do_sample=False,
            num_beams=beams,
            pad_token_id=50256,
        )
        found = speaker.continue_ids([ids[0].tolist()], Sampling(15, 0.0, beams=beams))[0]
        assert found == wanted[0, ids.shape[1] :].tolist()


def test_sampling_has_the_softmax_distribution():
    """Drawn tokens against the softmax by a chi-square test: 200 seeds of two prompts, 20 steps each."""
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    wanted, draws, counts = scores[0].softmax(-1), 8000, torch.zeros(2, 12)
    for seed in range(200):
        noise = GumbelNoise([[1, 2], [3]], seed)
        for _ in range(20):
            drawn = noise(torch.zeros(2, 1), scores).argmax(-1)
            counts[[0, 1], drawn] += 1
    statistic = float(((counts.sum(0) - draws * wanted) ** 2 / (draws * wanted)).sum())
    assert statistic < 31.3  # 0.999 quantile of chi-square with 11 degrees of freedom
    assert not torch.equal(counts[0], counts[1])


def test_stop_strings_end_the_text(speaker):
    whole = texts(speaker, PROMPTS[:1], Sampling(30, 0.0))[0]
    stop = whole[10:14]
    assert (
        texts(speaker, PROMPTS[:1], Sampling(30, 0.0, stop=[stop]))[0] == whole[: whole.index(stop)]
    )


def test_a_stop_string_that_begins_in_the_prompt_does_not_count(speaker):
    whole = texts(speaker, PROMPTS[:1], Sampling(20, 0.0))[0]
    across = PROMPTS[0][-1] + whole[:3]
    assert (
        across not in whole
        and texts(speaker, PROMPTS[:1], Sampling(20, 0.0, stop=[across]))[0] == whole
    )


@pytest.mark.parametrize("stop", ["", "zzz", "cde", "e f", "f"])
def test_a_stream_says_what_the_whole_text_says(stop):
    """Pieces of any size; nothing of a stop string gets out, also when it comes in two pieces."""
    text = "ab cde fgh"
    wanted = text[: text.index(stop)] if stop and stop in text else text
    for size in range(1, 6):
        said: list[str] = []
        streamer = Streamer(None, [stop], said.append)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        for piece in pieces:
            streamer.on_finalized_text(piece)
        streamer.on_finalized_text("", stream_end=True)
        assert "".join(said) == wanted


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_from_files_and_standard_input(tmp_path):
    """The command: a text file, jsonl, and a pipe, of which only the text reaches standard output."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8-sig")
    with (tmp_path / "p.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["prompt"], *([prompt] for prompt in PROMPTS)])
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    words = ["model=asset:gptj_tiny", "temperature=0", "max_new_tokens=8", "dtype=fp32"]
    for name in ("p.txt", "p.jsonl", "p.csv"):
        more = [f"prompts={tmp_path / name}", f"out={tmp_path / name}.out", "batch=3"]
        assert run(compose_config([*words, *more], "generate")) == 0
    found = lines(tmp_path / "p.txt.out")
    assert (
        found == lines(tmp_path / "p.jsonl.out") == lines(tmp_path / "p.csv.out")
        and [row["prompt"] for row in found] == PROMPTS
    )
    done = subprocess.run(
        [sys.executable, "launch/generate.py", *words],
        input=PROMPTS[1],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0 and done.stdout == found[1]["text"] + "\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "no template"),
        ('{"prompt": "a"', "JSON"),
        ('{"other": 1}', "no text field"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' + row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        run(
            compose_config(
                ["model=asset:gptj_tiny", f"prompts={file}", f"out={tmp_path / 'out'}"], "generate"
            )
        )
    assert f"{file}:2" in str(caught.value) and not (tmp_path / "out").exists()


def reader(cfg):
    """A speaker that can read rows: the task of an export without its model."""
    from finetune.data.tokenizer import load_tokenizer
    from finetune.tasks.build import build_task

    tokenizer = load_tokenizer(None)
    return SimpleNamespace(
        task=build_task(cfg, tokenizer, True),
        tokenizer=tokenizer,
        chats=isinstance(cfg, InstructConfig),
    )


TURN, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"q": {"text": "Hi"}, "prompt": "no"}, "Hi"),
        ({"prompt": "Hi"}, "Hi"),
        ({"q": {"text": "Hi"}, "a": "Hello"}, "Hi"),
        ({"messages": [TURN]}, "Hi"),
        ({"messages": json.dumps([TURN])}, "Hi"),
        ({"messages": [TURN, REPLY, TURN]}, [TURN, REPLY, TURN]),
        ({"messages": [TURN, REPLY | {"weight": 0}, TURN]}, [TURN, REPLY, TURN]),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "Hi"),
        (
            {"q": {"text": "Hi"}, "system": "Be nice."},
            [{"role": "system", "content": "Be nice."}, TURN],
        ),
        ({"instruction": "Hi", "input": "", "output": "x"}, "Hi"),
        (
            {"instruction": "Add.", "input": "2+2"},
            [{"role": "user", "content": "Add.\n\n2+2", "instruction": "Add.", "input": "2+2"}],
        ),
    ],
)
def test_an_instruction_is_read_as_in_training(row, asked):
    assert (
        _prompt(
            Asked("f:1", row), reader(InstructConfig(prompt_field="q.text", completion_field="a"))
        )
        == asked
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"content": "Hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [TURN, REPLY]},
        {"messages": [TURN, TURN]},
        {"prompt": None},
        {"prompt": " "},
        {"other": 1},
        {"messages": [TURN, REPLY, {"role": "user", "content": "a<|endoftext|>"}]},
        {"instruction": "Hi", "input": ["x"]},
    ],
)
def test_a_row_that_asks_nothing_is_refused_with_a_row_that_does(row):
    with pytest.raises(
        UserError, match=r"f:1: .*\n  Write rows as in training, without the answer: \{\"prompt\": "
    ):
        _prompt(Asked("f:1", row), reader(InstructConfig()))


PAIR = ClassifyConfig(text_field="doc.body", text_pair_field="doc.hyp")
TEXTS = [
    {"doc": {"body": "the cat", "hyp": "a dog"}},
    {"doc": {"body": "the cat"}},
    {"doc": {"body": "the cat", "hyp": None}},
    {"doc": {"body": "the cat", "hyp": " "}},
    {"doc": {"body": 3, "hyp": "a dog"}},
    {"prompt": "the cat"},
    {"doc": {"body": "the cat", "hyp": "a dog"}, "prompt": "other", "text": "other"},
]


@pytest.mark.parametrize("row", TEXTS)
@pytest.mark.parametrize(
    "cfg", [PAIR, ClassifyConfig(text_field="doc.body")], ids=["pair", "single"]
)
def test_a_classifier_reads_the_fields_that_it_was_trained_on(cfg, row):
    """What the training's encoder refuses is refused, what it takes is judged whole."""
    speaker = reader(cfg)
    (trained,) = speaker.task.encoder().encode([("f:1", row | {"label": "x"})])
    if "doc" not in row and cfg is not PAIR:
        assert _texts(Asked("f:1", row), speaker) == ["the cat"]  # a prompt alone is a text
    elif isinstance(trained, UserError):
        with pytest.raises(
            UserError,
            match=r"f:1: field 'doc\.[a-z]+' is .*\n  The model was trained on the fields? 'doc.body'",
        ):
            _texts(Asked("f:1", row), speaker)
    else:
        wanted = speaker.tokenizer("\n".join(_texts(Asked("f:1", row), speaker)))["input_ids"]
        assert list(trained[0]["ids"]) == [*wanted, speaker.tokenizer.eos_token_id]


ENTRY = {"id": "q1", "question": "Who?"}
ARTICLE = {
    "paragraphs": [
        {
            "context": "Ada met Bob.",
            "qas": [ENTRY, ENTRY | {"id": "q2", "answers": [{"text": "Zoe"}]}],
        }
    ]
}


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"question": "Who?", "context": "Ada met Bob."}, ["f:1"]),
        (ENTRY | {"context": "Ada met Bob.", "answers": None}, ["q1"]),
        (ARTICLE, ["q1", "q2"]),
    ],
)
def test_questions_are_read_as_in_training_with_or_without_answers(row, ids):
    found = _questions(Asked("f:1", row))
    assert [q.id for q in found] == ids and all(
        (q.question, q.context) == ("Who?", "Ada met Bob.") for q in found
    )


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who?"},
        {"question": None, "context": "Ada"},
        {"question": "Who?", "context": " "},
        {"text": "Ada"},
        {"paragraphs": [{"context": "Ada", "qas": [{"id": "q1"}]}]},
    ],
)
def test_a_question_without_its_context_is_refused(row):
    with pytest.raises(UserError, match=r"f:1.*: this export answers questions: "):
        _questions(Asked("f:1", row))


def test_questions_share_one_encoder():
    """Each is answered as it would be alone; a model that likes later tokens better picks them."""
    task = reader(QaConfig(max_answer_tokens=1)).task
    texts = ["Ada met Bob.", "Eve met Zoe in a garden.", "Nobody."]
    asked = [Question("f:1", str(i), text, "Who?", []) for i, text in enumerate(texts)]

    def model(input_ids):
        return torch.arange(input_ids.shape[1])[None, :, None].expand(1, -1, 2) * 0.5

    def answer(questions):
        return list(answer_questions(model, task, questions, torch.device("cpu")))

    alone = [answer([question])[0] for question in asked]
    built, build = [], task.encoder
    task.encoder = lambda: built.append(build()) or built[-1]
    assert answer(asked) == alone and len(built) == 1
    assert [found["best_span"] for found in alone] == [".", ".", "."]
    assert [found["start"] for found in alone] == [len(text) - 1 for text in texts]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens"),
        (["prompt=a", "top_p=0"], "top_p"),
        (["prompt=a", "engine=deepspeed"], "GPU"),
        (["prompt=a", "engine=fast"], "engine = fast"),
        (["prompt=a", "engine=compiled", "beams=2"], "beam search"),
        (["prompts=nowhere.txt"], "no such file"),
        (["prompt=a", "chat=true"], "no template"),
        (["prompt=a", "max_new_tokens=5000"], "leaves room"),
        (["question=Who"], "context"),
    ],
)
def test_wrong_use_is_explained(words, message):
    with pytest.raises(UserError, match=message):
        run(compose_config(["model=asset:gptj_tiny", *words], "generate"))


def test_virtual_tokens_take_their_positions():
    """A prompt or prefix adapter's stand before every text."""
    learned = SimpleNamespace(is_prompt_learning=True, num_virtual_tokens=20)
    for config, wanted in (
        (learned, 2028),
        (SimpleNamespace(is_prompt_learning=False), 2048),
        (None, 2048),
    ):
        module = SimpleNamespace(
            config=SimpleNamespace(n_positions=2048), active_peft_config=config
        )
        assert (
            Speaker(SimpleNamespace(module=module), None, None, torch.device("cpu")).positions
            == wanted
        )
