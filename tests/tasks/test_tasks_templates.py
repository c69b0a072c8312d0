"""Templates: exact texts, what is scored, and what a foreign template may and may not do."""

from __future__ import annotations

import pytest

from finetune.config import InstructConfig
from finetune.data.encode_instruct import chat_template_differs, prompt_ids
from finetune.data.instruct_template import FOLDER, Template, load_template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import UserError
from finetune.export.hf_files import tokenizer_for
from finetune.tasks.build import build_task

EOS = "<|endoftext|>"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def turn(role, content):
    return {"role": role, "content": content}


ONE = [turn("user", "2+2?"), turn("assistant", "4")]
TWO = [
    turn("system", "Be nice."),
    turn("user", "Hi"),
    turn("assistant", "Hello"),
    turn("user", "Bye"),
    turn("assistant", "Ciao"),
]
WITH_INPUT = [
    {"role": "user", "content": "Add.\n\n2+2", "instruction": "Add.", "input": "2+2"},
    turn("assistant", "4"),
]

EXPECTED = {
    ("alpaca", "ONE"): [f"{ALPACA}\n\n### Instruction:\n2+2?\n\n### Response:\n", "4"],
    ("alpaca", "WITH_INPUT"): [
        f"{ALPACA_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n",
        "4",
    ],
    ("alpaca", "TWO"): [
        "Be nice.\n\n### Instruction:\nHi\n\n### Response:\n",
        "Hello",
        "\n\n### Instruction:\nBye\n\n### Response:\n",
        "Ciao",
    ],
    ("chat", "ONE"): ["User: 2+2?\n\nAssistant:", " 4"],
    ("chat", "WITH_INPUT"): ["User: Add.\n\n2+2\n\nAssistant:", " 4"],
    ("chat", "TWO"): [
        "Be nice.\n\nUser: Hi\n\nAssistant:",
        " Hello",
        "\n\nUser: Bye\n\nAssistant:",
        " Ciao",
    ],
    ("chatml", "ONE"): ["<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "4"],
    ("chatml", "TWO"): [
        "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello",
        "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "Ciao",
    ],
    ("plain", "ONE"): ["2+2?", "4"],
    ("plain", "WITH_INPUT"): ["Add.\n\n2+2", "4"],
    ("plain", "TWO"): ["Be nice.Hi", "Hello", "Bye", "Ciao"],
}


@pytest.mark.parametrize(("name", "messages"), EXPECTED)
def test_shipped_templates_write_exactly_this(name, messages):
    eos = "<|im_end|>" if name == "chatml" else EOS
    pieces = load_template(name, eos).pieces(globals()[messages], "here")
    assert pieces == EXPECTED[name, messages]


@pytest.mark.parametrize("name", ["alpaca", "chat", "chatml", "plain"])
def test_transformers_makes_the_same_ids_of_a_shipped_template(name):
    """An export's tokenizer with this chat template needs nothing of ours, also in a second turn."""
    tokenizer = load_tokenizer(None, InstructConfig(template=name))
    template = load_template(name, tokenizer.eos_token)
    for messages in (ONE[:1], WITH_INPUT[:1], TWO[:4]):
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=template.text, add_generation_prompt=True, return_dict=False
        )
        assert theirs == prompt_ids(template, tokenizer, messages)


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>"])
def test_chatml_refuses_its_marks_inside_a_text(mark):
    cfg = InstructConfig(template="chatml", tokens=["<think>"])
    encoder = build_task(cfg, load_tokenizer(None, cfg), True).encoder()
    rows = [
        {"prompt": f"a{mark}b", "completion": "c"},
        {"prompt": "a", "completion": "<think>b"},
    ]
    fault, (example,) = encoder.encode([(f"d:{i}", row) for i, row in enumerate(rows)])
    assert isinstance(fault, UserError) and f"holds '{mark}'" in fault.problem
    start, end, think = 50257, 50258, 50259
    assert example["ids"].tolist() == [
        start, 7220, 198, 64, end, 198, start, 562, 10167, 198, think, 65, end
    ]  # fmt: skip
    assert example["scored"].tolist() == [0] * 10 + [1] * 3


def test_every_shipped_template_is_tested():
    assert {path.stem for path in FOLDER.glob("*.jinja")} == {name for name, _ in EXPECTED}


@pytest.mark.parametrize("name", ["alpaca", "chat", "plain"])
def test_generation_reads_what_training_put_before_the_completion(name, tokenizer):
    template = load_template(name, EOS)
    asked = prompt_ids(template, tokenizer, TWO[:4])
    first, answer, second, _ = (
        tokenizer(text)["input_ids"] for text in template.pieces(TWO, "here")
    )
    assert asked == [*first, *answer, tokenizer.eos_token_id, *second]
    assert (
        prompt_ids(template, tokenizer, "2+2?") == tokenizer(EXPECTED[name, "ONE"][0])["input_ids"]
    )


