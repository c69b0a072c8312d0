"""The loss without logits against torch's cross-entropy: value, gradients, frozen weights, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finetune.data.columns import IGNORE
from finetune.gptj.loss import TRAINED_CHUNK, LMHead, chunked_cross_entropy, token_losses

ROWS, WIDTH, VOCAB = 2 * TRAINED_CHUNK + 37, 16, 300
WIDTHS = [WIDTH, ROWS]
"""So narrow that the head's gradient is summed over chunks; so wide that all rows are one."""


def tensors(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, width, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCAB, width) * (WIDTH / width) ** 0.5).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[torch.rand(ROWS) < 0.3] = IGNORE
    return hidden, weight, bias, labels


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_value_and_gradients(scale, width):
    hidden, weight, bias, labels = tensors(width=width)
    wanted = (
        F.cross_entropy(
            F.linear(hidden, weight, bias), labels, ignore_index=IGNORE, reduction="sum"
        )
        * scale
    )
    gradients = torch.autograd.grad(wanted, (hidden, weight, bias))
    loss = chunked_cross_entropy(hidden, weight, bias, labels) * scale
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight, bias)), gradients, strict=True
    ):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("width", WIDTHS)
def test_bf16_gradient_is_as_close_to_the_truth_as_plain_torch(width):
    """Plain torch rounds the whole product once; on CPU ours rounds each chunk's product and adds them in fp32."""
    hidden, weight, bias, labels = tensors(torch.bfloat16, width)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    truth = torch.autograd.grad(
        F.cross_entropy(F.linear(*exact), labels, ignore_index=IGNORE, reduction="sum"), exact
    )
    plain = torch.autograd.grad(
        F.cross_entropy(
            F.linear(hidden, weight, bias).float(), labels, ignore_index=IGNORE, reduction="sum"
        ),
        (hidden, weight, bias),
    )
    ours = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight, bias, labels), (hidden, weight, bias)
    )
    for mine, theirs, true in zip(ours, plain, truth, strict=True):
        assert (mine.double() - true).norm() <= 1.25 * (theirs.double() - true).norm()


def test_frozen_head_costs_no_gradient():
    hidden, weight, bias, labels = tensors()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    chunked_cross_entropy(hidden, weight, bias, labels).backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("target", [0, 1])
def test_a_target_of_almost_no_probability(target):
    """Beyond the smallest number of fp32 its probability is 0; the loss is not infinite."""
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [100.0], [300.0]])
    labels = torch.full((3,), target)
    wanted = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, None, labels), wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_scored_is_zero_with_zero_gradient(width):
    hidden, weight, bias, labels = tensors(width=width)
    loss = chunked_cross_entropy(hidden, weight, bias, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_token_losses_add_up():
    hidden, weight, bias, labels = tensors()
    losses = token_losses(hidden, weight, bias, labels)
    wanted = F.cross_entropy(
        F.linear(hidden, weight, bias), labels, ignore_index=IGNORE, reduction="none"
    )
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_token_losses_that_count_differently(width):
    """As preference losses weigh the tokens of each document."""
    hidden, weight, bias, labels = tensors(width=width)
    factors = torch.randn(ROWS)
    factors[:7] = 0
    wanted = F.cross_entropy(
        F.linear(hidden, weight, bias), labels, ignore_index=IGNORE, reduction="none"
    )
    theirs = torch.autograd.grad((wanted * factors).sum(), (hidden, weight, bias))
    losses = token_losses(hidden, weight, bias, labels)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad((losses * factors).sum(), (hidden, weight, bias))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()

    frozen = token_losses(hidden, weight.detach(), bias.detach(), labels)
    (alone,) = torch.autograd.grad((frozen * factors).sum(), hidden)
    torch.testing.assert_close(alone, ours[0])


def test_head_returns_logits_without_labels():
    head = LMHead(WIDTH, VOCAB)
    hidden = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(head(hidden), F.linear(hidden, head.weight, head.bias))
