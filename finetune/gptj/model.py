"""GPT-J on flat batches, with Hugging Face's weights, module names and generation.

input_ids (1, N) + cu_seqlens -> wte -> [block: ln_1 -> attn + mlp + residual] x layers -> ln_f -> head.
Rotary tables are made once per forward. Without cu_seqlens it is an ordinary Hugging Face GPT-J: (B, T) with an
attention mask and a key/value cache, for `generate`, peft and anything else that calls it so.
Reference: transformers/models/gptj/modeling_gptj.py; Wang and Komatsuzaki, GPT-J-6B (2021).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GPTJConfig
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gptj.modeling_gptj import GPTJPreTrainedModel as HFPreTrainedModel

from finetune.gptj.attention import Packed, pack, packed_attention, pick_attention, rope_tables, rotate
from finetune.gptj.loss import LMHead
from finetune.gptj.recompute import made_again, run_block
from finetune.gptj.virtual import Virtual, prefixed_attention

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class Attention(nn.Module):
    def __init__(self, config: GPTJConfig, layer: int):
        super().__init__()
        width = config.n_embd
        self.heads, self.layer, self.dropout = config.n_head, layer, config.attn_pdrop
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, rope: Tensor, packed: Packed | None, mask: Tensor | None, cache,
                prefix: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        flat = x.view(-1, width)
        q = rotate(self.q_proj(flat), rope, self.heads)
        k = rotate(self.k_proj(flat), rope, self.heads)
        v = self.v_proj(flat).view(*k.shape)
        dropout = self.dropout if self.training else 0.0
        if packed is not None and prefix is not None:
            out = prefixed_attention(q, k, v, packed, prefix, dropout)
        elif packed is not None:
            out = packed_attention(q, k, v, packed, dropout)
        else:
            out = self._padded(*(t.view(batch, length, *t.shape[1:]) for t in (q, k, v)), mask, cache)
        return self.resid_dropout(self.out_proj(out.reshape(batch, length, width)))

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache) -> Tensor:
        """(B, T, heads, head_dim) with a boolean mask (B, 1, T, keys) and a cache; mask None: plain causal."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal = mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=self.dropout if self.training else 0.0
        )
        return out.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: GPTJConfig):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.fc_in = nn.Linear(config.n_embd, inner)
        self.fc_out = nn.Linear(inner, config.n_embd)
        self.act = nn.GELU("tanh") if config.activation_function in TANH_GELU else ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.keep_inner = True

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc_in(x)
        active = self.act(inner)
        if self.keep_inner or not torch.is_grad_enabled():
            return self.dropout(self.fc_out(active))
        with made_again(self.act, inner, active):
            out = self.fc_out(active)
        return self.dropout(out)


