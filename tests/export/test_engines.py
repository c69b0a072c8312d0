"""Exports for other engines, by the programs: what is written, by what it is proven, and what is refused."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTJConfig,
    PhiForCausalLM,
    PhiForSequenceClassification,
)

from finetune.cli.app import compose_config
from finetune.cli.convert import run as convert
from finetune.cli.evaluate import run as evaluate
from finetune.cli.export import run as export
from finetune.cli.generate import run as generate
from finetune.cli.serve import run as serve
from finetune.errors import RunFailed, UserError
from finetune.export import gguf_file, proof
from finetune.export.write import staged

CHAT = """import json, sys, xllamacpp
p = xllamacpp.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256
p.n_parallel = 1; p.warmup = False; p.verbosity = 0; p.use_jinja = True
request = {"messages": json.loads(sys.argv[2]), "max_tokens": 4, "temperature": 0, "logprobs": True}
answer = xllamacpp.Server(p).handle_chat_completions(request)
print(answer if isinstance(answer, str) else json.dumps(answer))
"""
"""Answers to a conversation by llama.cpp: python -c CHAT FILE.gguf MESSAGES."""

pytestmark = pytest.mark.usefixtures("forked")


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
    assert "| transformers | the lines under Loading | this export, reopened" in card
    assert "| vLLM | `vllm serve THIS_FOLDER` |" in card and figures["engine"] in card


@pytest.mark.slow
def test_a_classifier_opens_as_phi(find_run, phi_base, tmp_path):
    run = find_run("classify", "lora")
    adapted = exported(run, "phi_adapter", tmp_path / "adapter", f"base={phi_base}")
    assert adapted["verified"] and adapted["max_difference"] < 1e-4
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

    # As vLLM 0.33.0 reads adapters: lora/peft_helper.py has these fields and refuses the rest;
    # lora/utils.py takes the module's name from a tensor's, and supports every linear layer.
    assert isinstance(values["r"], int) and isinstance(values["lora_alpha"], (int, float))
    assert values["bias"] == "none" and not values["use_dora"] and not values.get("lora_bias")
    assert values["modules_to_save"] is None and isinstance(values["init_lora_weights"], bool)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    linear = {
        name.removesuffix(".weight")
        for name in vllm_tensors(json.loads((phi_base / "config.json").read_text()))
        if ".self_attn." in name or ".mlp." in name
    }
    adapted = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in names}
    assert adapted <= linear and {name.rsplit(".", 1)[1] for name in adapted} == set(
        values["target_modules"]
    )
    assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}


@pytest.mark.slow
def test_another_base_is_found_out_and_nothing_stays(find_run, phi_base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in phi_base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.fc1.weight"
    save_file(tensors | {name: 3 * tensors[name]}, other / "model.safetensors")
    with pytest.raises(
        UserError, match=r"not the weights that this adapter was trained on: .*mlp\.fc1"
    ):
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

    # A conversation is put into the file's own template, as the export's tokenizer does.
    messages = [{"role": "user", "content": "Name a colour."}]
    tokenizer = AutoTokenizer.from_pretrained(str(run / "export"))
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(str(run / "export"), dtype=torch.float32)
    wanted = model.generate(**batch, max_new_tokens=4, do_sample=False)[0].tolist()
    done = subprocess.run(
        [sys.executable, "-c", CHAT, str(tmp_path / "gguf/model.gguf"), json.dumps(messages)],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    count = answer["usage"]["prompt_tokens"]
    assert count == batch["input_ids"].shape[1]
    tokens = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    assert tokens == wanted[count:]


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
        ("lm", "lora", "phi_adapter", ["base=/nowhere"], "there is no directory /nowhere"),
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


def vllm_tensors(config: dict) -> set[str]:
    """Names that vLLM's Phi loads; it knows no others.

    vLLM 0.33.0 runs `PhiForCausalLM` by transformers' own PhiModel, with a head and its bias
    (model_executor/models/registry.py, transformers/causal.py). Releases up to 0.25.1 have a class
    of their own (model_executor/models/phi.py), which joins q, k and v to qkv_proj: its
    packed_modules_mapping.
    """
    linear = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"]
    linear += ["mlp.fc1", "mlp.fc2", "input_layernorm"]
    modules = [
        f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in linear
    ]
    modules += ["model.final_layernorm", "lm_head"]
    both = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    return both | {"model.embed_tokens.weight"}


VLLM_CONFIG = {
    # 0.33.0, transformers_utils/model_arch_config_convertor.py and transformers/causal.py
    *("architectures", "model_type", "dtype", "vocab_size", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
    # 0.25.1, model_executor/models/phi.py: n_inner, and not intermediate_size
    *("rope_parameters", "n_inner", "hidden_act", "layer_norm_eps"),
}
VLLM_ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu")
"""Of model_executor/layers/activation.py, as far as they are plain functions."""


def test_vllms_phi_finds_what_it_reads(phi_base, small_gptj):
    config = json.loads((phi_base / "config.json").read_text())
    gptj = GPTJConfig.from_pretrained(str(small_gptj))
    assert config.keys() >= VLLM_CONFIG and config["architectures"] == ["PhiForCausalLM"]
    assert config["tie_word_embeddings"] is False  # asserted there: the head has a bias
    assert config["hidden_act"] in VLLM_ACTIVATIONS
    # rotary_embedding/__init__.py takes the rotated part of a head from here.
    head_dim, rope = gptj.n_embd // gptj.n_head, config["rope_parameters"]
    assert rope.keys() == {"rope_type", "rope_theta", "partial_rotary_factor"}
    assert int(head_dim * rope["partial_rotary_factor"]) == gptj.rotary_dim
    assert config["n_inner"] == config["intermediate_size"] == (gptj.n_inner or 4 * gptj.n_embd)
    with safe_open(phi_base / "model.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == vllm_tensors(config)
    assert set(PhiForCausalLM.from_pretrained(str(phi_base)).state_dict()) == vllm_tensors(config)


@pytest.mark.slow
def test_ctranslate2_gives_the_same_logits(find_run, tmp_path):
    """Its converter reads a merged export; in int8 it answers."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder = tmp_path / "merged"
    exported(find_run("lm", "lora"), "merged", folder, "dtype=fp32", "verify=none")
    card = (folder / "README.md").read_text()
    assert "ct2-transformers-converter --model THIS_FOLDER" in card
    converter = ctranslate2.converters.TransformersConverter(str(folder))
    for precision in ("float32", "int8"):
        converter.convert(str(tmp_path / precision), quantization=precision)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    batch = tokenizer("Return the money, said the people of the", return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    with torch.no_grad():
        wanted = model(**batch).logits[0].numpy()
        text = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    exact, small = (
        ctranslate2.Generator(str(tmp_path / name), compute_type=name, intra_threads=1)
        for name in ("float32", "int8")
    )
    logits = np.array(exact.forward_batch([ids]))[0]
    assert np.abs(logits - wanted).max() < 2e-5 * max(1.0, np.abs(wanted).max())
    for generator, least in ((exact, text), (small, [])):
        (answer,) = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids)],
            max_length=8,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        assert answer.sequences_ids[0][: len(least)] == least and answer.sequences_ids[0]


