"""Cross-entropy from hidden states without ever holding the logits.

GPT-J's head has 50400 outputs and a bias. Its logits for one 2048-token sequence are 206 MB in bf16 and 413 MB
in fp32, several times over. Here the head and its loss run over chunks of rows; gradients of hidden states, weight
and bias are made in the same pass, so that peak extra memory is one chunk whatever the batch. Only scored rows are
projected. Sums are fp32. Does not average: the caller divides by the global count of scored tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.constants import IGNORE

LOSS_CHUNK = 256
"""Rows (tokens) per chunk."""


class LMHead(nn.Linear):
    """`lm_head` that returns logits, or with labels the loss, inside its own forward.

    Being inside the module's forward matters under ZeRO-3: that is where its weight is gathered.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, per_token: bool = False) -> Tensor:
        """Logits (.., V); with labels (N,): the fp32 sum of losses; per_token: fp32 losses (N,), 0 where ignored."""
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        if per_token:
            return token_losses(hidden, self.weight, self.bias, labels)
        return chunked_cross_entropy(hidden, self.weight, self.bias, labels)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum over scored tokens of -log softmax(hidden @ weight.T + bias)[label], fp32 scalar.

    Args:
        hidden: (N, D).
        weight: (V, D); its gradient is accumulated in fp32 and skipped when frozen.
        bias: (V,) or None.
        labels: (N,) int64, already aligned with `hidden`; IGNORE rows cost nothing.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Loss of every token, fp32 (N,), 0 where the label is IGNORE; for perplexity by subset."""
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    for rows in _scored_rows(labels):
        logprobs = F.linear(hidden[rows], weight, bias).log_softmax(-1, dtype=torch.float32)
        losses[rows] = -logprobs.gather(1, labels[rows, None])[:, 0]
    return losses


def _scored_rows(labels: Tensor) -> tuple[Tensor, ...]:
    rows = (labels != IGNORE).nonzero()[:, 0]
    return rows.split(LOSS_CHUNK) if rows.numel() else ()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward makes the gradients of the sum; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:  # type: ignore[override]
        want_hidden, want_weight, want_bias, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        scratch = _Scratch(weight, hidden.device)
        for rows in _scored_rows(labels):
            part, target = hidden[rows], labels[rows, None]
            logits, logprobs = scratch.forward(part, weight, bias)
            total -= logprobs.gather(1, target).sum()
            if not (want_hidden or want_weight or want_bias):
                continue
            grad = logprobs.exp_()
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            if d_bias is not None:
                d_bias += grad.sum(0)
            grad = grad if logits.dtype == torch.float32 else logits.copy_(grad)
            if d_hidden is not None:
                d_hidden[rows] = grad @ weight
            if d_weight is not None:
                _accumulate(d_weight, grad, part)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):  # type: ignore[override]
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden.mul_(scale),
            None if d_weight is None else d_weight.mul_(scale).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(scale).to(bias_dtype),
            None,
        )


class _Scratch:
    """The two (chunk, V) buffers of the loop, allocated once: fresh ones would be paged in anew for every chunk."""

    def __init__(self, weight: Tensor, device: torch.device):
        self.weight, self.device = weight, device
        self.logits: Tensor | None = None
        self.logprobs: Tensor | None = None

    def forward(self, part: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits in the model's precision and their fp32 log-softmax."""
        if self.logits is None or self.logprobs is None:
            shape = (part.shape[0], weight.shape[0])
            self.logits = torch.empty(shape, dtype=part.dtype, device=self.device)
            self.logprobs = torch.empty(shape, dtype=torch.float32, device=self.device)
        logits, logprobs = self.logits[: part.shape[0]], self.logprobs[: part.shape[0]]
        if bias is None:
            torch.mm(part, weight.T, out=logits)
        else:
            torch.addmm(bias, part, weight.T, out=logits)
        torch.log_softmax(logits, -1, dtype=torch.float32, out=logprobs)
        return logits, logprobs


def _accumulate(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad.T @ hidden, in fp32; CUDA adds half-precision products to fp32 without a rounding between."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.T, hidden)
    elif grad.is_cuda:
        total += torch.mm(grad.T, hidden, out_dtype=torch.float32)
    else:
        total += grad.T @ hidden
