"""The tensors, parameters, adapters and FLOPs of a GPT-J, from its config.json alone.

Flow: `load_shape(path, head, num_labels)` reads one small json file and returns a `ModelShape`,
which names every tensor of the model (and of an adapter on it) as transformers and peft name them,
in the order of `named_parameters()`. It reads no weights and imports neither torch nor
transformers, so a plan is fast and needs no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Union

from finetune.assets.paths import asset, resolve
from finetune.config import (
    HEADS,
    AdapterConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    check_gptj_config,
    read_gptj_config,
)
from finetune.errors import UserError

GPTJ_6B_ID = "eleutherai/gpt-j-6b"
WHOLE_MODULES = ("wte", "ln_f", "lm_head")
"""Modules that can be trained whole beside an adapter."""
LINEARS = ("k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out")
"""The linear modules of a block in the order of `named_parameters()`: peft's `all-linear`."""
PEFT_PREFIX = "base_model.model."

Shape = tuple[int, ...]
Tensor = tuple[str, Shape]


class Flops(NamedTuple):
    """Floating point operations of one token; `recompute` only with activation checkpointing."""

    forward: int
    backward: int
    recompute: int

    @property
    def model(self) -> int:
        """Return the FLOPs that MFU counts: recomputation is work, but not progress."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ModelShape:
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    vocab_size: int
    n_positions: int
    rotary_dim: int
    head: str = "lm"
    """lm, classify or qa."""
    num_labels: int = 2
    """Outputs of the classify head; the QA head always has two."""
    own_tokens: int = 0
    """Rows of the vocabulary that are trained beside a LoRA."""

    @classmethod
    def from_config(
        cls, source: Union[Mapping[str, Any], str, Path], head: str = "lm", num_labels: int = 2
    ) -> ModelShape:
        """Read a transformers config: a dict, a config.json, or the directory that holds it.

        Raises:
            UserError: not a readable GPT-J config.
        """
        if isinstance(source, Mapping):
            raw = source
            check_gptj_config(raw)
        else:
            raw = read_gptj_config(Path(source))
        d = raw["n_embd"]
        return cls(
            n_embd=d,
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_inner=raw.get("n_inner") or 4 * d,
            vocab_size=raw["vocab_size"],
            n_positions=raw.get("n_positions", 2048),
            rotary_dim=raw.get("rotary_dim") or d // raw["n_head"],
            head=head,
            num_labels=2 if head == "qa" else num_labels,
        )

    # ------------------------------------------------------------------ tensors

    def block_tensors(self) -> Iterator[Tensor]:
        """Yield (name, shape) inside one block; GPT-J's attention projections have no bias."""
        d, inner = self.n_embd, self.n_inner
        yield from (("ln_1.weight", (d,)), ("ln_1.bias", (d,)))
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"attn.{name}.weight", (d, d)
        yield from (("mlp.fc_in.weight", (inner, d)), ("mlp.fc_in.bias", (inner,)))
        yield from (("mlp.fc_out.weight", (d, inner)), ("mlp.fc_out.bias", (d,)))

    def head_tensors(self) -> Iterator[Tensor]:
        """Yield (name, shape) of the head.

        The language model's head is not tied to the embedding and has a bias.
        """
        rows = self.vocab_size if self.head == "lm" else self.num_labels
        name = HEADS[self.head].module
        yield f"{name}.weight", (rows, self.n_embd)
        if self.head != "classify":
            yield f"{name}.bias", (rows,)

    def tensors(self) -> Iterator[Tensor]:
        """Yield (name, shape) of every parameter, in the order of `model.named_parameters()`."""
        yield "transformer.wte.weight", (self.vocab_size, self.n_embd)
        for layer in range(self.n_layer):
            for name, shape in self.block_tensors():
                yield f"transformer.h.{layer}.{name}", shape
        yield "transformer.ln_f.weight", (self.n_embd,)
        yield "transformer.ln_f.bias", (self.n_embd,)
        yield from self.head_tensors()

    def trainable_tensors(self, adapter: AdapterConfig) -> Iterator[Tensor]:
        """Yield (name, shape) of the tensors that the optimizer updates, named as by peft.

        The heads of classification and question answering start from random values, so they are
        trained with any adapter (peft's `modules_to_save`, which keeps the untrained copy too).
        """
        if isinstance(adapter, FullConfig):
            yield from self.tensors()
            return
        whole = set(getattr(adapter, "modules_to_save", ()))
        if "wte" in whole:
            weight = (self.vocab_size, self.n_embd)
            yield f"{PEFT_PREFIX}transformer.wte.modules_to_save.default.weight", weight
        rows = (self.own_tokens, self.n_embd)
        if self.own_tokens and "wte" not in whole:
            delta = "token_adapter.trainable_tokens_delta.default"
            yield f"{PEFT_PREFIX}transformer.wte.{delta}", rows
        if isinstance(adapter, (LoraConfig, Ia3Config)):
            layers = adapted_layers(getattr(adapter, "layers", None), self.n_layer)
            for layer in layers or range(self.n_layer):
                for name in adapter_targets(adapter):
                    out_features, in_features = self.linear_shape(name)
                    part = "mlp" if name.startswith("fc_") else "attn"
                    module = f"{PEFT_PREFIX}transformer.h.{layer}.{part}.{name}"
                    if isinstance(adapter, Ia3Config):
                        # peft rescales the input of feed-forward modules, the output of others.
                        scale = (1, in_features) if part == "mlp" else (out_features, 1)
                        yield f"{module}.ia3_l.default", scale
                        continue
                    yield f"{module}.lora_A.default.weight", (adapter.rank, in_features)
                    yield f"{module}.lora_B.default.weight", (out_features, adapter.rank)
                    if adapter.dora:
                        yield f"{module}.lora_magnitude_vector.default.weight", (out_features,)
        if "ln_f" in whole:
            for leaf in ("weight", "bias"):
                norm = f"{PEFT_PREFIX}transformer.ln_f.modules_to_save.default.{leaf}"
                yield norm, (self.n_embd,)
        if self.own_tokens and self.head == "lm" and "lm_head" not in whole:
            yield f"{PEFT_PREFIX}lm_head.lora_A.default.weight", rows
        if self.head != "lm" or "lm_head" in whole:
            # peft wraps the base model of a prompt or prefix in no tuner, hence the shorter prefix.
            virtual = isinstance(adapter, (PromptConfig, PrefixConfig))
            for name, shape in self.head_tensors():
                module, leaf = name.rsplit(".", 1)
                prefix = "base_model." if virtual else PEFT_PREFIX
                yield f"{prefix}{module}.modules_to_save.default.{leaf}", shape
        width = {PromptConfig: self.n_embd, PrefixConfig: 2 * self.n_layer * self.n_embd}
        if isinstance(adapter, (PromptConfig, PrefixConfig)):
            shape = (adapter.virtual_tokens, width[type(adapter)])
            yield "prompt_encoder.default.embedding.weight", shape

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a block's linear module."""
        sizes = {"fc_in": (self.n_inner, self.n_embd), "fc_out": (self.n_embd, self.n_inner)}
        return sizes.get(name, (self.n_embd, self.n_embd))

    # ------------------------------------------------------------------ arithmetic

    def largest(self) -> int:
        """Return the number of elements of the largest weight."""
        return max(prod(shape) for _, shape in self.tensors())

    def parameters(self) -> int:
        """Return the parameters of the model without an adapter; 6,050,882,784 for GPT-J-6B."""
        return numel(self.tensors())

    def trainable(self, adapter: AdapterConfig) -> int:
        return numel(self.trainable_tensors(adapter))

    def total(self, adapter: AdapterConfig) -> int:
        """Return the parameters of model and adapter together."""
        model = self.parameters()
        return model if isinstance(adapter, FullConfig) else model + self.trainable(adapter)

    def matmul_parameters(self) -> int:
        """Return the parameters of all matrices that a token is multiplied with.

        The embedding is not among them, as it is only looked up.
        """
        return numel(t for t in self.tensors() if len(t[1]) == 2 and "wte" not in t[0])

    def flops_per_token(
        self, length: int, adapter: AdapterConfig, checkpointing: bool = False
    ) -> Flops:
        """Return the FLOPs of one token in a sequence of `length` tokens.

        With P the matmul parameters, d = n_embd, L layers and A the adapter's parameters:
            attention = L x 2 x length x d         the causal half of scores and values, which are
                                                   2 x 2 x length x d
            forward   = 2 P + 2 A + attention
            backward  = 4 P + 2 x attention        full: gradients of inputs and of weights
                        2 P + 4 A + 2 x attention  adapter: frozen weights need no gradient
            recompute = forward without the head   activation checkpointing, blocks only
        (PaLM, arXiv:2204.02311, appendix B, counts the same but without the causal half.)
        """
        matmul, attention = 2 * self.matmul_parameters(), 2 * length * self.n_embd * self.n_layer
        extra = 0 if isinstance(adapter, FullConfig) else self.trainable(adapter)
        forward = matmul + attention + 2 * extra
        weight_gradients = 4 * extra if extra else matmul
        backward = matmul + weight_gradients + 2 * attention
        blocks = forward - 2 * numel(self.head_tensors())
        return Flops(forward, backward, blocks if checkpointing else 0)


