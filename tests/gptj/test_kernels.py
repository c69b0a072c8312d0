"""The Triton kernels, run on the CPU by Triton's interpreter, against plain PyTorch and Hugging Face's GPT-J.

Skipped without triton, which CUDA builds of torch bring: pip install triton. Triton must be imported with
TRITON_INTERPRET=1, so the tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM

from finetune.gptj import attention, kernels
from finetune.gptj.loss import chunked_cross_entropy
from finetune.gptj.model import CausalLM
from tests.conftest import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_by_the_interpreter")
EXACT = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Largest difference of results below 1 in size. The interpreter cuts fp32 off to bf16, where a GPU
rounds to the nearest, and plain PyTorch rounds once more."""


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_by_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def plain(monkeypatch):
    """Compute something without the kernels."""

    def compute(work):
        with monkeypatch.context() as patch:
            patch.delenv("TRITON_INTERPRET")
            assert kernels.triton_kernels(torch.empty(0)) is None
            return work()

    return compute


@interpreted
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("rotary", [4, 12, 16])
def test_rotation_and_its_gradient(dtype, rotary, plain):
    x, upstream = torch.rand(11, 4 * 16).to(dtype), torch.rand(11, 4, 16).to(dtype)
    table = attention.rope_tables(torch.arange(11) % 7, rotary)

    def both() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        rotated = attention.rotate(leaf * 1, table, heads=4)
        return rotated, torch.autograd.grad(rotated, leaf, upstream)[0]

    for mine, wanted in zip(both(), plain(both), strict=True):
        assert (mine - wanted).abs().max() <= 2 * EXACT[dtype]


@interpreted
def test_a_strided_tensor_is_rotated_in_place(plain):
    wide = torch.rand(5, 96)
    table = attention.rope_tables(torch.arange(5), 8)
    wanted = plain(lambda: kernels.rotate_(wide.clone()[:, 32:64], table, 2))
    kept = wide.clone()
    kernels.rotate_(wide[:, 32:64], table, 2)
    torch.testing.assert_close(wide[:, 32:64], wanted, rtol=0, atol=1e-6)
    assert torch.equal(wide[:, :32], kept[:, :32]) and torch.equal(wide[:, 64:], kept[:, 64:])


@interpreted
@pytest.mark.parametrize("dtype", EXACT)
def test_residual_sum_and_its_gradient(dtype):
    parts = [torch.rand(3, 5000, dtype=torch.float32).to(dtype).requires_grad_() for _ in range(3)]
    upstream = torch.rand(3, 5000).to(dtype)
    total = kernels.add3(*parts)
    wanted = sum(p.double() for p in parts)
    assert (total - wanted).abs().max() <= 4 * EXACT[dtype]
    for gradient in torch.autograd.grad(total, parts, upstream):
        assert torch.equal(gradient, upstream)


@interpreted
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("biased", [True, False])
def test_softmax_gradient(dtype, biased):
    logits = (torch.randn(7, 9000) * 3).to(dtype)
    bias = torch.randn(9000).to(dtype) if biased else None
    targets = torch.randint(0, 9000, (7,))
    exact = (logits.double() + (bias.double() if biased else 0)).requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="sum")
    wanted.backward()
    d_bias = torch.ones(9000) if biased else None
    loss = kernels.softmax_gradient_(logits, bias, targets, d_bias)
    assert abs(loss - wanted) <= 1e-6 * wanted
    assert (logits - exact.grad).abs().max() <= EXACT[dtype]
    if biased:
        assert (d_bias - 1 - exact.grad.sum(0)).abs().max() <= 7 * EXACT[dtype]


@interpreted
def test_a_target_that_is_all_but_impossible(plain):
    hidden = torch.zeros(2, 2)
    hidden[:, 0] = 1
    weight, labels = torch.zeros(5000, 2), torch.tensor([1, 0])
    weight[0, 0] = 300.0

    def loss() -> float:
        return float(chunked_cross_entropy(hidden, weight, None, labels))

    assert loss() == plain(loss) == pytest.approx(300.0)


@interpreted
def test_the_whole_model_is_hugging_face_s():
    config = GPTJConfig(
        n_embd=64,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        vocab_size=300,
        n_positions=64,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    reference, ours = GPTJForCausalLM(config), CausalLM(config)
    ours.load_state_dict(reference.state_dict())
    ids = torch.randint(0, 300, (2, 17))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    reference(input_ids=ids, labels=ids).loss.backward()
    loss = ours(ids, labels=labels.reshape(1, -1)) / 32
    loss.backward()
    assert kernels.triton_kernels(ids) is not None
    for (name, mine), wanted in zip(ours.named_parameters(), reference.parameters(), strict=True):
        scale = wanted.grad.abs().max()
        assert (mine.grad - wanted.grad).abs().max() <= 1e-4 * scale + 1e-7, name
