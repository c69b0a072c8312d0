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
"""Rows (tokens) whose logits exist at once where the head is frozen."""
TRAINED_CHUNK = 1024
"""The same where the head is trained, if one chunk is not enough; see `one_chunk`. Of 256 to 2048
rows it is the fastest on a CPU but for all rows at once, 8 to 10% before 512 (bench/loss_chunk.py)."""
SOFTMAX_ROWS = {"cpu": 16, "cuda": 256}
"""Rows whose fp32 probabilities exist at once; on a CPU they stay in its cache."""
WEIGHT_ROWS = 6400
"""Rows of the head whose gradient from one chunk exists at once, before the fp32 sum takes it."""


class Activations(NamedTuple):
    """Activation memory of one rank, in bytes."""

    kept: int
    """Alive from the end of the forward to the backward."""
    block: int
    """Tensors that one block keeps: rebuilt, one at a time, under checkpointing."""
    transient: int
    """Gradients inside one block while its backward runs, beyond what it keeps."""
    loss: int
    """Workspace of the head and its loss, gone before the backward of the blocks begins."""
    head_gradient: int
    """Gradient of a trained head's weight, the first one that the backward makes."""
    evaluation: int
    """A forward without gradients: one block's tensors, nothing kept."""


def activations(job: Job) -> Activations:
    """Return the estimate for one micro-step of `job`."""
    element, d, inner = job.work.element_bytes, job.shape.n_embd, job.shape.n_inner
    targets = (
        adapter_targets(job.adapter) if isinstance(job.adapter, (LoraConfig, Ia3Config)) else []
    )
    stream = element * job.tokens * d
    # Selective checkpointing recomputes fc_out's input, where the gradient of a weight needs it.
    needs_gelu = job.full or (isinstance(job.adapter, LoraConfig) and "fc_out" in targets)
    rebuilt = inner if needs_gelu and job.work.checkpointing == "selective" else 0
    # In fp32: the log-sum-exp of each head, and mean and deviation of the layer norm.
    elements = _block_elements(job, targets) - rebuilt
    block = job.tokens * (element * elements + 4 * (job.shape.n_head + 2))

    kept = block
    if job.work.checkpointing is True:
        kept = stream
    elif job.work.checkpointing == "offload":
        kept = 0 if job.on_gpu else stream
    layers = job.shape.n_layer * kept
    trains_wte = "wte" in getattr(job.adapter, "modules_to_save", ())
    if targets and not job.work.rebuilds and not trains_wte:
        # Nothing before the first adapter needs a gradient: the first block keeps neither x nor,
        # unless it is adapted, the GELU's input.
        layers -= element * job.tokens * (d + (0 if "fc_in" in targets else inner))
    # Input of the last norm, gradient of the loss with respect to its output, and the rotary table.
    ends = 2 * stream + 4 * job.tokens * job.shape.rotary_dim

    # The gradient of the GELU's output is new memory, unless LoRA on fc_out frees that output then.
    lora = isinstance(job.adapter, LoraConfig) and not job.adapter.dora
    freed = inner if lora and "fc_out" in targets else 0
    transient = element * job.tokens * (inner - freed + rebuilt + (2 if job.full else 3) * d)
    head_gradient = element * job.shape.vocab_size * d if job.trains_lm_head else 0
    # Evaluation: input, norm and attention output of a block, and the MLP's two wide tensors;
    # logits in chunks.
    chunk = _logits_bytes(job, LOSS_CHUNK) if job.eval_tokens else 0
    evaluation = element * job.eval_tokens * (3 * d + 2 * inner) + chunk
    return Activations(layers + ends, block, transient, loss_bytes(job), head_gradient, evaluation)


def _block_elements(job: Job, targets: list[str]) -> int:
    """Return the elements that one block keeps per token without checkpointing.

    Args:
        targets: linear modules with an adapter of their own.
    """
    d, inner, adapter = job.shape.n_embd, job.shape.n_inner, job.adapter
    # On a CPU, documents of different lengths are attended to one by one, and if `out_proj` keeps
    # its input, joining them takes one more tensor; the GPU kernel handles them all at once.
    reads_attention = job.full or "out_proj" in targets
    joined = d if job.work.packing and not job.on_gpu and reads_attention else 0
    if isinstance(adapter, FullConfig):
        return 6 * d + 2 * inner + joined
    elements = 5 * d + inner + joined  # x, q, k, v, attention output, input of the GELU
    if isinstance(adapter, LoraConfig):
        # The adapters' inputs and rank-sized intermediates. Dropout and DoRA keep copies.
        reads_norm = any(name in targets for name in ("q_proj", "k_proj", "v_proj", "fc_in"))
        elements += adapter.rank * len(targets) + d * reads_norm + inner * ("fc_out" in targets)
        for name in targets:
            out_features, in_features = job.shape.linear_shape(name)
            elements += in_features * (adapter.dropout > 0) + 2 * out_features * adapter.dora
    elif isinstance(adapter, Ia3Config):  # each rescaled activation is kept as it was before
        elements += sum(inner if name in ("fc_in", "fc_out") else d for name in targets)
    return elements


def offloaded_bytes(job: Job) -> int:
    """Return the page-locked host memory of one rank's block inputs, one tensor per block."""
    if job.work.checkpointing != "offload" or not job.on_gpu:
        return 0
    return job.shape.n_layer * power_of_two(job.work.element_bytes * job.tokens * job.shape.n_embd)


def power_of_two(size: int) -> int:
    """Round up to a power of two, the size in which page-locked blocks are allocated."""
    return 1 << (size - 1).bit_length() if size else 0


def loss_bytes(job: Job) -> int:
    """Return the workspace of the head and its loss, in bytes.

    It holds the logits of some tokens and the head's weight gradient. If the tokens are more than
    `one_chunk`, the gradient is summed in fp32 over chunks, and each chunk's share is computed some rows at a time:
    in fp32 on a GPU; on a CPU in low precision and then, because the addition converts it, in fp32
    as well. fp32 models add in place.
    """
    element, d, vocab = job.work.element_bytes, job.shape.n_embd, job.shape.vocab_size
    hidden = element * job.tokens * d
    if job.shape.head != "lm":
        return hidden + 4 * job.tokens * job.shape.num_labels
    if not job.trains_lm_head:
        return hidden + _logits_bytes(job, min(job.tokens, LOSS_CHUNK))
    gradient = element * vocab * d
    if one_chunk(job.tokens, d, element):
        return hidden + _logits_bytes(job, job.tokens) + gradient
    chunk = _logits_bytes(job, TRAINED_CHUNK)
    share = 0 if element == 4 else 4 if job.on_gpu else element + 4
    rounded = 0 if element == 4 else gradient  # the sum in the model's precision, at the end
    return hidden + 4 * vocab * d + max(chunk + share * min(WEIGHT_ROWS, vocab) * d, rounded)


def one_chunk(tokens: int, width: int, element_bytes: int) -> bool:
    """Tell whether a trained head computes the logits of all tokens at once.

    It does while they take no more memory than an fp32 sum of the head's gradient, (V, width),
    would: one product makes that gradient, and nothing is summed.
    """
    return tokens <= max(TRAINED_CHUNK, 4 * width // element_bytes)


def _logits_bytes(job: Job, tokens: int) -> int:
    """Return the bytes for the logits of some tokens in the model's precision.

    The gradient overwrites the logits, some rows at a time in fp32.
    """
    return job.shape.vocab_size * (
        job.work.element_bytes * tokens
        + 4 * min(tokens, SOFTMAX_ROWS["cuda" if job.on_gpu else "cpu"])
    )