def numel(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements of all tensors."""
    return sum(prod(shape) for _, shape in tensors)


def target_modules(targets: Any) -> list[str]:
    """Return module names for `all-linear`, "q_proj,v_proj" or a list; never a head.

    Raises:
        UserError: a name that GPT-J does not have.
    """
    names = targets.split(",") if isinstance(targets, str) else targets
    names = [str(name).strip() for name in names]
    if names == ["all-linear"]:
        return list(LINEARS)
    unknown = [name for name in names if name not in LINEARS]
    if unknown or not names:
        raise UserError(
            f"GPT-J has no module '{', '.join(unknown)}'",
            "adapter.targets",
            f"Choose from {', '.join(LINEARS)}, or all-linear.",
        )
    return names


def adapted_layers(layers: Any, n_layer: Union[int, None] = None) -> Union[list[int], None]:
    """Return the blocks of adapter.layers, ascending; None for all.

    Args:
        layers: [0,1], or ranges as text: "14-27", "0-3,24-27".
        n_layer: blocks of the model, if known.

    Raises:
        UserError: not such a list, or a block that the model does not have.
    """
    if layers is None:
        return None
    parts = layers if isinstance(layers, list) else str(layers).split(",")
    ranges = [re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", str(part)) for part in parts]
    chosen = sorted({i for r in ranges if r for i in range(int(r[1]), int(r[2] or r[1]) + 1)})
    if not all(ranges) or not chosen:
        raise UserError(
            f"adapter.layers = {layers} is no list of blocks",
            remedy="Try adapter.layers=[0,1] or adapter.layers=14-27.",
        )
    if n_layer is not None and chosen[-1] >= n_layer:
        raise UserError(
            f"adapter.layers = {layers}, and the model has blocks 0 to {n_layer - 1}",
            remedy=f"Try adapter.layers={n_layer // 2}-{n_layer - 1}.",
        )
    return chosen


def adapter_targets(adapter: Union[LoraConfig, Ia3Config]) -> list[str]:
    """Return the targeted linear modules, each once, in the order of `named_parameters()`."""
    names = target_modules(adapter.targets)
    return [name for name in LINEARS if name in names]


def load_shape(
    path: str, head: str = "lm", num_labels: int = 2, revision: Union[str, None] = None
) -> ModelShape:
    """Return the shape of a model.

    `path` is a checkpoint directory, a shipped asset, a hub id in the local cache, or GPT-J-6B by
    its id.

    Raises:
        UserError: no config.json can be found without a network, or it is not a GPT-J's.
    """
    place = Path(resolve(path)).expanduser()
    if not place.exists():
        # Imported here: half a second that local directories need not spend.
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        cached = None
        with suppress(HFValidationError):  # a path that does not exist is not a repo id either
            cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if isinstance(cached, str):
            place = Path(cached)
        elif path.lower() == GPTJ_6B_ID:
            place = asset("gptj_6b")
        else:
            raise UserError(
                f"{path!r} is neither a directory nor a model in the Hugging Face cache",
                "model.path",
                "Give a checkpoint directory, or download the model once: hf download " + path,
            )
    return ModelShape.from_config(place, head, num_labels)