class Block(nn.Module):
    def __init__(self, config: GPTJConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor, packed: Packed | None, mask: Tensor | None, cache,
                prefix: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        return self.attn(normed, rope, packed, mask, cache, prefix) + self.mlp(normed) + x


class PreTrained(HFPreTrainedModel):
    _no_split_modules = ["Block"]  # noqa: RUF012 - as in transformers
    _supports_sdpa = True
    _supports_flash_attn = False

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the loader, parameter by parameter; nothing is drawn here."""


class Transformer(PreTrained):
    """The body, `transformer.*` in checkpoints."""

    def __init__(self, config: GPTJConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.rotary_dim = config.rotary_dim or config.n_embd // config.n_head
        self.attention = "auto"
        self.checkpointing = False

    @property
    def checkpointing(self) -> bool | str:
        """What a training forward keeps; one of `recompute.KINDS`."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, kind: bool | str) -> None:
        self._checkpointing = kind
        for block in self.h:
            block.mlp.keep_inner = kind != "selective"

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.wte = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        virtual: Virtual | None = None,
        **unused,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D).

        Args:
            input_ids: (B, T), or flat (1, N) with `cu_seqlens` (S+1,): documents that do not see each other.
            attention_mask: (B, keys), 1 for real tokens, padded on either side; not with `cu_seqlens`.
            position_ids: (B, T); by default counted per row over the real tokens.
            virtual: rows in front of every document (without `cu_seqlens`, of every row); the output leaves them out.
        """
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        shape = x.shape
        if virtual is not None:
            x, position_ids, cu_seqlens = virtual.enter(x, position_ids, cu_seqlens)
        if use_cache and past_key_values is None and cu_seqlens is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = _positions(x, attention_mask, past)
        rope = rope_tables(position_ids.expand(x.shape[:2]).reshape(-1), self.rotary_dim)
        packed, mask = None, None
        if cu_seqlens is not None:
            kind = pick_attention(self.attention, x.device.type, x.dtype)
            packed = pack(cu_seqlens, kind, x.device)
        else:
            mask = _padding_mask(attention_mask, x.shape[1], past, x.device)
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            prefix = virtual.layer(layer) if virtual is not None else None
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = run_block(self.checkpointing, block, x, rope, packed, mask, None, prefix)
            else:
                x = block(x, rope, packed, mask, past_key_values, prefix)
        hidden = self.ln_f(x)
        if virtual is not None:
            assert packed is not None
            hidden = virtual.leave(hidden, packed, shape)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


def _positions(x: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """Positions of the new tokens, (B, T) or (1, T): left padding does not count."""
    length = x.shape[1]
    if attention_mask is None:
        return torch.arange(past, past + length, device=x.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _padding_mask(attention_mask: Tensor | None, length: int, past: int, device: torch.device) -> Tensor | None:
    """Boolean (B, 1, length, past + length), True where attended; None where plain causal attention does."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if (attention_mask is None or bool(attention_mask.all())) and (past == 0 or length == 1):
        return None
    keys = torch.arange(past + length, device=device)
    causal = keys[None] <= keys[past:, None]
    if attention_mask is None:
        return causal[None, None]
    mask = causal[None] & attention_mask.bool()[:, None, : past + length]
    # A padded query attends to itself, so that no row of the softmax is empty.
    return (mask | (keys[None] == keys[past:, None])[None])[:, None]


class CausalLM(PreTrained, GenerationMixin):
    """GPT-J with the language modelling head; called as Hugging Face's, or with flat labels for the summed loss."""

    def __init__(self, config: GPTJConfig):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = LMHead(config.n_embd, config.vocab_size)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        per_token: bool = False,
        logits_to_keep: int = 0,
        virtual: Virtual | None = None,
        **unused,
    ) -> CausalLMOutputWithPast | Tensor:
        """Logits (B, T, V); with labels (1, N), shifted already: the summed loss, or (N,) losses with per_token."""
        body = self.transformer(
            input_ids, past_key_values, attention_mask, position_ids, inputs_embeds, use_cache, cu_seqlens, virtual
        )
        hidden = body.last_hidden_state
        if labels is not None:
            return self.lm_head(hidden.view(-1, hidden.shape[-1]), labels.view(-1), per_token)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=body.past_key_values)


class _Pooled(PreTrained):
    """Body plus a small head that is read at chosen token positions."""

    def __init__(self, config: GPTJConfig, name: str, outputs: int, bias: bool):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.head_name = name
        setattr(self, name, nn.Linear(config.n_embd, outputs, bias=bias))

    def forward(self, input_ids: Tensor | None = None, positions: Tensor | None = None, **inputs) -> Tensor:
        """Head outputs in fp32: (P, outputs) at flat token `positions` (P,), or (B, T, outputs) without."""
        hidden = self.transformer(input_ids, **inputs).last_hidden_state
        if positions is not None:
            hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
        return getattr(self, self.head_name)(hidden).float()


class SequenceClassifier(_Pooled):
    def __init__(self, config: GPTJConfig):
        super().__init__(config, "score", config.num_labels, bias=False)


class QuestionAnswerer(_Pooled):
    def __init__(self, config: GPTJConfig):
        super().__init__(config, "qa_outputs", 2, bias=True)


HEADS = {"lm": CausalLM, "classify": SequenceClassifier, "qa": QuestionAnswerer}
ARCHITECTURES = {
    "lm": "GPTJForCausalLM",
    "classify": "GPTJForSequenceClassification",
    "qa": "GPTJForQuestionAnswering",
}


def copy_config(config: GPTJConfig) -> GPTJConfig:
    """A config of its own for every model: a shared one carries attention settings from one model into another."""
    return copy.deepcopy(config)
