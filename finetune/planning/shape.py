"""The tensors, parameters, adapters and FLOPs of a GPT-J, from its config.json alone.

Flow: `load_shape(path, head, num_labels)` reads one small json file and returns a `ModelShape`,
which names every tensor of the model (and of an adapter on it) as transformers and peft name them,
in the order of `named_parameters()`. It reads no weights and imports neither torch nor
transformers, so a plan is fast and needs no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Union

from finetune.config import (
    AdapterConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from finetune.errors import UserError
from finetune.files import refuse_pointer

ASSETS = Path(__file__).parents[1] / "assets"
GPTJ_6B_ID = "eleutherai/gpt-j-6b"
LINEARS = ("k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out")
"""The linear modules of a block in the order of `named_parameters()`; peft's `all-linear` means these."""
HEAD_MODULES = {"lm": "lm_head", "classify": "score", "qa": "qa_outputs"}
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

    @classmethod
    def from_config(
        cls, source: Union[Mapping[str, Any], str, Path], head: str = "lm", num_labels: int = 2
    ) -> ModelShape:
        """Read a transformers config: a dict, a config.json, or the directory that holds it.

        Raises:
            UserError: not a readable GPT-J config.
        """
        raw, where = (source, "") if isinstance(source, Mapping) else _read_json(Path(source))
        if raw.get("model_type") != "gptj":
            raise UserError(
                f"model_type is {raw.get('model_type')!r}, not 'gptj'",
                where,
                "Only GPT-J models can be trained here.",
            )
        missing = [key for key in ("n_embd", "n_layer", "n_head", "vocab_size") if key not in raw]
        if missing:
            raise UserError(
                f"the model's config lacks {', '.join(missing)}",
                where,
                "Download config.json again.",
            )
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

    # ------------------------------------------------------------------ tensors of the model

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
        name = HEAD_MODULES[self.head]
        yield f"{name}.weight", (rows, self.n_embd)
        if self.head != "classify":
            yield f"{name}.bias", (rows,)

    def tensors(self) -> Iterator[Tensor]:
        """Yield (name, shape) of every parameter, in the order of `model.named_parameters()`."""
        yield "transformer.wte.weight", (self.vocab_size, self.n_embd)
        for layer in range(self.n_layer):
            for name, shape in self.block_tensors():
                yield f"transformer.h.{layer}.{name}", shape
        yield from (
            ("transformer.ln_f.weight", (self.n_embd,)),
            ("transformer.ln_f.bias", (self.n_embd,)),
        )
        yield from self.head_tensors()

    def largest(self) -> int:
        """Return the number of elements of the largest weight."""
        return max(prod(shape) for _, shape in self.tensors())

    def layer_parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.block_tensors())

    def head_parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.head_tensors())

    def parameters(self) -> int:
        """Return the parameters of the model without an adapter; 6,050,882,784 for GPT-J-6B."""
        return sum(prod(shape) for _, shape in self.tensors())

    # ------------------------------------------------------------------ adapters

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a block's linear module."""
        if name not in LINEARS:
            raise UserError(
                f"adapter.targets names {name!r}, which GPT-J's blocks do not have",
                "",
                f"Choose from {', '.join(LINEARS)}, or all-linear.",
            )
        sizes = {"fc_in": (self.n_inner, self.n_embd), "fc_out": (self.n_embd, self.n_inner)}
        return sizes.get(name, (self.n_embd, self.n_embd))

    def adapter_tensors(self, adapter: AdapterConfig) -> Iterator[Tensor]:
        """Yield (name, shape) of every tensor that `adapter` trains, as peft names them.

        Full fine-tuning yields nothing. The heads of classification and question answering start
        from random values, so they are trained with any adapter (peft's `modules_to_save`, which
        keeps the untrained copy too: see `adapter_copies`).
        """
        if isinstance(adapter, FullConfig):
            return
        if isinstance(adapter, (LoraConfig, Ia3Config)):
            for layer in range(self.n_layer):
                for name in adapter_targets(adapter):
                    yield from self._module_adapter(layer, name, adapter)
        yield from self._saved_head(adapter, "modules_to_save.default")
        if isinstance(adapter, PromptConfig):
            yield "prompt_encoder.default.embedding.weight", (adapter.virtual_tokens, self.n_embd)
        if isinstance(adapter, PrefixConfig):
            yield (
                "prompt_encoder.default.embedding.weight",
                (adapter.virtual_tokens, 2 * self.n_layer * self.n_embd),
            )

    def _module_adapter(
        self, layer: int, name: str, adapter: Union[LoraConfig, Ia3Config]
    ) -> Iterator[Tensor]:
        out_features, in_features = self.linear_shape(name)
        part = "mlp" if name.startswith("fc") else "attn"
        module = f"{PEFT_PREFIX}transformer.h.{layer}.{part}.{name}"
        if isinstance(adapter, Ia3Config):
            # peft rescales the input of feed-forward modules and the output of the others.
            yield (
                f"{module}.ia3_l.default",
                (1, in_features) if name.startswith("fc_") else (out_features, 1),
            )
            return
        yield f"{module}.lora_A.default.weight", (adapter.rank, in_features)
        yield f"{module}.lora_B.default.weight", (out_features, adapter.rank)
        if adapter.dora:
            yield f"{module}.lora_magnitude_vector.default.weight", (out_features,)

    def _saved_head(self, adapter: AdapterConfig, copy: str) -> Iterator[Tensor]:
        if self.head == "lm":
            return
        # Prompt-learning models do not wrap the base model in a tuner, hence the shorter prefix.
        prefix = "base_model." if isinstance(adapter, (PromptConfig, PrefixConfig)) else PEFT_PREFIX
        for name, shape in self.head_tensors():
            module, leaf = name.rsplit(".", 1)
            yield f"{prefix}{module}.{copy}.{leaf}", shape

    def frozen_tensors(self, adapter: AdapterConfig) -> Iterator[Tensor]:
        """Yield (name, shape) of the frozen tensors.

        With an adapter this is the whole model, with full fine-tuning nothing.
        """
        if isinstance(adapter, FullConfig):
            return
        yield from self.tensors()

    def trainable_tensors(self, adapter: AdapterConfig) -> Iterator[Tensor]:
        """Yield (name, shape) of the tensors that the optimizer updates."""
        yield from (
            self.tensors() if isinstance(adapter, FullConfig) else self.adapter_tensors(adapter)
        )

    def trainable(self, adapter: AdapterConfig) -> int:
        return sum(prod(shape) for _, shape in self.trainable_tensors(adapter))

    def total(self, adapter: AdapterConfig) -> int:
        """Return the parameters of model and adapter together."""
        return self.trainable(adapter) + sum(
            prod(shape) for _, shape in self.frozen_tensors(adapter)
        )

    # ------------------------------------------------------------------ arithmetic

    def matmul_parameters(self) -> int:
        """Return the parameters of all matrices that a token is multiplied with.

        The embedding is not among them, as it is only looked up.
        """
        return sum(
            prod(shape) for name, shape in self.tensors() if len(shape) == 2 and "wte" not in name
        )

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
        head = 2 * self.head_parameters()
        return Flops(forward, backward, forward - head if checkpointing else 0)


