"""What an export is opened on: an adapter's own base and no other, with a tokenizer that its embedding has rows for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJConfig, GPTJForCausalLM

from finetune.cli.app import compose_config
from finetune.cli.convert import run as convert
from finetune.cli.evaluate import run as evaluate
from finetune.cli.generate import run as generate
from finetune.config import Dtype, LoraConfig, ModelConfig
from finetune.data.tokenizer import build_gptj_tokenizer
from finetune.errors import UserError
from finetune.export.reopen import read_about
from finetune.export.run_info import RunInfo
from finetune.export.write import finish_export, staged, write_adapter
from finetune.gptj import adapters
from finetune.gptj.load import base_record, build_model, same_base
from finetune.inference import speaker as generating
from finetune.inference.serve_api import Limits, Refused, read_request
from finetune.inference.speaker import load_speaker

NUMBERS = {
    "vocab_size": 50400,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "n_positions": 256,
}


def make_base(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    GPTJForCausalLM(GPTJConfig(**NUMBERS)).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", 0)


@pytest.fixture
def export(base: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of `base` as a run exports it."""
    model = build_model(
        ModelConfig(path=str(base), dtype=Dtype.fp32), "lm", device=torch.device("cpu"), seed=0
    )
    wrapped = adapters.attach(model, LoraConfig(), "lm", str(base), 0)
    trained = {
        name: torch.randn_like(p) for name, p in wrapped.named_parameters() if p.requires_grad
    }
    info = RunInfo(
        "x",
        "lm",
        str(base),
        "fp32",
        {},
        {"kind": "clm", "max_length": 64},
        revision="float16",
        base_folder=base,
    )
    with staged(tmp_path / "export") as stage:
        write_adapter(wrapped, trained, stage)
        finish_export(stage, "adapter", build_gptj_tokenizer(), wrapped.config, info, None)
    return tmp_path / "export"


def rows(folder: Path, text: str = "hello there") -> str:
    (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return str(folder / "rows.jsonl")


def test_the_same_weights_in_other_files_are_the_same_base(base, tmp_path):
    record, tensors = base_record(base, "lm"), load_file(base / "model.safetensors")
    assert same_base(base, "lm", record)

    pickled, rounded, cut, body = (
        shutil.copytree(base, tmp_path / name) for name in ("bin", "bf16", "cut", "body")
    )
    for folder in (pickled, cut, body):
        (folder / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, rounded / "model.safetensors"
    )
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, cut / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(
        {name: t for name, t in tensors.items() if "lm_head" not in name},
        body / "model.safetensors",
    )
    assert all(same_base(folder, "lm", record) for folder in (pickled, rounded, cut))
    assert not same_base(body, "lm", record) and same_base(
        body, "classify", base_record(base, "classify")
    )

    assert not same_base(make_base(tmp_path / "other", 1), "lm", record)
    tensors["transformer.h.1.mlp.fc_in.weight"] += 0.01
    save_file(tensors, base / "model.safetensors")
    assert not same_base(base, "lm", record)


def test_an_adapter_is_refused_on_weights_that_it_was_not_trained_on(base, export, tmp_path):
    words = [f"model={export}", f"data.eval={rows(tmp_path)}", f"out={tmp_path / 'out'}"]
    assert evaluate(compose_config(words, "evaluate")) == 0
    loss = json.loads((tmp_path / "out/eval.json").read_text())["loss"]

    kept = shutil.copytree(base, tmp_path / "kept")
    shutil.copy(make_base(tmp_path / "other", 1) / "model.safetensors", base / "model.safetensors")
    for refused in (
        lambda: evaluate(compose_config(words, "evaluate")),
        lambda: load_speaker(str(export), None),
        lambda: generate(compose_config([f"model={export}", "prompt=hello"], "generate")),
        lambda: evaluate(compose_config([*words, f"base={tmp_path / 'other'}"], "evaluate")),
    ):
        with pytest.raises(
            UserError, match=r"not the weights that this adapter was trained on(.|\n)*base=DIR"
        ):
            refused()
    assert evaluate(compose_config([*words, f"base={kept}"], "evaluate")) == 0
    assert json.loads((tmp_path / "out/eval.json").read_text())["loss"] == loss

    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"is not at hand(.|\n)*base=DIR"):
        load_speaker(str(export), None)
    assert read_about(export, str(kept))["base"] == str(kept)


def test_the_revision_of_a_base_on_the_hub_is_kept(export):
    for name in ("adapter_config.json", "finetune.json"):
        assert json.loads((export / name).read_text())["revision"] == "float16"


def test_an_adapter_cannot_be_converted(export, tmp_path):
    with pytest.raises(UserError, match=r"this is an adapter(.|\n)*kind=merged"):
        convert(compose_config([f"source={export}", f"target={tmp_path / 'target'}"], "convert"))


def test_a_token_without_a_row_is_refused_before_the_weights_are_loaded(
    export, tmp_path, monkeypatch
):
    tokenizer = build_gptj_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(export)
    speaker = load_speaker(str(export), None)
    for prompt in ("<|im_start|>user", [1, 50400]):
        with pytest.raises(Refused, match=r"50400|must be"):
            read_request({"prompt": prompt}, False, speaker, Limits(8, 1))
    assert read_request({"prompt": "user"}, False, speaker, Limits(8, 1)).prompts == [
        tokenizer("user")["input_ids"]
    ]

    monkeypatch.setattr(
        generating, "load_export", lambda *_: pytest.fail("the weights were loaded")
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n<|im_start|>user\n")
    with pytest.raises(
        UserError, match=r"prompts.txt:2: .*'<\|im_start\|>' has id 50400, .* 50400 rows"
    ):
        generate(compose_config([f"model={export}", f"prompts={prompts}"], "generate"))
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*has id 50400"):
        evaluate(
            compose_config(
                [f"model={export}", f"data.eval={rows(tmp_path, '<|im_start|>user')}"], "evaluate"
            )
        )
