"""peft's models, called directly with flat batches.

peft's own `forward` hands on arguments of padded batches (masks, caches), which the training model does not take, and
puts virtual tokens in front of a padded row, which in a flat batch is the first document only. Here the arguments go
straight to the wrapped model, and virtual tokens enter in front of every document (`gptj.virtual`). Parameters and
files stay peft's, so an adapter trained here opens in plain transformers and peft.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from finetune.gptj.virtual_tokens import Virtual


class FlatAdapter:
    """Mixed into the peft model's class in front of peft's own `forward`."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.base_model(*args, **inputs)  # type: ignore[attr-defined]


class FlatPrompts(FlatAdapter):
    """The same for prompt and prefix tuning."""

    _saving: dict[str, Tensor] | None = None

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return super().forward(*args, virtual=self.virtual(), **inputs)

    def virtual(self) -> Virtual:
        """The trained rows; read through the encoder's forward, where ZeRO-3 gathers them."""
        name, config = self.active_adapter, self.active_peft_config  # type: ignore[attr-defined]
        encoder = self.prompt_encoder[name]  # type: ignore[attr-defined]
        rows = encoder(self.prompt_tokens[name].to(encoder.embedding.weight.device))  # type: ignore[attr-defined]
        if config.peft_type.value == "PROMPT_TUNING":
            return Virtual(prompt=rows)
        size = config.token_dim // config.num_attention_heads
        split = rows.view(len(rows), config.num_layers, 2, config.num_attention_heads, size)
        return Virtual(prefix=split.permute(1, 2, 0, 3, 4))

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        self._saving = options.get("state_dict")
        try:
            super().save_pretrained(*args, **options)  # type: ignore[misc]
        finally:
            self._saving = None

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """From the state dict that is being saved: at ZeRO-3 peft's way would wait for the other ranks for ever."""
        if self._saving is None:
            return super().get_prompt_embedding_to_save(adapter_name)  # type: ignore[misc]
        return self._saving[f"prompt_encoder.{adapter_name}.embedding.weight"].detach().cpu()


def flat(model: nn.Module) -> nn.Module:
    """The same peft model; it takes flat batches from now on."""
    if not isinstance(model, FlatAdapter):
        model.__class__ = _flat_class(type(model), model.active_peft_config.is_prompt_learning)  # type: ignore[union-attr]
    return model


@lru_cache(None)
def _flat_class(base: type, prompts: bool) -> type:
    return type(f"Flat{base.__name__}", (FlatPrompts if prompts else FlatAdapter, base), {})
