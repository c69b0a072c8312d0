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

LOSS_CHUNK = 512
"""Rows (tokens) whose logits exist at once."""
SOFTMAX_ROWS = {"cpu": 16, "cuda": 256}
"""Rows whose fp32 probabilities exist at once; on a CPU they stay in its cache."""
WEIGHT_ROWS = 6400
"""Rows of the head whose gradient from one chunk exists at once, before it is added to the fp32 sum."""


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
    step = SOFTMAX_ROWS.get(hidden.device.type, 256)
    for rows in _scored_rows(labels):
        logits = F.linear(hidden[rows], weight, bias)
        for part, index in zip(logits.split(step), rows.split(step), strict=True):
            losses[index] = F.cross_entropy(part.float(), labels[index], reduction="none")
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
        chunks = _scored_rows(labels)
        # Allocated once: fresh ones would be paged in anew for every chunk.
        buffer = hidden.new_empty(max(map(len, chunks), default=0), weight.shape[0])
        for rows in chunks:
            part, logits = hidden[rows], buffer[: len(rows)]
            torch.mm(part, weight.T, out=logits)
            total += _logits_to_gradient(logits, bias, labels[rows, None], d_bias)
            if d_hidden is not None:
                d_hidden[rows] = logits @ weight
            if d_weight is not None:
                _add_weight_gradient(d_weight, logits, part)
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


def _logits_to_gradient(logits: Tensor, bias: Tensor | None, targets: Tensor, d_bias: Tensor | None) -> Tensor:
    """Overwrite logits (C, V), still without bias, by softmax - onehot(targets (C, 1)); returns the sum of losses.

    A few rows at a time in fp32; the bias is added there too, where it costs little.
    """
    step = SOFTMAX_ROWS.get(logits.device.type, 256)
    scratch = logits.new_empty(min(step, len(logits)), logits.shape[1], dtype=torch.float32)
    total = scratch.new_zeros(())
    fp32_bias, ones = None if bias is None else bias.float(), scratch.new_ones(len(scratch))
    for part, target in zip(logits.split(step), targets.split(step), strict=True):
        fp32 = scratch[: len(part)].copy_(part)
        if fp32_bias is not None:
            fp32 += fp32_bias
        total += _to_probabilities(fp32, target)
        fp32.scatter_add_(1, target, fp32.new_full(target.shape, -1.0))
        if d_bias is not None:
            d_bias.addmv_(fp32.T, ones[: len(part)])
        part.copy_(fp32)
    return total


def _to_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Overwrite fp32 logits by their softmax; returns the sum of -log softmax at `targets`."""
    if logits.is_cuda:
        torch.log_softmax(logits, -1, out=logits)
        loss = -logits.gather(1, targets).sum()
        logits.exp_()
        return loss
    # Half the exponentials: the logarithm of the sum follows from the largest logit and its probability.
    chosen = logits.gather(1, targets)
    top = logits.amax(1, keepdim=True)
    torch.softmax(logits, -1, out=logits)
    log_sum = top - logits.amax(1, keepdim=True).log()
    return (log_sum - chosen).sum()


def _add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total (V, D) += grad.T @ hidden in fp32, some rows of the head at a time.

    CUDA adds half-precision products to fp32 without a rounding between.
    """
    for rows, columns in zip(total.split(WEIGHT_ROWS), grad.split(WEIGHT_ROWS, 1), strict=True):
        if grad.dtype == torch.float32:
            rows.addmm_(columns.T, hidden)
        elif grad.is_cuda:
            rows += torch.mm(columns.T, hidden, out_dtype=torch.float32)
        else:
            rows += columns.T @ hidden