def adapter_targets(adapter: Union[LoraConfig, Ia3Config]) -> list[str]:
    """Return the targeted linear modules in the order of `named_parameters()`.

    The targets are `all-linear`, "a,b" or a list.
    """
    targets = adapter.targets
    if targets == "all-linear":
        return list(LINEARS)
    names = (
        [name.strip() for name in targets.split(",")]
        if isinstance(targets, str)
        else [str(name) for name in targets]
    )
    unknown = [name for name in names if name not in LINEARS]
    return [name for name in LINEARS if name in names] + unknown


def load_shape(
    path: str, head: str = "lm", num_labels: int = 2, revision: Union[str, None] = None
) -> ModelShape:
    """Return the shape of a model.

    `path` is a checkpoint directory, a shipped asset, a hub id in the local cache, or GPT-J-6B by
    its id.

    Raises:
        UserError: no config.json can be found without a network, or it is not a GPT-J's.
    """
    if path.startswith("asset:"):
        return ModelShape.from_config(
            _existing(ASSETS / path.removeprefix("asset:")), head, num_labels
        )
    if Path(path).expanduser().exists():
        return ModelShape.from_config(Path(path).expanduser(), head, num_labels)
    cached = _cached_config(path, revision)
    if cached is not None:
        return ModelShape.from_config(cached, head, num_labels)
    if path.lower() == GPTJ_6B_ID:
        return ModelShape.from_config(ASSETS / "gptj_6b", head, num_labels)
    raise UserError(
        f"{path!r} is neither a directory nor a model in the Hugging Face cache",
        "model.path",
        "Give a checkpoint directory, or download the model once: hf download " + path,
    )


def _existing(directory: Path) -> Path:
    if not directory.exists():
        names = ", ".join(
            f"asset:{entry.name}"
            for entry in sorted(ASSETS.glob("*"))
            if (entry / "config.json").exists()
        )
        raise UserError(
            f"no asset {directory.name!r} ships with the project",
            "model.path",
            f"Models that do: {names}.",
        )
    return directory


def _cached_config(repo_id: str, revision: Union[str, None]) -> Union[str, None]:
    from huggingface_hub import (
        try_to_load_from_cache,
    )  # imported here: half a second that local directories need not spend
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except HFValidationError:  # a path that does not exist is not a repo id either
        return None
    return found if isinstance(found, str) else None


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    path = path / "config.json" if path.is_dir() else path
    refuse_pointer(path)
    try:
        return json.loads(path.read_text()), str(path)
    except FileNotFoundError:
        raise UserError(
            "there is no config.json",
            str(path.parent),
            "model.path must name a Hugging Face checkpoint.",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the model's config: {error}", str(path), "Download config.json again."
        ) from None


# GPT-J's module names as users may type them. Needs no torch.
MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")


def target_modules(targets: Any) -> list[str]:
    """Return module names for `all-linear`, "q_proj,v_proj" or a list; never a head.

    Raises:
        UserError: a name that GPT-J does not have.
    """
    names = (
        [t.strip() for t in targets.split(",")]
        if isinstance(targets, str)
        else [str(t) for t in targets]
    )
    if names == ["all-linear"]:
        return list(MODULES)
    unknown = [name for name in names if name not in MODULES]
    if unknown or not names:
        raise UserError(
            f"GPT-J has no module '{', '.join(unknown)}'",
            "adapter.targets",
            f"Choose from {', '.join(MODULES)}, or all-linear.",
        )
    return names
