"""Virtual tokens: trained rows before every document of a flat batch (prompt and prefix tuning).

Documents of 3 and 2 tokens with two virtual tokens V:

    flat     a b c | d e             cu_seqlens 0 3 5        positions 0 1 2 | 0 1
    wide     V V a b c | V V d e                0 5 9        positions 0 1 2 3 4 | 0 1 2 3

Prompt tuning (arXiv:2104.08691) runs the whole body on the wide batch and drops the virtual rows
after the last layer. Prefix tuning (arXiv:2101.00190) gives each layer keys and values of its own:
only attention is wide, with zero queries whose results are dropped, so that one causal kernel
serves both. Positions of the text start at V, as in peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.gptj.attention import Packed, packed_attention


@dataclass(frozen=True)
class Virtual:
    """Virtual tokens that an adapter puts before every document: either a prompt or a prefix."""

    prompt: Tensor | None = None
    """Embeddings (V, D)."""
    prefix: Tensor | None = None
    """Keys, not rotated, and values of each layer: (layers, 2, V, heads, head_dim)."""

    def enter(
        self, x: Tensor, position_ids: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings, positions and boundaries on which the body runs.

        Their shapes are (1, M, D), (1, M) and (S+1,).

        Args:
            x: (1, N, D).
        """
        if self.prefix is not None:
            return x, position_ids + self.prefix.shape[2], cu_seqlens
        assert self.prompt is not None
        count, lengths = len(self.prompt), torch.diff(cu_seqlens).tolist()
        positions = position_ids.reshape(-1) + count
        return (
            insert(x[0], self.prompt.to(x.dtype), lengths)[None],
            insert(positions, torch.arange(count, device=x.device), lengths)[None],
            _shift(cu_seqlens, count),
        )

    def prefixes(self) -> dict[int, Tensor] | None:
        """Return each layer's prefix, (2, V, heads, head_dim); None for a prompt."""
        return None if self.prefix is None else dict(enumerate(self.prefix.unbind()))

    def leave(self, hidden: Tensor, documents: Packed) -> Tensor:
        """Return the hidden states of the text alone, (1, N, D)."""
        if self.prompt is None:
            return hidden
        count = len(self.prompt)
        return remove(hidden[0], count, [length - count for length in documents.lengths])[None]


def prefixed_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, prefix: Tensor, dropout: float
) -> Tensor:
    """Compute causal attention in which each document also attends to `prefix`.

    The documents are (N, heads, head_dim), the prefix is (2, V, heads, head_dim).
    """
    keys, values = prefix.to(k.dtype)
    lengths, count = packed.lengths, len(keys)
    wide_lengths = tuple(length + count for length in lengths)
    out = packed_attention(
        insert(q, torch.zeros_like(keys), lengths),
        insert(k, keys, lengths),
        insert(v, values, lengths),
        Packed(wide_lengths, _shift(packed.cu_seqlens, count), packed.kind),
        dropout,
    )
    return remove(out, count, lengths)


def _shift(cu_seqlens: Tensor, count: int) -> Tensor:
    """Return the boundaries of documents that are `count` tokens longer."""
    steps = torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens + count * steps


def insert(flat: Tensor, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Insert `rows` (V, ...) before every document of `flat` (N, ...)."""
    return torch.cat([part for document in flat.split(list(lengths)) for part in (rows, document)])


def remove(flat: Tensor, count: int, lengths: Sequence[int]) -> Tensor:
    """Undo `insert`: drop the `count` rows before each document; documents are `lengths` long."""
    return torch.cat(flat.split([size for length in lengths for size in (count, length)])[1::2])