@pytest.mark.parametrize("kind", ["phi", "phi_adapter", "gguf"])
def test_exports_for_other_engines_say_who_serves_them(kind, phi_base, small_gptj, tmp_path):
    """Instead of failing in the middle of loading; converted checkpoints as well as exports."""
    folder, command = phi_base, f"vllm serve {phi_base}"
    if kind == "phi_adapter":
        folder = tmp_path / "adapter"
        folder.mkdir()
        values = {"peft_type": "LORA", "base_model_name_or_path": "/models/base-phi"}
        (folder / "adapter_config.json").write_text(json.dumps(values))
        about = {"kind": kind, "head": "lm", "dtype": "bf16", "base": "/models/base", "task": {}}
        about["settings"] = {"kind": "clm", "max_length": 64}
        (folder / "finetune.json").write_text(json.dumps(about))
        command = "vllm serve /models/base-phi --enable-lora --lora-modules"
    elif kind == "gguf":
        pytest.importorskip("gguf")
        folder = converted(small_gptj, tmp_path / "gguf", "to=gguf", "dtype=q8_0")
        command = f"llama-server -m {folder}/model.gguf"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "hello"}\n')
    programs: list[tuple[str, Callable, list[str]]] = [
        ("generate", generate, ["prompt=hello"]),
        ("serve", serve, []),
        ("evaluate", evaluate, [f"data.eval={rows}"]),
    ]
    for name, program, words in programs:
        with pytest.raises(UserError, match="which other engines run") as caught:
            program(compose_config([f"model={folder}", *words], name))
        assert command in str(caught.value), name


def test_a_classifier_in_phi_form_opens_in_transformers(tmp_path):
    values = {"model_type": "phi", "architectures": ["PhiForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"AutoModelForSequenceClassification\.from_pretrained"):
        generate(compose_config([f"model={tmp_path}", "prompt=hello"], "generate"))


@pytest.fixture
def full_disk():
    """Let files grow to 1 MiB only: what comes after fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged", "phi", "gguf"])
def test_a_disk_that_fills_leaves_nothing(find_run, tmp_path, full_disk, kind):
    """In the middle of the weights; of an adapter, which is small, in the tokenizer."""
    if kind == "gguf":
        pytest.importorskip("gguf")
    with pytest.raises(RunFailed, match=r"could not be written: .*File too large") as caught:
        exported(find_run("lm", "lora"), kind, tmp_path / "out", "verify=none")
    assert "out=DIR" in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_fills_in_the_proof_is_named(find_run, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(proof, "subprocess", subprocess)  # a process that inherits the limit
    with pytest.raises(RunFailed, match=r"reference_process failed: .*File too large"):
        exported(find_run("lm", "lora"), "adapter", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_write_that_falls_short_is_a_full_disk(tmp_path):
    """numpy's error, from which the operating system's reason is missing."""
    with pytest.raises(RunFailed, match="No space left"), staged(tmp_path / "out"):
        raise OSError("4096 requested and 2296 written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["hf", "phi", "gguf"])
def test_a_disk_that_fills_leaves_no_conversion(small_gptj, tmp_path, full_disk, form):
    if form == "gguf":
        pytest.importorskip("gguf")
    with pytest.raises(RunFailed, match=r"could not be written: .*File too large"):
        converted(small_gptj, tmp_path / "out", f"to={form}")
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(small_gptj, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    gguf_file.check_form(GPTJConfig(), "lm")
    with pytest.raises(UserError, match=r"xllamacpp is missing(.|\n)*pip install xllamacpp"):
        gguf_file.check_form(GPTJConfig(), "lm", proven=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"need the gguf package(.|\n)*pip install gguf"):
        gguf_file.check_form(GPTJConfig(), "lm")
    with pytest.raises(UserError, match="need the gguf package"):
        converted(small_gptj, tmp_path / "out", "to=gguf")
    assert not list(tmp_path.iterdir())
