"""Checkpoints and adapters that were not trained here: read as plain transformers and peft read them, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification

from finetune.cli.app import compose_config, trained_task
from finetune.cli.evaluate import run as evaluate
from finetune.config import adapter_head
from finetune.data.encode_classify import PlainText
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import UserError
from finetune.export.hf_files import close_with_eos
from finetune.export.reopen import read_about
from finetune.inference.answer import classify_text
from finetune.inference.speaker import load_speaker

TEXTS = [
    "a good day",
    "bad film",
    "the cat sat on the mat",
    "it rains",
    "why not",
    "it ends<|endoftext|>",
]
NUMBERS = {
    "vocab_size": 50400,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "n_positions": 256,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of plain transformers that pads with eos, as most of GPT-J do, and rows that it labelled itself."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    names = {0: "neg", 1: "pos"}
    model = GPTJForSequenceClassification(
        GPTJConfig(**NUMBERS, id2label=names, label2id={"neg": 0, "pos": 1}, pad_token_id=50256)
    ).eval()
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(None)
    tokenizer.save_pretrained(folder)
    with (folder / "rows.jsonl").open("w") as file:
        for text in TEXTS:
            label = names[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())]
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a causal model; `lm` and `classifier`, adapters that plain peft wrote; `unnamed`, which names no base."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    GPTJForCausalLM(GPTJConfig(**NUMBERS)).save_pretrained(folder / "base")
    for name, kind, task in (
        ("lm", GPTJForCausalLM, "CAUSAL_LM"),
        ("classifier", GPTJForSequenceClassification, "SEQ_CLS"),
    ):
        model = get_peft_model(
            kind.from_pretrained(folder / "base"),
            LoraConfig(task_type=task, target_modules=["q_proj"]),
        )
        model.save_pretrained(folder / name)
    (folder / "unnamed").mkdir()
    for file in (folder / "lm").iterdir():
        (folder / "unnamed" / file.name).write_bytes(file.read_bytes())
    change(folder / "unnamed", base_model_name_or_path=None)
    return folder


def change(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_foreign_classifier_is_read_as_plain_transformers_reads_it(classifier, tmp_path):
    words = [f"model={classifier}", f"data.eval={classifier / 'rows.jsonl'}", f"out={tmp_path}"]
    assert evaluate(compose_config([*words, "task=classify"], "evaluate")) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["accuracy"] == 1.0

    speaker, judge = (
        load_speaker(str(classifier), None),
        GPTJForSequenceClassification.from_pretrained(classifier).eval(),
    )
    for text in TEXTS:
        found = classify_text(speaker.trained.module, speaker.task, [text], speaker.device)[
            "probabilities"
        ]
        with torch.no_grad():
            wanted = judge(**speaker.tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(list(found.values())), wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("pad", [None, 50256, 50257])
def test_the_pooled_token_is_that_of_transformers(closes, pad):
    """Also with a tokenizer that closes every text with the eos, which may be the padding too."""
    tokenizer = load_tokenizer(None)
    if closes:
        close_with_eos(tokenizer, "\n")
    torch.manual_seed(1)
    judge = GPTJForSequenceClassification(GPTJConfig(**NUMBERS, pad_token_id=pad)).eval()
    for text in TEXTS:
        ids, cut = PlainText(tokenizer, pad).ids([text], 256)
        with torch.no_grad():
            wanted = judge(**tokenizer(text, return_tensors="pt")).logits[0]
            found = judge.score(judge.transformer(torch.tensor([ids])).last_hidden_state)[0, -1]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert cut == 0 and len(PlainText(tokenizer, None).ids([text], 2)[0]) == min(
            2, len(tokenizer(text)["input_ids"])
        )


def test_an_adapter_without_a_base_says_which_key_names_it(adapters, tmp_path):
    with pytest.raises(UserError, match=r"does not name its base model.*\n.*base=DIR"):
        read_about(adapters / "unnamed")
    with pytest.raises(UserError, match=r"no such base.*is not at hand(.|\n)*base=DIR"):
        read_about(adapters / "unnamed", str(tmp_path / "no such base"))
    with pytest.raises(UserError, match="this is no adapter"):
        read_about(adapters / "base", "x/y")
    assert read_about(adapters / "unnamed", str(adapters / "base"))["base"] == str(
        adapters / "base"
    )
    speaker = load_speaker(str(adapters / "unnamed"), None, base=str(adapters / "base"))
    judge = PeftModel.from_pretrained(
        GPTJForCausalLM.from_pretrained(adapters / "base"), adapters / "lm"
    ).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(
            speaker.trained.module(input_ids=ids).logits,
            judge(input_ids=ids).logits,
            atol=1e-5,
            rtol=0,
        )


def test_a_foreign_classification_adapter_gets_its_head(adapters):
    folder = adapters / "classifier"
    assert trained_task([f"export_dir={folder}"]) == ["task=classify"]
    speaker = load_speaker(str(folder), None)
    judge = PeftModel.from_pretrained(
        GPTJForSequenceClassification.from_pretrained(adapters / "base"), folder
    ).eval()
    for text in TEXTS[:3]:
        found = classify_text(speaker.trained.module, speaker.task, [text], speaker.device)[
            "probabilities"
        ]
        with torch.no_grad():
            wanted = judge(**speaker.tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert list(found) == ["LABEL_0", "LABEL_1"]
        torch.testing.assert_close(torch.tensor(list(found.values())), wanted, atol=2e-6, rtol=0)


def test_labels_without_names_can_be_named(adapters, classifier, tmp_path):
    words = [
        f"model={adapters / 'classifier'}",
        f"data.eval={classifier / 'rows.jsonl'}",
        f"out={tmp_path}",
        "task=classify",
    ]
    assert evaluate(compose_config([*words, "task.labels=[neg,pos]"], "evaluate")) == 0
    assert set(json.loads((tmp_path / "eval.json").read_text())["per_class"]) == {"neg", "pos"}


def test_a_head_that_nobody_holds_is_refused(adapters, tmp_path):
    """peft would draw it at random."""
    for file in (adapters / "lm").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path, task_type="SEQ_CLS")
    with pytest.raises(
        UserError,
        match=r"neither its file nor its base holds that head(.|\n)*modules_to_save=\[score\]",
    ):
        read_about(tmp_path)


@pytest.mark.parametrize(
    ("values", "head"),
    [
        ({"task_type": "CAUSAL_LM"}, "lm"),
        ({"task_type": "SEQ_CLS"}, "classify"),
        ({"task_type": "QUESTION_ANS"}, "qa"),
        ({"task_type": None}, "lm"),
        ({"task_type": None, "modules_to_save": ["score"]}, "classify"),
        ({"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}, "lm"),
        ({"modules_to_save": ["qa_outputs"]}, "qa"),
    ],
)
def test_the_head_of_an_adapter(values, head):
    assert adapter_head(values, "").name == head


def test_an_adapter_of_another_task_is_refused():
    with pytest.raises(UserError, match="TOKEN_CLS"):
        adapter_head({"task_type": "TOKEN_CLS"}, "")


def test_foreign_models_keep_within_their_positions(classifier, adapters, tmp_path):
    assert (
        read_about(classifier)["settings"]["max_length"]
        == read_about(adapters / "lm")["settings"]["max_length"]
        == 256
    )
    words = [
        f"model={classifier}",
        f"data.eval={classifier / 'rows.jsonl'}",
        f"out={tmp_path}",
        "task=classify",
    ]
    with pytest.raises(
        UserError,
        match=r"task.max_length = 300 exceeds the model's 256 positions(.|\n)*task.max_length=256",
    ):
        evaluate(compose_config([*words, "task.max_length=300"], "evaluate"))
