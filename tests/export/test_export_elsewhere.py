"""Exports in the programs that people use: transformers' pipelines and heads, peft, lm-eval; the card, and the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from finetune.cli.app import compose_config
from finetune.cli.evaluate import run as evaluate
from finetune.cli.export import run as export
from finetune.cli.generate import run as generate
from finetune.data.qa_rows import Question
from finetune.errors import RunFailed, UserError
from finetune.export.model_card import model_card
from finetune.export.proof import verify_export
from finetune.export.run_info import RunInfo
from finetune.inference.answer import answer_questions, classify_text
from finetune.inference.sample import Sampling
from finetune.inference.speaker import load_speaker
from finetune.process import LAUNCHER_VARIABLES
from tests.conftest import ROOT
from tests.export.test_export_matrix import AUTO, exported
from tests.lm_eval_tasks import write_tasks

TEXTS = [
    "Man wins.",
    "Scientists find that water on the moon is wetter than expected, officials say",
    "No",
    "Local man insists that he is fine " * 3,
]

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def merged(find_run):
    """merged(head): its merged fp32 export."""
    made: dict[str, Path] = {}

    def make(head: str) -> Path:
        if head not in made:
            made[head] = exported(find_run(head, "lora"), "merged")
        return made[head]

    return make


def probabilities(speaker) -> np.ndarray:
    rows = [
        classify_text(speaker.trained.module, speaker.task, [text], speaker.device)
        for text in TEXTS
    ]
    return np.array([list(row["probabilities"].values()) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left", "alone"])
def test_plain_transformers_pools_the_trained_token(merged, side):
    """Unequal lengths in one batch padded on either side, and one by one; the tokenizer brings the eos."""
    folder = merged("classify")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id == 50257 != tokenizer.eos_token_id
    batches = [[text] for text in TEXTS] if side == "alone" else [TEXTS]
    with torch.no_grad():
        found = [
            model(
                **tokenizer(
                    batch,
                    return_tensors="pt",
                    padding=side != "alone",
                    padding_side=side if side != "alone" else None,
                )
            ).logits.softmax(-1)
            for batch in batches
        ]
    np.testing.assert_allclose(
        torch.cat(found).numpy(), probabilities(load_speaker(str(folder), None)), atol=2e-6
    )


@pytest.mark.slow
def test_the_classification_pipeline_names_labels(merged, find_run):
    folder = merged("classify")
    labels = json.loads((find_run("classify", "lora") / "task.json").read_text())["labels"]
    found = pipeline("text-classification", model=str(folder), top_k=None, batch_size=4)(TEXTS)
    wanted = probabilities(load_speaker(str(folder), None))
    for row, p in zip(found, wanted, strict=True):
        scores = {entry["label"]: entry["score"] for entry in row}
        assert scores == {
            label: pytest.approx(value, abs=2e-6) for label, value in zip(labels, p, strict=True)
        }


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
def test_a_classification_adapter_opens_as_documented(find_run, adapter):
    folder = exported(find_run("classify", adapter), "adapter")
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    snippet = page.split("```python\nfrom peft import PeftConfig")[1].split("```")[0]
    scope: dict = {}
    exec("from peft import PeftConfig" + snippet.replace("RUN/export", str(folder)), scope)
    model, tokenizer = scope["model"], scope["tokenizer"]
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**batch).logits.softmax(-1).numpy()
    np.testing.assert_allclose(found, probabilities(load_speaker(str(folder), None)), atol=2e-6)


@pytest.mark.slow
def test_the_tokenizer_cuts_like_training(merged):
    tokenizer = AutoTokenizer.from_pretrained(merged("classify"))
    ids = tokenizer("word " * 5000, truncation=True)["input_ids"]
    assert (
        len(ids) == tokenizer.model_max_length == 512
        and ids[-1] == tokenizer.eos_token_id != ids[-2]
    )
    pair = tokenizer("one", "two")["input_ids"]
    assert pair == [
        *tokenizer.encode("one", add_special_tokens=False),
        198,
        *tokenizer.encode("two", add_special_tokens=False),
        tokenizer.eos_token_id,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("head", AUTO)
def test_the_tokenizer_keeps_50400_entries(merged, head):
    tokenizer = AutoTokenizer.from_pretrained(merged(head))
    assert (
        len(tokenizer) == 50400 and tokenizer.convert_tokens_to_ids("<|extratoken_143|>") == 50399
    )


@pytest.mark.slow
def test_an_instruction_export_carries_its_template(merged):
    folder = merged("lm")
    speaker, tokenizer = load_speaker(str(folder), None), AutoTokenizer.from_pretrained(folder)
    for messages in (
        [{"role": "user", "content": "Name a colour."}],
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ],
    ):
        theirs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert theirs == speaker.ids(messages, chat=True)


@pytest.mark.slow
def test_the_generation_pipeline_says_the_same(merged):
    folder = merged("lm")
    speaker = load_speaker(str(folder), None)
    writer = pipeline("text-generation", model=str(folder))
    messages = [{"role": "user", "content": "Name a colour."}]
    theirs = writer(messages, max_new_tokens=10, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    ours = speaker.continue_ids([speaker.ids(messages, chat=True)], Sampling(10, 0.0))[0]
    assert theirs == speaker.tokenizer.decode(ours, skip_special_tokens=True) != ""
    prompts = ["One", "A much longer prompt than the first"]
    batch = writer(prompts, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=2)
    wanted = speaker.continue_ids([speaker.ids(p, False) for p in prompts], Sampling(8, 0.0))
    assert [row[0]["generated_text"] for row in batch] == [
        speaker.tokenizer.decode(ids) for ids in wanted
    ]
    assert writer.model.generation_config.eos_token_id == 50256


@pytest.mark.slow
def test_vllms_gptj_finds_what_it_reads(merged):
    """What its class asserts, looks up and maps (vLLM 0.33.0, model_executor/models/gpt_j.py); it needs a GPU to run."""
    folder = merged("lm")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPTJForCausalLM"] and config["tie_word_embeddings"] is False
    assert config["rotary_dim"] % 2 == 0 and config.get("rotary", True)
    assert config["activation_function"] in ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh")
    linear = [
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
    ]
    wanted = {
        "transformer.wte.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
        "lm_head.bias",
    }
    for layer in range(config["n_layer"]):
        wanted |= {f"transformer.h.{layer}.{name}.weight" for name in (*linear, "ln_1")}
        wanted |= {
            f"transformer.h.{layer}.{name}.bias" for name in ("mlp.fc_in", "mlp.fc_out", "ln_1")
        }
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    assert found == wanted


@pytest.mark.slow
def test_question_answering_reads_the_pair_as_trained(merged):
    """The tokenizer's pair, Hugging Face's head, and a search over all spans find the span that we answer with."""
    folder = merged("qa")
    question, context = (
        "Who wrote it?",
        "The letter was written by Ada Lovelace in the year 1843, in London.",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    batch = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, first = batch.pop("offset_mapping")[0].tolist(), len(tokenizer(question)["input_ids"])
    with torch.no_grad():
        out = model(**batch)
    begin, end = out.start_logits[0], out.end_logits[0]
    last = batch["input_ids"].shape[1] - 1
    spans = [
        (float(begin[i] + end[j] - begin[last] - end[last]), i, j)
        for i in range(first, last)
        for j in range(i, min(i + 32, last))
    ]
    score, i, j = max(spans)
    speaker = load_speaker(str(folder), None)
    asked = [Question("f:1", "0", context, question, [])]
    (found,) = answer_questions(speaker.trained.module, speaker.task, asked, speaker.device)
    assert found["best_span"] == context[offsets[i][0] : offsets[j][1]].strip()
    assert found["score"] == pytest.approx(score, abs=1e-3)
    assert context[found["start"] : found["end"]] == found["best_span"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "adapter", "kind"),
    [("lm", "lora", "adapter"), ("classify", "full", "full"), ("qa", "lora", "merged")],
)
def test_cards_are_valid(find_run, head, adapter, kind):
    folder = exported(find_run(head, adapter), kind)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == ("peft" if kind == "adapter" else "transformers")
    weights = next(folder.glob("*.safetensors"))
    assert json.loads((folder / "export.json").read_text())["files"][weights.name] in card.text
    engines = dict(row.split(" | ")[::2] for row in card.text.split("\n") if row.count(" | ") == 2)
    judge = "| transformers and peft" if kind == "adapter" else "| transformers"
    assert engines[judge].startswith("this export was not reopened")  # verify=tensors
    assert ("| CTranslate2" in engines) == (head == "lm" and kind != "adapter")
    assert "Verified tensor by tensor" in card.text
    loading = card.text.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(loading.replace("THIS_FOLDER", str(folder)), scope)  # the card's own commands
    assert (
        type(scope["model"]).__name__.startswith(("GPTJ", "PeftModel"))
        and len(scope["tokenizer"]) == 50400
    )


def test_metadata_of_a_hub_base_and_of_metrics():
    metrics = {"loss": 1.5, "accuracy": 0.25, "examples": 4, "per_class": {}}
    unproven = {"verified": False, "files": {}}
    info = RunInfo("run", "classify", "EleutherAI/gpt-j-6b", "bf16", {})
    info.facts, info.metrics = {"evaluation data": "x/e.jsonl"}, metrics
    card = model_card("adapter", info, unproven)
    data = ModelCard(card).data
    assert data.base_model == "EleutherAI/gpt-j-6b" and data.pipeline_tag == "text-classification"
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("loss", 1.5),
        ("accuracy", 0.25),
    }
    info = RunInfo("run", "lm", "/models/j", "bf16", {})
    local = model_card("full", info, unproven, origin="EleutherAI/gpt-j-6b")
    assert ModelCard(local).data.base_model == "EleutherAI/gpt-j-6b"


@pytest.mark.slow
def test_a_wrong_export_is_refused_and_leaves_nothing(find_run, merged, tmp_path):
    """In a fresh process by outputs, and tensor by tensor."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "export"
    shutil.copytree(merged("lm"), folder)
    ids = torch.arange(100, 130)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        outputs = model(ids[None]).logits[0]
    assert verify_export(folder, {"ids.0": ids, "outputs.0": outputs})["verified"]
    tensors = load_file(folder / "model.safetensors")
    row = tensors["lm_head.weight"][777].clone()
    tensors["lm_head.weight"][777] *= -1  # one word of 50400: the mean does not show it
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match="not equal"):
        verify_export(folder, {"ids.0": ids, "outputs.0": outputs})
    tensors["lm_head.weight"][777] = row
    tensors["transformer.h.1.mlp.fc_in.weight"][3] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match="not equal"):
        verify_export(folder, {"ids.0": ids, "outputs.0": outputs})
    del tensors["transformer.h.0.mlp.fc_in.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match="missing_keys"):
        verify_export(folder, {"ids.0": ids, "outputs.0": outputs})
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.slow
def test_what_a_stranger_may_mistype(find_run, tmp_path):
    lora, full = find_run("lm", "lora"), find_run("lm", "full")
    cases = [
        ([f"run={lora}", "kind=full"], "kind=merged"),
        ([f"run={full}", "kind=merged"], "kind=full"),
        ([f"run={lora}", "kind=best"], "unknown"),
        ([f"run={tmp_path}", "kind=full"], "checkpoint"),
        ([f"run={lora}", "kind=merged", "verify=perhaps"], "verify"),
        ([f"run={lora}"], "kind="),
        ([f"run={lora}", "kind=merged", "push_to_hub=a/b/c"], "repository"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            export(compose_config(words, "export"))
    copy = tmp_path / "run"
    shutil.copytree(lora, copy)
    step = next((copy / "checkpoints").glob("step-*"))
    file = next(step.glob("optim-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=file.name):
        export(compose_config([f"run={step}", "kind=merged"], "export"))


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "hf_not_a_real_token"])
def test_the_hub_offline_says_what_it_would_do(find_run, monkeypatch, tmp_path, token):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    run, out = find_run("lm", "lora"), tmp_path / "out"
    words = [
        f"run={run}",
        "kind=adapter",
        f"out={out}",
        "verify=tensors",
        "export.push_to_hub=someone/some-model",
        "hub_base=EleutherAI/gpt-j-6b",
    ]
    with pytest.raises(RunFailed, match=r"someone/some-model .*upload \d+ files") as caught:
        export(compose_config(words, "export"))
    assert caught.value.exit_code == 1 and f"hf upload someone/some-model {out}" in str(
        caught.value
    )
    assert (out / "adapter_model.safetensors").is_file() and (
        token is None or token not in str(caught.value)
    )


def test_what_is_not_verified_is_not_uploaded(find_run, tmp_path):
    words = [
        f"run={find_run('lm', 'lora')}",
        "kind=adapter",
        f"out={tmp_path / 'out'}",
        "verify=none",
        "push_to_hub=a/b",
    ]
    with pytest.raises(UserError, match="only a verified export"):
        export(compose_config(words, "export"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_lm_eval_with_its_own_hf_model_and_ours(find_run, tmp_path, monkeypatch):
    """`hf` with `peft=`, as people type it, and launch/evaluate.py of the same run: the same log-likelihoods."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    local_task = write_tasks(tmp_path)
    for name in LAUNCHER_VARIABLES:  # with those of an earlier call, lm-eval joins a group
        monkeypatch.delenv(name, raising=False)
    run = find_run("lm", "lora")
    folder = exported(run, "adapter")
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    manager = TaskManager(include_path=str(local_task), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": base,
            "peft": str(folder),
            "tokenizer": str(folder),
            "dtype": "float32",
        },
        tasks=["own_words"],
        task_manager=manager,
        device="cpu",
        batch_size=4,
    )
    words = ["suite=lm_eval", "tasks=own_words", f"task_dir={local_task}", "batch=4"]
    assert evaluate(compose_config([f"run={run}", *words], "evaluate")) == 0
    assert evaluate(compose_config([f"model={folder}", *words], "evaluate")) == 0
    found = [json.loads((where / "eval.json").read_text())["lm_eval"] for where in (run, folder)]
    assert [row["tasks"]["own_words"]["acc"] for row in found] == [
        theirs["results"]["own_words"]["acc,none"]
    ] * 2
    assert found[0]["settings"]["own_words"]["samples"] == 20


@pytest.mark.slow
def test_keys_of_the_trained_task_can_be_typed_for_a_run_and_an_export(find_run):
    """Typed keys change; everything else stays as it was trained, also when the task is named."""
    run = find_run("qa", "lora")
    folder = exported(run, "adapter")
    data = ["data.eval=asset:data/qa/eval.json", "batch=8"]

    def figures(where, *words):
        assert evaluate(compose_config([*words, *data], "evaluate")) == 0
        return json.loads((where / "eval.json").read_text())

    plain = figures(run, f"run={run}")
    silent, talking = (
        figures(run, f"run={run}", f"task.null_threshold={value}") for value in (-1e9, 1e9)
    )
    assert (
        silent["no_answer"]["f1"] == 1.0
        and silent["has_answer"]["f1"] == 0.0
        and talking["no_answer"]["f1"] == 0.0
    )
    named = figures(folder, f"model={folder}", "task=qa")
    assert {key: named[key] for key in ("f1", "windows", "questions")} == {
        key: plain[key] for key in ("f1", "windows", "questions")
    }
    with pytest.raises(UserError, match="cannot change"):
        evaluate(
            compose_config(
                [f"model={folder}", "task=classify", "task.problem=regression", *data], "evaluate"
            )
        )


def said(capsys, *words: str) -> str:
    capsys.readouterr()  # what the export before it printed
    assert generate(compose_config([*words], "generate")) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_every_head_answers_in_generate(find_run, capsys, tmp_path):
    """A whole model, an adapter; one question, a file of them; a chat in the template that was trained."""
    classifier = exported(find_run("classify", "full"), "full")
    found = json.loads(said(capsys, f"model={classifier}", "prompt=Man wins."))
    assert found["label"] in found["probabilities"] and sum(
        found["probabilities"].values()
    ) == pytest.approx(1.0, abs=1e-4)
    answers = exported(find_run("qa", "lora"), "adapter")
    rows = [
        {"question": "Who?", "context": context}
        for context in ("Ada met Bob.", "Nobody was there.")
    ]
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said(capsys, f"model={answers}", f"prompts={file}", f"out={out}")
    for row, line in zip(rows, out.read_text().splitlines(), strict=True):
        found = json.loads(line)
        assert row["context"][found["start"] : found["end"]] == found["best_span"] != ""
    instructed = exported(find_run("lm", "lora"), "adapter")
    words = [f"model={instructed}", "temperature=0", "max_new_tokens=6", "dtype=fp32"]
    asked = said(capsys, *words, "prompt=Name three fruits.", "chat=true").strip("\n")
    speaker = load_speaker(str(instructed), compose_config(["dtype=fp32"], "generate").config.dtype)
    (ids,) = speaker.continue_ids([speaker.task.prompt_ids("Name three fruits.")], Sampling(6, 0.0))
    assert asked == speaker.tokenizer.decode(ids, skip_special_tokens=True).strip("\n") != ""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["export", "evaluate"])
def test_an_adapter_is_not_put_on_other_weights_than_its_own(find_run, tmp_path, program):
    """A matrix in the middle of the base is another."""
    run = tmp_path / "run"
    shutil.copytree(find_run("lm", "lora"), run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    base = tmp_path / "base"
    shutil.copytree(config["model"]["path"], base)
    data = bytearray((base / "model.safetensors").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2**18] = bytes(2**18)
    (base / "model.safetensors").write_bytes(data)
    (run / "config.yaml").write_text(
        yaml.safe_dump(config | {"model": config["model"] | {"path": str(base)}})
    )
    words = (
        ["kind=merged", f"out={tmp_path / 'out'}"] if program == "export" else [f"out={tmp_path}"]
    )
    with pytest.raises(UserError, match="not the weights that this adapter was trained on"):
        (export if program == "export" else evaluate)(
            compose_config([f"run={run}", *words], program)
        )
    assert not (tmp_path / "out").exists()
