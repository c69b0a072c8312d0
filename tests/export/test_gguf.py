"""A GGUF file of the shipped model runs in llama.cpp and gives plain transformers' tokens and log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM

from finetune.assets.paths import asset
from finetune.config import ModelConfig
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import RunFailed, UserError
from finetune.export.gguf_file import compare, parts, write_gguf
from finetune.export.proof import verify_export
from finetune.gptj.load import Weights, read_config

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TEXT = "Return the money, said the people of the United States to the Congress, and the"


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Outputs of plain transformers, the text's ids, and the next 24 greedy tokens."""
    folder = asset("gptj_tiny")
    model = GPTJForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    ids = load_tokenizer(None)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        outputs = model(ids).logits[0].float()
        text = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=50256)
    saved = {"ids.0": ids[0], "outputs.0": outputs.contiguous()}
    return saved, ids[0].tolist(), text[0, ids.shape[1] :].tolist()


def write(file: Path, dtype: str) -> Path:
    folder = asset("gptj_tiny")
    weights = Weights(folder)
    shapes = {name: weights.shape(name) for name in sorted(weights.files)}
    config = read_config(folder, ModelConfig(path=str(folder)))
    tensors = ((name, weights[name]) for name in shapes)
    write_gguf(tensors, shapes, config, load_tokenizer(None), file, dtype, "tiny")
    return file


@pytest.mark.parametrize(
    ("dtype", "most", "bytes_each"),
    [("f32", 1e-3, 4), ("f16", 5e-3, 2), ("bf16", 0.05, 2), ("q8_0", 0.2, 1.0625)],
)
def test_llama_cpp_gives_the_same_log_probabilities(
    tmp_path, reference, forked, dtype, most, bytes_each
):
    file = write(tmp_path / "model.gguf", dtype)
    (tmp_path / "finetune.json").write_text(json.dumps({"dtype": dtype}))
    weights = Weights(asset("gptj_tiny"))
    values = sum(torch.Size(weights.shape(name)).numel() for name in weights.files)
    assert file.stat().st_size == pytest.approx(values * bytes_each, rel=0.25, abs=2.5e6)
    figures = verify_export(tmp_path, reference[0])
    assert figures["verified"] and figures["mean_logprob_difference"] <= most
    assert figures["positions"] == 16 and figures["token_agreement"] >= 0.9


def test_llama_cpp_writes_the_same_greedy_text(tmp_path, reference):
    _, ids, wanted = reference
    file = write(tmp_path / "tiny.gguf", "f32")
    code = (
        "import json, sys, xllamacpp\n"
        "p = xllamacpp.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256\n"
        "p.n_parallel = 1; p.warmup = False; p.verbosity = 0\n"
        "answer = xllamacpp.Server(p).handle_completions({'prompt': json.loads(sys.argv[2]),\n"
        "    'max_tokens': 24, 'temperature': 0, 'logprobs': 1, 'ignore_eos': True})\n"
        "answer = answer if isinstance(answer, dict) else json.loads(answer)\n"
        "print(json.dumps([t['id'] for t in answer['choices'][0]['logprobs']['content']]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), json.dumps(ids)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def test_the_tokenizer_and_the_keys_are_inside(tmp_path):
    reader = gguf.GGUFReader(write(tmp_path / "tiny.gguf", "f16"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = read_config(asset("gptj_tiny"), ModelConfig(path=str(asset("gptj_tiny"))))
    assert fields["general.architecture"] == "phi2"
    assert fields["phi2.context_length"] == config.n_positions
    assert fields["phi2.rope.dimension_count"] == config.rotary_dim
    assert fields["tokenizer.ggml.add_bos_token"] is False
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size
    assert tokens[50256] == "<|endoftext|>" and set(types[50256:]) == {3} and types[0] == 1
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.attn_q.bias"] == "F32"
    assert kinds["output_norm.weight"] == "F32" and kinds["output.bias"] == "F32"


def test_a_damaged_file_is_not_what_was_written(tmp_path):
    file, weights = write(tmp_path / "tiny.gguf", "q8_0"), Weights(asset("gptj_tiny"))
    config = read_config(asset("gptj_tiny"), ModelConfig(path=str(asset("gptj_tiny"))))
    compare(((name, weights[name]) for name in sorted(weights.files)), config, file, "q8_0")
    with file.open("r+b") as opened:
        opened.seek(-1000, os.SEEK_END)
        opened.write(b"damaged")
    with pytest.raises(RunFailed, match="read back from the target is not what was written"):
        compare(((name, weights[name]) for name in sorted(weights.files)), config, file, "q8_0")


def test_rows_that_q8_0_cannot_divide_are_refused(tmp_path):
    config = GPTJConfig(n_embd=48, n_head=4, n_layer=1)
    with pytest.raises(UserError, match=r"q8_0 stores 32 values at a time; .* 48"):
        write_gguf([], {}, config, None, tmp_path / "x.gguf", "q8_0", "x")
    assert not list(tmp_path.iterdir())


def test_names():
    config = GPTJConfig(n_embd=8, n_head=2, rotary_dim=4, n_layer=4)
    tensors = [
        ("transformer.h.3.attn.out_proj.weight", torch.zeros(8, 8)),
        ("transformer.wte.weight", torch.zeros(5, 8)),
        ("lm_head.bias", torch.zeros(5)),
    ]
    assert [(name, kind.name) for name, _, kind in parts(tensors, config, "f16")] == [
        ("blk.3.attn_output.weight", "F16"),
        ("blk.3.attn_output.bias", "F32"),
        ("token_embd.weight", "F16"),
        ("output.bias", "F32"),
    ]
