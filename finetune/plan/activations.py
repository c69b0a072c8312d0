"""What a forward keeps for its backward, and what both need while they run: estimates from our own GPT-J's code.

Batches are flat (no padding), attention is linear in memory, the GELU is the tanh variant that keeps its input alone,
and the loss never builds the logits of more than LOSS_CHUNK tokens. Per token and block, in elements (d = n_embd,
i = n_inner), a full fine-tune keeps
    x                  d    input of the layer norm (the residual stream)
    norm               d    its output: input of q, k, v and fc_in, one tensor for all four
    q, k, v            3d   rotated in place
    attention          d    output; with it the log-sum-exp, one fp32 per head
    fc_in              i    input of the GELU
    gelu               i    input of fc_out
and two fp32 statistics of the layer norm. A frozen linear module needs no input, so adapters drop `gelu` and, where
nothing trains on it, `norm`.
"""

from __future__ import annotations

from typing import NamedTuple

from finetune.config import FullConfig, Ia3Config, LoraConfig
from finetune.plan.job import Job
from finetune.shape import adapter_targets

LOSS_CHUNK = 1024
"""Tokens whose logits exist at once."""
LOGIT_BYTES = 4 + 4 + 2
"""Per logit: fp32 logits, fp32 probabilities that become their gradient, and the low precision copy of it."""


class Activations(NamedTuple):
    """Bytes of one rank."""

    kept: int
    """Alive from the end of the forward to the backward."""
    block: int
    """What one block keeps: rebuilt, one at a time, under checkpointing."""
    transient: int
    """Gradients and copies inside one block while its backward runs."""
    loss: int
    """Workspace of the loss, alive before the backward of the blocks begins."""


def activations(job: Job) -> Activations:
    element, d = job.work.element_bytes, job.shape.n_embd
    tokens = job.tokens
    block = tokens * (element * _block_elements(job) + _block_fp32(job) * 4)
    stream = element * tokens * d
    layers = stream if job.work.checkpointing else block
    ends = 2 * stream  # input of the last norm, and the gradient that the loss leaves for it
    kept = job.shape.n_layer * layers + ends
    return Activations(
        kept, block, element * tokens * (4 * d + 2 * job.shape.n_inner) + 4 * tokens * d, loss_bytes(job)
    )


def _block_elements(job: Job) -> int:
    """Elements that one block keeps per token."""
    d, inner, adapter = job.shape.n_embd, job.shape.n_inner, job.adapter
    if isinstance(adapter, FullConfig):
        return 6 * d + 2 * inner
    elements = 5 * d + inner  # x, q, k, v, attention output, input of the GELU
    if isinstance(adapter, LoraConfig):
        elements += _lora_elements(job, adapter)
    if isinstance(adapter, Ia3Config):  # each rescaled activation is kept as it was before
        elements += sum({"fc_out": inner, "fc_in": inner}.get(name, d) for name in adapter_targets(adapter))
    return elements


def _lora_elements(job: Job, adapter: LoraConfig) -> int:
    """Inputs of the adapters and their rank-sized middles; dropout and DoRA keep copies of their own."""
    d, inner, targets = job.shape.n_embd, job.shape.n_inner, adapter_targets(adapter)
    reads_norm = any(name in targets for name in ("q_proj", "k_proj", "v_proj", "fc_in"))
    elements = adapter.rank * len(targets) + d * reads_norm + inner * ("fc_out" in targets)
    for name in targets:
        out_features, in_features = job.shape.linear_shape(name)
        elements += in_features * (adapter.dropout > 0) + 2 * out_features * adapter.dora
    return elements


def _block_fp32(job: Job) -> int:
    """fp32 numbers that one block keeps per token: log-sum-exp per head, mean and deviation of the norm."""
    return job.shape.n_head + 2


def loss_bytes(job: Job) -> int:
    """Workspace of the head and its loss, including the fp32 sum of the head's weight gradient where it is trained."""
    if job.shape.head != "lm":
        return 4 * 3 * job.tokens * job.shape.num_labels
    rows, vocab = min(job.tokens, LOSS_CHUNK), job.shape.vocab_size
    weight_gradient = 4 * vocab * job.shape.n_embd if job.full else 0
    return rows * vocab * LOGIT_BYTES + rows * job.shape.n_embd * 4 + weight_gradient
