"""Exports for other engines, by the programs: what is written, by what it is proven, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PhiForCausalLM,
    PhiForSequenceClassification,
)

from finetune.cli.app import compose_config
from finetune.cli.convert import run as convert
from finetune.cli.export import run as export
from finetune.errors import RunFailed, UserError


def exported(run: Path, kind: str, out: Path, *words: str) -> dict:
    """Export by the program; returns export.json."""
    line = [f"run={run}", f"kind={kind}", f"out={out}", *words]
    assert export(compose_config(line, "export")) == 0
    return json.loads((out / "export.json").read_text())


def converted(source: Path | str, target: Path, *words: str) -> Path:
    line = [f"source={source}", f"target={target}", *words]
    assert convert(compose_config(line, "convert")) == 0
    return target


@pytest.fixture(scope="module")
def phi_base(small_gptj, tmp_path_factory) -> Path:
    return converted(small_gptj, tmp_path_factory.mktemp("base") / "phi", "to=phi")


@pytest.mark.slow
def test_the_whole_model_opens_as_phi(find_run, tmp_path):
    """Plain Phi gives what the merged export gives in plain GPT-J: logits, text, and left-padded batches."""
    run = find_run("lm", "lora")
    figures = exported(run, "phi", tmp_path / "phi", "dtype=fp32")
    exported(run, "merged", tmp_path / "merged", "dtype=fp32", "verify=none")
    assert figures["verified"] and figures["max_difference"] < 1e-4
    assert set(figures["padded_max_difference"]) == {"left", "right"}
    model, reference = (
        AutoModelForCausalLM.from_pretrained(str(tmp_path / name), dtype=torch.float32).eval()
        for name in ("phi", "merged")
    )
    assert type(model) is PhiForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "phi"))
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["Return the", "The people of the United"], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted, logits = reference(**batch).logits, model(**batch).logits
    real = batch["attention_mask"].bool()
    assert (wanted - logits)[real].abs().max() < 1e-5 * wanted.abs().max()
    settings = dict(max_new_tokens=10, do_sample=False)
    assert torch.equal(reference.generate(**batch, **settings), model.generate(**batch, **settings))
    card = (tmp_path / "phi" / "README.md").read_text()
    assert "vllm serve" in card and "Proven by plain `transformers`" in card


@pytest.mark.slow
def test_a_classifier_opens_as_phi(find_run, tmp_path):
    run = find_run("classify", "lora")
    figures = exported(run, "phi", tmp_path / "phi", "dtype=fp32")
    assert figures["verified"] and set(figures["padded_max_difference"]) == {"left", "right"}
    model = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "phi"))
    exported(run, "merged", tmp_path / "merged", "dtype=fp32", "verify=none")
    reference = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    assert type(model) is PhiForSequenceClassification
    assert model.config.id2label == reference.config.id2label
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "phi"))
    batch = tokenizer(
        ["No", "Scientists find water on the moon"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(**batch).logits, reference.eval()(**batch).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_an_adapter_for_the_base_in_phi_form(find_run, phi_base, tmp_path):
    run = find_run("lm", "lora")
    with pytest.raises(UserError, match="needs the base model in Phi's form"):
        exported(run, "phi_adapter", tmp_path / "adapter")
    figures = exported(run, "phi_adapter", tmp_path / "adapter", f"base={phi_base}")
    assert figures["verified"] and figures["phi_base"] == str(phi_base)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(phi_base)
    assert (
        f"vllm serve {phi_base} --enable-lora" in (tmp_path / "adapter" / "README.md").read_text()
    )


@pytest.mark.slow
def test_another_base_is_found_out_and_nothing_stays(find_run, phi_base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in phi_base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.fc1.weight"
    save_file(tensors | {name: 3 * tensors[name]}, other / "model.safetensors")
    with pytest.raises(RunFailed, match="not equal to the trained model"):
        exported(find_run("lm", "lora"), "phi_adapter", tmp_path / "adapter", f"base={other}")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow
def test_a_gguf_file_is_proven_by_llama_cpp(find_run, tmp_path):
    pytest.importorskip("xllamacpp")
    run = find_run("lm", "full")
    figures = exported(run, "gguf", tmp_path / "gguf", "dtype=f16")
    assert figures["verified"] and "llama.cpp" in figures["engine"]
    assert figures["mean_logprob_difference"] < 0.02 and figures["token_agreement"] > 0.95
    assert (tmp_path / "gguf" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    assert "ollama create" in (tmp_path / "gguf" / "README.md").read_text()
    assert figures["files"].keys() == {"model.gguf"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "adapter", "kind", "words", "message"),
    [
        ("qa", "lora", "phi", [], "no head for question answering"),
        ("classify", "lora", "gguf", [], "Use kind=phi"),
        ("lm", "lora", "gguf", ["dtype=q4_k"], "f32, f16, bf16"),
        ("lm", "lora", "phi", ["dtype=q8_0"], "dtype = q8_0 is unknown for kind=phi"),
        ("lm", "lora", "phi", ["verify=tensors"], "proven by outputs"),
        ("lm", "full", "phi_adapter", [], "trained every weight"),
        ("lm", "ia3", "phi_adapter", [], "an adapter of kind ia3 has no counterpart"),
        ("lm", "dora", "phi_adapter", [], "Use kind=phi"),
        ("lm", "lora", "onnx", [], "kind = onnx is unknown"),
    ],
)
def test_refusals_leave_nothing(find_run, tmp_path, head, adapter, kind, words, message):
    with pytest.raises(UserError) as caught:
        exported(find_run(head, adapter), kind, tmp_path / "out", *words)
    assert message in str(caught.value) and not list(tmp_path.iterdir())


def test_a_checkpoint_as_phi_and_back_in_transformers(small_gptj, phi_base):
    reference = AutoModelForCausalLM.from_pretrained(str(small_gptj), dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(str(phi_base), dtype=torch.float32).eval()
    ids = torch.arange(40, 70)[None]
    with torch.no_grad():
        wanted, logits = reference(ids).logits, model(ids).logits
    assert type(model) is PhiForCausalLM
    assert (wanted - logits).abs().max() < 1e-5 * wanted.abs().max()


def test_a_checkpoint_as_gguf_is_read_back(small_gptj, tmp_path):
    gguf = pytest.importorskip("gguf")
    target = converted(small_gptj, tmp_path / "gguf", "to=gguf", "dtype=f16")
    (file,) = target.iterdir()
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"token_embd.weight", "output.bias", "blk.0.attn_q.bias"} <= names
    with pytest.raises(UserError, match="Choose from hf, jax, phi, gguf"):
        converted(small_gptj, tmp_path / "x", "to=onnx")
