"""Own tokens: rows of the embedding, and of the head, that are trained beside a LoRA.

    embedding   x = row(id) of the k trained rows where id is an own token, else of wte
    head        y = h W^T + b, and y[ids] += h A^T     A (k, D), trained from zero

Both are exact updates of those rows alone. For the embedding this is peft's
`trainable_token_indices`. GPT-J's head has a bias and is not tied to the embedding; peft 0.21 leaves
the bias of such a head out of its forward. So in peft's files the head's rows are a LoRA of rank k on
`lm_head`, which peft computes and merges right: its B (V, k) is 1 where column i meets the row of
token i, and 0 elsewhere. B is written with the adapter and never trained.

peft puts the trained rows into a copy of the whole embedding, whose gradient is as large. Here ids
are compared with the own tokens, and products with k columns do the rest. Modules, parameter names
and files stay peft's.
Source: peft/tuners/trainable_tokens/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from finetune.gptj.loss import LMHead

NAME = "default"


class Rows(nn.ParameterDict):
    """Trained rows that are read by a call: ZeRO-3 gathers a module's own parameters around it."""

    __call__ = nn.Module.__call__  # torch forbids it

    def forward(self, own: Tensor) -> Tensor:
        """Return the row of each own token, and zero elsewhere; `own` (.., k) is 1 where token i stands."""
        return own @ self[NAME]


def initialise(model: nn.Module, tokens: Sequence[int]) -> None:
    """Make the LoRA of a new peft model's head one of the rows of `tokens`, without effect so far."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, LMHead):
            nn.init.zeros_(layer.lora_A[NAME].weight)
            del layer.lora_B[NAME]
            set_tokens(layer, tokens)


def connect(model: nn.Module) -> None:
    """Compute the rows of a peft model's own tokens as described above, from now on."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            set_tokens(layer, layer.token_indices[NAME])
            layer.forward = partial(embed, layer)  # type: ignore[method-assign]
            layer.trainable_tokens_delta.__class__ = Rows
        elif isinstance(layer, LoraLayer) and isinstance(layer.base_layer, LMHead):
            if NAME in layer.lora_B:  # loaded from an export, or from elsewhere
                weight = layer.lora_B[NAME].weight.detach()
                tokens = weight.argmax(0).tolist()
                if not torch.equal(weight, row_picker(tokens, *weight.shape, weight)):
                    continue
                set_tokens(layer, tokens)
            layer.forward = partial(project, layer)  # type: ignore[method-assign]


def set_tokens(layer: Any, tokens: Sequence[int]) -> None:
    layer.tokens = list(tokens)
    device = layer.base_layer.weight.device
    layer.register_buffer("token_ids", torch.tensor(layer.tokens, device=device), persistent=False)


def is_on(layer: Any) -> bool:
    return not layer.disable_adapters and not layer.merged


def embed(layer: Any, ids: Tensor) -> Tensor:
    """Forward of the embedding: ids (..) to vectors (.., D)."""
    x = layer.base_layer(ids)
    if not is_on(layer):
        return x
    own = ids[..., None] == layer.token_ids
    rows = layer.trainable_tokens_delta(own.to(x.dtype))
    return torch.where(own.any(-1, keepdim=True), rows, x)


def project(
    layer: Any, hidden: Tensor, labels: Tensor | None = None, per_token: bool = False
) -> Tensor:
    """Forward of the head, as `LMHead`'s."""
    if not is_on(layer):
        return layer.base_layer(hidden, labels, per_token)
    own = layer.lora_A[NAME](hidden)
    return layer.base_layer(hidden, labels, per_token, own, layer.token_ids)


def row_picker(tokens: Sequence[int], rows: int, rank: int, like: Tensor) -> Tensor:
    """Return the B (rows, rank) that adds A's row i to the head's row `tokens[i]`."""
    picker = torch.zeros(rows, rank, dtype=like.dtype, device=like.device)
    picker[list(tokens), range(rank)] = 1
    return picker


def fixed_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a peft model's files hold beside its trained tensors, by parameter name."""
    return {
        f"{name}.lora_B.{NAME}.weight": row_picker(
            layer.tokens, layer.out_features, len(layer.tokens), torch.empty(0, dtype=dtype)
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and hasattr(layer, "tokens")
    }


def gathered_rows(layer: Any, weight: Tensor, rows: Sequence[int], width: int) -> Tensor:
    """Return rows of a weight that ZeRO-3 has partitioned; peft's own needs CUDA. Collective."""
    with gather_params_ctx([weight], modifier_rank=None):
        return weight[list(rows)].detach().clone()
