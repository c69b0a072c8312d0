"""Estimates of activation and workspace memory in the forward and backward pass of our GPT-J.

Batches are flat (no padding), attention is linear in memory, the GELU is the tanh variant that
keeps only its input, and the loss builds the logits of some tokens at a time (`loss_bytes`). Per
token and block, in elements (d = n_embd, i = n_inner), a full fine-tune keeps
    x                  d    input of the layer norm (the residual stream)
    norm               d    its output: input of q, k, v and fc_in, one tensor for all four
    q, k, v            3d   rotated in place
    attention          d    output; with it the log-sum-exp, one fp32 per head
    fc_in              i    input of the GELU
    gelu               i    input of fc_out
and two fp32 statistics of the layer norm. Selective checkpointing drops `gelu`, full checkpointing
all but `x`, and offload moves even that to the host. A frozen linear module does not keep its
input, so adapters drop `gelu` and, if no trained weight reads it, `norm`.
"""

from __future__ import annotations

from typing import NamedTuple

from finetune.config import FullConfig, Ia3Config, LoraConfig
from finetune.planning.job import Job
from finetune.planning.shape import adapter_targets

LOSS_CHUNK = 512
"""Tokens whose logits exist at once (gptj/loss.py)."""
SOFTMAX_ROWS = {True: 256, False: 16}
"""Tokens whose fp32 probabilities exist at once, on a GPU and on a CPU (gptj/loss.py)."""
WEIGHT_ROWS = 6400
"""Rows of the head's weight gradient that one chunk makes at once (gptj/loss.py)."""


class Activations(NamedTuple):
    """Activation memory of one rank, in bytes."""

    kept: int
    """Alive from the end of the forward to the backward."""
    block: int
    """What one block keeps: rebuilt, one at a time, under checkpointing."""
    transient: int
    """Gradients inside one block while its backward runs, beyond what it keeps."""
    loss: int
    """Workspace of the head and its loss, gone before the backward of the blocks begins."""
    head_gradient: int
    """Gradient of a trained head's weight, the first one that the backward makes."""
    evaluation: int
    """A forward without gradients: one block's tensors, nothing kept."""


def activations(job: Job) -> Activations:
    element, d, inner = job.work.element_bytes, job.shape.n_embd, job.shape.n_inner
    stream = element * job.tokens * d
    block = job.tokens * (element * _block_elements(job) + 4 * _block_fp32(job))
    each = {True: stream, "offload": 0 if job.on_gpu else stream}.get(job.work.checkpointing, block)
    layers = job.shape.n_layer * each - _unneeded(job)
    # Input of the last norm, gradient of the loss with respect to its output, and the rotary table.
    ends = 2 * stream + 4 * job.tokens * job.shape.rotary_dim
    transient = element * job.tokens * (inner + _made_again(job) + (2 if job.full else 3) * d)
    head_gradient = element * job.shape.vocab_size * d if job.full and job.shape.head == "lm" else 0
    # Evaluation: input, norm and attention output of a block, and the MLP's two wide tensors;
    # logits in chunks.
    chunk = _logits_bytes(job, LOSS_CHUNK) if job.eval_tokens else 0
    evaluation = element * job.eval_tokens * (3 * d + 2 * inner) + chunk
    return Activations(layers + ends, block, transient, loss_bytes(job), head_gradient, evaluation)


def _unneeded(job: Job) -> int:
    """Return the bytes that the first block need not keep: x and the GELU's input.

    Nothing before the first adapter needs a gradient.
    """
    if job.work.rebuilds or not isinstance(job.adapter, (LoraConfig, Ia3Config)):
        return 0
    gelu = 0 if "fc_in" in adapter_targets(job.adapter) else job.shape.n_inner
    return job.work.element_bytes * job.tokens * (job.shape.n_embd + gelu)


def _block_elements(job: Job) -> int:
    """Return the number of elements that one block keeps per token."""
    d, inner, adapter = job.shape.n_embd, job.shape.n_inner, job.adapter
    joined = d if job.work.packing and not job.on_gpu and _reads_attention(job) else 0
    if isinstance(adapter, FullConfig):
        return 6 * d + 2 * inner + joined - _made_again(job)
    elements = 5 * d + inner + joined  # x, q, k, v, attention output, input of the GELU
    if isinstance(adapter, LoraConfig):
        elements += _lora_elements(job, adapter) - _made_again(job)
    if isinstance(adapter, Ia3Config):  # each rescaled activation is kept as it was before
        elements += sum(
            {"fc_out": inner, "fc_in": inner}.get(name, d) for name in adapter_targets(adapter)
        )
    return elements