CHATML = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
<|im_end|>{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_foreign_chat_template_from_a_file(tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    template = load_template(str(path), EOS, "<s>")
    # Its own eos ends the completion; what it writes behind belongs to the next prompt.
    assert template.pieces(TWO[1:], "here") == [
        "<s><|im_start|>user\nHi<|im_end|><|endoftext|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>",
        "\n<|im_start|>user\nBye<|im_end|><|endoftext|>\n<|im_start|>assistant\n",
        "Ciao<|im_end|>",
    ]


def test_it_reads_as_transformers_reads_it(tokenizer):
    ours = Template("chatml", CHATML, EOS, tokenizer.bos_token)
    theirs = tokenizer.apply_chat_template(TWO[1:], chat_template=CHATML, tokenize=False)
    first, answer, second, last = ours.pieces(TWO[1:], "here")
    assert theirs == first + answer + EOS + second + last + EOS + "\n"
    asked = tokenizer.apply_chat_template(
        TWO[1:4], chat_template=CHATML, tokenize=False, add_generation_prompt=True
    )
    assert asked == first + answer + EOS + second


THEIRS = {  # as users bring them: without eos, with one and a newline behind it, without system messages, with marks and macros
    "chatml without eos": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "a newline behind eos": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}\n",
    "no system messages": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{% endif %}{% endfor %}",
    "one turn": "{{ raise_exception('one') if messages | length > 2 else '' }}Q: {{ messages[0].content }}\nA:"
    "{{ ' ' + messages[1].content if messages | length > 1 else '' }}",
    "generation marks": CHATML,
    "generation marks without eos": CHATML.replace("{{ eos_token }}", ""),
    "macros and spaces": "\n  {% macro say(m) %}{{ m.content | trim }}{% endmacro %}\n{% set ns = namespace(n=0) %}\n"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}\n  {{ m.role }}: {{ say(m) }}\n{% endfor %}  "
    "{% if add_generation_prompt %}assistant:{% endif %}",
}


@pytest.mark.parametrize("system", [[], TWO[:1]])
@pytest.mark.parametrize("name", ["alpaca", "chat", "plain", *THEIRS])
def test_an_exports_chat_template_gives_trainings_ids(tmp_path, tokenizer, name, system):
    """The tokenizer as saved and reopened by transformers, against the encoder's ids, before every answer and in all."""
    spec = name
    if name in THEIRS:
        spec = str(tmp_path / "mine.jinja")
        (tmp_path / "mine.jinja").write_text(THEIRS[name])
    task = build_task(InstructConfig(template=spec, max_length=256), tokenizer, True)
    tokenizer_for(tokenizer, "lm", task.describe(), 50400).save_pretrained(tmp_path / "export")
    there = load_tokenizer(str(tmp_path / "export"))
    messages = [*system, *(TWO[1:] if name != "one turn" else TWO[1:3])]
    (examples,) = task.encoder().encode([("d:1", {"messages": messages})])
    if system and name in ("no system messages", "one turn"):
        assert isinstance(examples, UserError)
        return
    ids, scored = (list(map(int, examples[0][key])) for key in ("ids", "scored"))
    assert there.apply_chat_template(messages, return_dict=False) == ids
    starts = [at for at in range(1, len(ids)) if scored[at] and not scored[at - 1]]
    asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(asked) > 0
    for at, i in zip(starts, asked, strict=True):
        assert (
            there.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
            == ids[:at]
        )
    assert chat_template_differs(there, task.template, messages) is None


def test_a_token_across_the_beginning_of_an_answer_is_told(tokenizer):
    template = load_template("plain", EOS)
    there = tokenizer_for(
        tokenizer, "lm", {"template": "plain", "template_text": template.text}, 50400
    )
    told = chat_template_differs(there, template, [turn("user", "th"), turn("assistant", "e")])
    assert told == "['the', '<|endoftext|>'] where training read ['th', 'e', '<|endoftext|>']"


def test_tojson_is_transformers_own(tokenizer):
    text = "{% for m in messages %}{{ m.content | tojson }}{{ m | tojson(ensure_ascii=True) }}\n{% endfor %}"
    messages = [turn("user", 'it\'s <é> "&"'), turn("assistant", "no")]
    theirs = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False)
    assert Template("mine", text, EOS)._render(messages, False, "here") == theirs
    with pytest.raises(UserError, match="today's date"):
        Template("mine", "{{ strftime_now('%Y') }}" + text, EOS)


REFUSED = {
    "no valid Jinja": "{% for m in messages %}",
    "'nothing' is undefined": "{{ nothing.at_all }}",
    "only user turns please": "{{ raise_exception('only user turns please') }}",
    "leaves out the assistant's words": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "writes earlier turns differently": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "access to attribute": "{{ ''.__class__.__mro__ }}",
    "Range too big": "{% for i in range(10**9) %}{% endfor %}",
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_broken_template_is_refused_before_any_row_is_read(problem):
    with pytest.raises(UserError, match=problem) as error:
        Template("mine", REFUSED[problem], EOS)
    assert "task.template=alpaca" in error.value.remedy


def test_an_unknown_name_lists_those_that_are_there():
    with pytest.raises(UserError, match="no template 'vicuna'") as error:
        load_template("vicuna", EOS)
    assert "alpaca, chat, chatml, plain" in error.value.remedy
