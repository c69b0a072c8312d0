"""Defaults of libraries that this project relies on: a test that fails here names what changed, not where it hurts."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from transformers import (
    GenerationConfig,
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
)

from finetune.assets.paths import asset

ROOT = Path(__file__).resolve().parents[1]
TOUCHED = ("torch", "deepspeed", "transformers", "peft", "datasets", "hydra-core", "omegaconf")
"""Libraries whose internals are used."""
HEADS = (GPTJForCausalLM, GPTJForSequenceClassification, GPTJForQuestionAnswering)


def tiny(**changes) -> GPTJConfig:
    return GPTJConfig(
        n_embd=32,
        n_layer=1,
        n_head=2,
        rotary_dim=8,
        vocab_size=50,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )


@pytest.mark.parametrize("name", TOUCHED)
def test_upper_bounds_name_the_newest_minor_version_that_is_tested(name):
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirement = next(r for r in map(Requirement, lines) if r.name == name)
    major, minor = map(int, re.findall(r"\d+", version(name))[:2])
    bounds = {s.operator: s.version for s in requirement.specifier}
    assert requirement.specifier.contains(version(name).split("+")[0])
    assert bounds["<"] == f"{major}.{minor + 1}", (
        f"{name} {version(name)} is installed, tested up to {bounds['<']}"
    )


def test_attention_is_sdpa_by_default():
    """What `bench/peers.py` compares with, and what an export computes with elsewhere."""
    assert [kind(tiny(num_labels=2)).config._attn_implementation for kind in HEADS] == ["sdpa"] * 3


@pytest.mark.parametrize("kind", HEADS)
def test_the_cache_argument(kind):
    names = set(inspect.signature(kind.forward).parameters)
    assert "cache" in names and "past_key_values" not in names


@pytest.mark.parametrize("kind", HEADS)
def test_loss_arguments_pass_through(kind):
    """The Trainer hands num_items_in_batch to models whose forward takes keywords: the peer's loss depends on it."""
    assert inspect.Parameter.VAR_KEYWORD in {
        p.kind for p in inspect.signature(kind.forward).parameters.values()
    }
    assert (
        "num_items_in_batch"
        in inspect.signature(transformers.loss.loss_utils.ForCausalLMLoss).parameters
    )


@pytest.mark.parametrize(
    "ids", [[[5, 6, 7, 9], [5, 6, 9, 9]], [[5, 6, 7, 9], [9, 9, 5, 6]]], ids=["right", "left"]
)
def test_a_classifier_pools_the_last_token_that_is_not_padding(ids):
    model = GPTJForSequenceClassification(tiny(num_labels=3, pad_token_id=9)).eval()
    ids = torch.tensor(ids)
    alone = [model(torch.tensor([[5, 6, 7]])).logits, model(torch.tensor([[5, 6]])).logits]
    found = model(input_ids=ids, attention_mask=(ids != 9).long()).logits
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_classifier_without_padding_refuses_batches():
    model = GPTJForSequenceClassification(tiny(num_labels=3))
    with pytest.raises(ValueError, match="padding"):
        model(torch.tensor([[5, 6], [5, 6]]))


def test_generation_is_greedy_unless_told():
    config = GenerationConfig()
    assert (
        not config.do_sample
        and config.num_beams in (None, 1)
        and config.repetition_penalty in (None, 1.0)
    )


def test_the_head_has_a_bias_and_is_not_tied():
    model = GPTJForCausalLM(tiny())
    assert (
        model.lm_head.bias is not None and model.lm_head.weight is not model.transformer.wte.weight
    )


def test_the_tokenizer_takes_vocab_and_merges():
    """Under the names that transformers 4 had it is silently empty."""
    import json

    vocab = json.loads((asset("tokenizer") / "encoder.json").read_text(encoding="utf-8"))
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=[("h", "e")])
    assert len(tokenizer) == 50257 and tokenizer.pad_token is None


def test_peft_defaults():
    config = peft.LoraConfig(task_type="CAUSAL_LM")
    assert (config.init_lora_weights, config.use_rslora, config.use_dora, config.bias) == (
        True,
        False,
        False,
        "none",
    )
    assert peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gptj"] == [
        "q_proj",
        "v_proj",
    ]
    assert (
        inspect.signature(peft.get_peft_model).parameters["autocast_adapter_dtype"].default is True
    )
    assert (
        inspect.signature(peft.PeftModel.from_pretrained)
        .parameters["autocast_adapter_dtype"]
        .default
        is True
    )


def test_deepspeed_would_swap_in_its_own_cpu_adam():
    """Why ds_config says zero_force_ds_cpu_optimizer=false: the optimizer is torch's, whose states we name and save."""
    from deepspeed.runtime import config

    assert config.ZERO_FORCE_DS_CPU_OPTIMIZER == "zero_force_ds_cpu_optimizer"
    assert config.ZERO_FORCE_DS_CPU_OPTIMIZER_DEFAULT is True


def test_a_cpu_that_emulates_bf16_is_recognised():
    """oneDNN held down to AVX2, as on an older processor: asked in a process of its own."""
    code = "import torch; from finetune.training.mfu import emulates_bf16; print(emulates_bf16(torch.device('cpu')))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)},
    )
    assert told.stdout.split() == ["True"]