def _made_again(job: Job) -> int:
    """Return the elements per token that selective checkpointing recomputes.

    This is `fc_out`'s input, if the gradient of a weight needs it.
    """
    needed = job.full or (
        isinstance(job.adapter, LoraConfig) and "fc_out" in adapter_targets(job.adapter)
    )
    return job.shape.n_inner if needed and job.work.checkpointing == "selective" else 0


def offloaded_bytes(job: Job) -> int:
    """Return the page-locked host memory of one rank's block inputs, one tensor per block."""
    if job.work.checkpointing != "offload" or not job.on_gpu:
        return 0
    return job.shape.n_layer * power_of_two(job.work.element_bytes * job.tokens * job.shape.n_embd)


def power_of_two(size: int) -> int:
    """Round up to a power of two, the size in which page-locked blocks are allocated."""
    return 1 << (size - 1).bit_length() if size else 0


def _reads_attention(job: Job) -> bool:
    """Tell whether `out_proj` keeps its input.

    On a CPU, documents of different lengths are attended to one by one, and joining them takes one
    more tensor; the GPU kernel handles them all at once.
    """
    adapter = job.adapter
    return job.full or (
        isinstance(adapter, (LoraConfig, Ia3Config)) and "out_proj" in adapter_targets(adapter)
    )


def _lora_elements(job: Job, adapter: LoraConfig) -> int:
    """Return the elements per token of the adapters' inputs and their rank-sized intermediates.

    Dropout and DoRA keep copies of their own.
    """
    d, inner, targets = job.shape.n_embd, job.shape.n_inner, adapter_targets(adapter)
    reads_norm = any(name in targets for name in ("q_proj", "k_proj", "v_proj", "fc_in"))
    elements = adapter.rank * len(targets) + d * reads_norm + inner * ("fc_out" in targets)
    for name in targets:
        out_features, in_features = job.shape.linear_shape(name)
        elements += in_features * (adapter.dropout > 0) + 2 * out_features * adapter.dora
    return elements


def _block_fp32(job: Job) -> int:
    """Return the fp32 numbers that one block keeps per token.

    These are the log-sum-exp of each head, and mean and deviation of the layer norm.
    """
    return job.shape.n_head + 2


def loss_bytes(job: Job) -> int:
    """Return the workspace of the head and its loss, in bytes.

    It holds the logits of some tokens and the head's weight gradient. All tokens form one chunk
    while their logits take no more memory than an fp32 sum of that gradient would. Beyond that, the
    gradient is summed in fp32 over chunks, and each chunk's share is computed some rows at a time:
    in fp32 on a GPU; on a CPU in low precision and then, because the addition converts it, in fp32
    as well. fp32 models add in place.
    """
    element, d, vocab = job.work.element_bytes, job.shape.n_embd, job.shape.vocab_size
    hidden = element * job.tokens * d
    if job.shape.head != "lm":
        return hidden + 4 * job.tokens * job.shape.num_labels
    chunk = _logits_bytes(job, min(job.tokens, LOSS_CHUNK))
    if not job.full:
        return hidden + chunk
    gradient = element * vocab * d
    if job.tokens * element <= 4 * d:
        return hidden + _logits_bytes(job, job.tokens) + gradient
    share = 0 if element == 4 else 4 if job.on_gpu else element + 4
    rounded = 0 if element == 4 else gradient  # the sum in the model's precision, at the end
    return hidden + 4 * vocab * d + max(chunk + share * min(WEIGHT_ROWS, vocab) * d, rounded)


def _logits_bytes(job: Job, tokens: int) -> int:
    """Return the bytes for the logits of some tokens in the model's precision.

    The gradient overwrites the logits, some rows at a time in fp32.
    """
    return job.shape.vocab_size * (
        job.work.element_bytes * tokens + 4 * min(tokens, SOFTMAX_ROWS[job.on_gpu])
    )
