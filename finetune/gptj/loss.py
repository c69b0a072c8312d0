"""Cross-entropy from hidden states without ever holding the logits.

GPT-J's head has 50400 outputs and a bias. Its logits for one 2048-token sequence are 206 MB in bf16
and 413 MB in fp32, several times over. Here logits turn in place into their own gradient, chunk by
chunk, and the gradients of hidden states, weight and bias are made from that, so that peak extra
memory is one chunk whatever the batch. Only scored rows are projected. Sums are fp32. Nothing is
averaged: the caller divides by the global count of scored tokens.

A trained head's gradient over several chunks must be summed in fp32, which takes 4 bytes for each
weight. Rows whose logits take no more than that are one chunk: their product is made once, with no
sum to hold. `planning.activations` predicts this memory and holds the chunk sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.columns import IGNORE
from finetune.gptj.kernels import softmax_gradient_
from finetune.planning.activations import (
    LOSS_CHUNK,
    SOFTMAX_ROWS,
    TRAINED_CHUNK,
    WEIGHT_ROWS,
    one_chunk,
)


class LMHead(nn.Linear):
    """`lm_head` that returns logits, or with labels the loss, inside its own forward.

    Being inside the module's forward matters under ZeRO-3: that is where its weight is gathered.
    """

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        per_token: bool = False,
        extra: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Return logits (.., V), or with labels (N,) the fp32 sum of losses.

        With `per_token` the result is the fp32 losses (N,), 0 where the label is IGNORE.

        Args:
            extra: (.., k), added to the logits of `columns` (k,).
        """
        if labels is not None:
            loss = token_losses if per_token else chunked_cross_entropy
            return loss(hidden, self.weight, self.bias, labels, extra, columns)
        logits = F.linear(hidden, self.weight, self.bias)
        return logits if extra is None else logits.index_add(-1, columns, extra)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    extra: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Sum over scored tokens of -log softmax(hidden @ weight.T + bias)[label], fp32 scalar.

    Args:
        hidden: (N, D).
        weight: (V, D); its gradient is accumulated in fp32 and skipped when frozen.
        bias: (V,) or None.
        labels: (N,) int64, already aligned with `hidden`; IGNORE rows cost nothing.
        extra: (N, k), added to the logits of `columns` (k,).
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, extra, columns)


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    extra: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Return the loss of every token, fp32 (N,), 0 where the label is IGNORE.

    The arguments are those of `chunked_cross_entropy`. How much each loss counts is only known in
    the backward, which computes the logits once more.
    """
    return _TokenLosses.apply(hidden, weight, bias, labels, extra, columns)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, extra, columns) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden, weight, bias, labels, extra, columns)
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        step = SOFTMAX_ROWS[hidden.device.type]
        scored = (labels != IGNORE).nonzero()[:, 0]
        chunks = scored.split(LOSS_CHUNK) if len(scored) else ()
        # Allocated once: fresh logits would be made while the chunk before still holds its own.
        buffer = hidden.new_empty(max(map(len, chunks), default=0), weight.shape[0])
        for rows in chunks:
            logits = buffer[: len(rows)]
            if bias is None:
                torch.mm(hidden[rows], weight.T, out=logits)
            else:
                torch.addmm(bias, hidden[rows], weight.T, out=logits)
            if extra is not None:
                logits.index_add_(1, columns, extra[rows])
            for part, index in zip(logits.split(step), rows.split(step), strict=True):
                losses[index] = F.cross_entropy(part.float(), labels[index], reduction="none")
        return losses

    @staticmethod
    def backward(ctx, d_losses: Tensor):  # type: ignore[override]
        hidden, weight, bias, labels, extra, columns = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        found = _gradients(hidden, weight, bias, labels, extra, columns, wanted, d_losses)
        d_weight = None if found.weight is None else found.weight.to(weight.dtype)
        if found.last is not None:
            d_weight = _weight_gradient(*found.last, hidden.new_ones((), dtype=torch.float32))
        d_bias = None if found.bias is None else found.bias.to(bias.dtype)
        return found.hidden, d_weight, d_bias, None, found.extra, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute the gradients of the sum in the forward and scale them in the backward.

    If all rows form one chunk, the backward also computes the weight's gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, extra, columns) -> Tensor:  # type: ignore[override]
        wanted = ctx.needs_input_grad[:3]
        found = _gradients(hidden, weight, bias, labels, extra, columns, wanted)
        ctx.save_for_backward(*found[1:5], *(found.last or (None, None)))
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return found.loss

    @staticmethod
    def backward(ctx, scale: Tensor):  # type: ignore[override]
        d_hidden, d_weight, d_bias, d_extra, d_logits, part = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if d_logits is not None:
            d_weight = _weight_gradient(d_logits, part, scale)
        elif d_weight is not None:
            d_weight = d_weight.mul_(scale).to(weight_dtype)
        return (
            None if d_hidden is None else d_hidden.mul_(scale),
            d_weight,
            None if d_bias is None else d_bias.mul_(scale).to(bias_dtype),
            None,
            None if d_extra is None else d_extra.mul_(scale),
            None,
        )


class _Gradients(NamedTuple):
    loss: Tensor
    """Sum over the scored tokens, fp32."""
    hidden: Tensor | None
    weight: Tensor | None
    """fp32; None where `last` stands for it."""
    bias: Tensor | None
    """fp32."""
    extra: Tensor | None
    last: tuple[Tensor, Tensor] | None
    """Gradient of the logits, and hidden states, of all scored rows, if they form one chunk."""


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    extra: Tensor | None,
    columns: Tensor | None,
    wanted: tuple[bool, bool, bool],
    scales: Tensor | None = None,
) -> _Gradients:
    """Compute the gradients of the sum of the losses, chunk by chunk.

    Args:
        wanted: whether those of hidden, weight and bias are needed.
        scales: (N,) fp32, the factor of each token's loss in the sum; None: all 1.
    """
    want_hidden, want_weight, want_bias = wanted
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    scored = (labels != IGNORE).nonzero()[:, 0]
    whole = (
        want_weight
        and len(scored) > 0
        and one_chunk(len(scored), weight.shape[1], weight.element_size())
    )
    d_hidden = torch.zeros_like(hidden) if want_hidden else None
    d_weight = None
    if want_weight and not whole:
        d_weight = torch.empty_like(weight, dtype=torch.float32)
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
    d_extra = None if extra is None else torch.zeros_like(extra)
    last = None
    size = len(scored) if whole else TRAINED_CHUNK if want_weight else LOSS_CHUNK
    chunks = scored.split(size) if len(scored) else ()
    # Allocated once: between fresh ones a CPU's heap would get holes.
    buffer = hidden.new_empty(max(map(len, chunks), default=0), weight.shape[0])
    for i, rows in enumerate(chunks):
        part, logits = hidden[rows], buffer[: len(rows)]
        torch.mm(part, weight.T, out=logits)
        if extra is not None:
            logits.index_add_(1, columns, extra[rows])
        factors = None if scales is None else scales[rows, None]
        total += softmax_gradient_(logits, bias, labels[rows], d_bias, factors)
        if d_hidden is not None:
            d_hidden[rows] = logits @ weight
        if d_extra is not None:
            d_extra[rows] = logits[:, columns]
        if d_weight is not None:
            _add_weight_gradient(d_weight, logits, part, first=i == 0)
        last = (logits, part) if whole else None
    if d_weight is not None and not chunks:
        d_weight.zero_()
    return _Gradients(total, d_hidden, d_weight, d_bias, d_extra, last)


def _weight_gradient(grad: Tensor, hidden: Tensor, scale: Tensor) -> Tensor:
    """Return grad.T @ hidden * scale, (V, D) in the dtype of `grad`, rounded once."""
    if not grad.is_cuda:
        return torch.addmm(grad.new_zeros(()), grad.T, hidden, beta=0, alpha=float(scale))
    if grad.dtype == torch.float32:
        return torch.mm(grad.T, hidden).mul_(scale)
    total = grad.new_empty(grad.shape[1], hidden.shape[1])
    for rows, columns in zip(total.split(WEIGHT_ROWS), grad.split(WEIGHT_ROWS, 1), strict=True):
        rows.copy_(torch.mm(columns.T, hidden, out_dtype=torch.float32).mul_(scale))
    return total


def _add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """Add grad.T @ hidden to `total` (V, D) in fp32, some rows of the head at a time.

    The first time there is nothing to add to. CUDA adds half-precision products to fp32 without a
    rounding between.
    """
    for rows, columns in zip(total.split(WEIGHT_ROWS), grad.split(WEIGHT_ROWS, 1), strict=True):
        if grad.dtype == torch.float32:
            torch.addmm(rows, columns.T, hidden, beta=0 if first else 1, out=rows)
            continue
        half_on_gpu = {"out_dtype": torch.float32} if grad.is_cuda else {}
        product = torch.mm(columns.T, hidden, **half_on_gpu)
        rows.copy_(product) if first else rows.add_(product)
