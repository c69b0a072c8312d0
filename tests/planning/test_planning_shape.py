"""ModelShape against transformers and peft: names, shapes, order, counts; and FLOPs against a counter."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import peft
import pytest
import torch
import transformers
from plan_cases import TINY, write_model
from torch.utils.flop_counter import FlopCounterMode

from finetune.config import (
    AdapterConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from finetune.errors import UserError
from finetune.planning.shape import ModelShape, load_shape, numel

MODELS = {
    "lm": transformers.GPTJForCausalLM,
    "classify": transformers.GPTJForSequenceClassification,
    "qa": transformers.GPTJForQuestionAnswering,
}
TASKS = {"lm": "CAUSAL_LM", "classify": "SEQ_CLS", "qa": "QUESTION_ANS"}
KINDS = [
    LoraConfig(rank=3),
    LoraConfig(rank=3, layers="1"),
    LoraConfig(rank=3, modules_to_save=["ln_f", "wte"]),
    LoraConfig(rank=2, targets="all-linear", dora=True),
    LoraConfig(rank=4, targets=["fc_out", "q_proj"]),
    Ia3Config(),
    PromptConfig(virtual_tokens=5),
    PrefixConfig(virtual_tokens=5),
]


def reference(head: str, labels: int) -> torch.nn.Module:
    with torch.device("meta"):
        return MODELS[head](transformers.GPTJConfig(**{**TINY, "num_labels": labels}))


def wrapped(head: str, adapter: AdapterConfig) -> torch.nn.Module:
    from finetune.gptj.adapters import peft_config

    model = MODELS[head](transformers.GPTJConfig(**{**TINY, "num_labels": 2}))
    return peft.get_peft_model(model, peft_config(adapter, head))


@pytest.mark.parametrize("head", MODELS)
def test_tensors_equal_transformers(head: str) -> None:
    shape = ModelShape.from_config(TINY, head, 2 if head == "qa" else 5)
    wanted = [
        (name, tuple(p.shape)) for name, p in reference(head, shape.num_labels).named_parameters()
    ]
    assert list(shape.tensors()) == wanted
    assert shape.parameters() == sum(prod(size) for _, size in wanted)


@pytest.mark.parametrize("adapter", KINDS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("head", MODELS)
def test_adapter_tensors_equal_peft(head: str, adapter: AdapterConfig) -> None:
    shape = ModelShape.from_config(TINY, head)
    model = wrapped(head, adapter)
    trained = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    assert list(shape.trainable_tensors(adapter)) == trained
    assert shape.trainable(adapter) == sum(prod(size) for _, size in trained)
    assert shape.total(adapter) == sum(p.numel() for p in model.parameters())


def test_gpt_j_6b_counts() -> None:
    shape = load_shape("asset:gptj_6b")
    assert shape.parameters() == 6_050_882_784
    assert numel(shape.block_tensors()) == 201_355_264
    assert shape.matmul_parameters() == 5_843_582_976
    assert shape.trainable(FullConfig()) == shape.parameters()
    assert shape.trainable(LoraConfig(rank=8, targets="q_proj,v_proj")) == 28 * 2 * 2 * 8 * 4096


@pytest.mark.parametrize("name", ["EleutherAI/gpt-j-6b", "eleutherai/GPT-J-6B", "asset:gptj_6b"])
def test_published_model_is_known_by_name(name: str) -> None:
    assert load_shape(name).parameters() == 6_050_882_784


def test_flops_agree_with_a_counter() -> None:
    """Matrix products and attention of one dense sequence; the counter sees all scores, not the causal half."""
    length = 32
    shape = ModelShape.from_config(TINY)
    model = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(**TINY, attn_implementation="eager")
    )
    ids = torch.arange(length)[None]
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(ids, use_cache=False).logits.sum()
    square = 2 * length * shape.n_embd * shape.n_layer
    flops = shape.flops_per_token(length, FullConfig(), checkpointing=True)
    assert counter.get_total_flops() == length * (flops.forward + square)
    with counter:
        loss.backward()
    assert counter.get_total_flops() == pytest.approx(
        length * (flops.backward + 2 * square), rel=1e-6
    )
    assert flops.recompute == flops.forward - 2 * numel(shape.head_tensors())
    frozen = shape.flops_per_token(length, LoraConfig())
    assert frozen.backward < flops.backward and frozen.recompute == 0


@pytest.mark.parametrize(
    "broken, says", [({"model_type": "gpt2"}, "gpt2"), ({"model_type": "gptj"}, "n_embd")]
)
def test_other_configs_are_refused(tmp_path: Path, broken: dict, says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=says):
        load_shape(str(tmp_path))


def test_missing_and_corrupt_configs_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_shape(str(tmp_path))
    with pytest.raises(UserError, match="neither a directory nor"):
        load_shape("nobody/no-such-model")
    with pytest.raises(UserError, match="gptj_tiny"):
        load_shape("asset:gptj_huge")


def test_unknown_adapter_target_is_refused() -> None:
    with pytest.raises(UserError, match="w_proj"):
        ModelShape.from_config(TINY).trainable(LoraConfig(targets="q_proj,w_proj"))


def test_shape_of_a_directory(tmp_path: Path) -> None:
    assert load_shape(str(write_model(tmp_path))) == ModelShape.from_config(TINY)


def test_no_torch_is_imported() -> None:
    heavy = "('torch', 'deepspeed', 'transformers', 'peft', 'matplotlib')"
    code = f"import sys, finetune.planning.choose, finetune.planning.show; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert ran.stdout.strip() == "[]", ran.stderr
