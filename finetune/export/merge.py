"""The tensors of a run's model, one at a time, with its adapter folded into the base in fp32.

The formulas are those of the adapters' papers, not peft's code, so that reopening the result in
peft's company is a real comparison: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA
arXiv:2402.09353, (IA)3 arXiv:2205.05638.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPTJConfig

from finetune.checkpointing.format import StateReader
from finetune.config import Config, Init
from finetune.export.reopen import init_of
from finetune.gptj.load import DTYPES, Weights, draw, local_folder, meta_model

PREFIX = "base_model.model."


class RunWeights:
    """A run's model: fp32 masters of a checkpoint on the base that was trained.

    Args:
        config: the trained model's.
        tokens: ids of the task's own tokens.
    """

    def __init__(
        self, cfg: Config, config: GPTJConfig, checkpoint: Path, tokens: Iterable[int] = ()
    ):
        self.cfg, self.config, self.tokens = cfg, config, list(tokens)
        self.masters, self.init = StateReader(checkpoint), init_of(cfg, checkpoint)
        self.names = set(self.masters.names())
        pretrained = cfg.model.init is Init.pretrained
        self.files = Weights(local_folder(cfg.model)) if pretrained else None
        parameters = meta_model(config, cfg.task.head).named_parameters()
        self.shapes = {name: tuple(p.shape) for name, p in parameters}

    def master(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a parameter of the checkpoint in fp32."""
        return self.masters.read(name, "master", 0, math.prod(shape)).view(shape)

    def trained(self, name: str) -> Tensor | None:
        """Return a tensor that was trained as a whole, a head beside an adapter included, in fp32."""
        module, _, leaf = name.rpartition(".")
        for key in (name, f"{PREFIX}{module}.modules_to_save.default.{leaf}"):
            if key in self.names:
                return self.master(key, self.shapes[name])
        return None

    def base(self, name: str) -> Tensor:
        """Return a tensor of the base in the run's precision, as training computed with it."""
        if self.files is not None and name in self.files.files:
            tensor = self.files[name]
        else:
            tensor = draw(name, self.shapes[name], self.config, self.cfg.seed)
        tensor = tensor.to(DTYPES[self.cfg.model.dtype.value])
        return self.init.residual(name, tensor) if self.init else tensor

    def merged(self, name: str) -> Tensor:
        """Return a tensor of the whole model: trained, folded in fp32, or the base's own."""
        tensor = self.trained(name)
        if tensor is not None:
            return tensor
        base = self.base(name)
        adapter: Any = self.cfg.adapter
        layer, _, leaf = f"{PREFIX}{name}".rpartition(".")
        # (IA)3 scales a bias only where it scales outputs: GPT-J's attention has no biases.
        if leaf != "weight" or base.dim() != 2:
            return base
        rows, columns = base.shape

        # Own tokens: whole rows of the embedding, and what is added to rows of the head.
        own = (len(self.tokens), columns)
        if (key := f"{layer}.token_adapter.trainable_tokens_delta.default") in self.names:
            merged = base.to(torch.float32, copy=True)
            merged[self.tokens] = self.master(key, own)
            return merged
        if (key := f"{layer}.lora_A.default.weight") in self.names and name == "lm_head.weight":
            merged = base.to(torch.float32, copy=True)
            merged[self.tokens] += self.master(key, own)
            return merged

        if f"{layer}.lora_A.default.weight" in self.names:
            rank = adapter.rank
            a = self.master(f"{layer}.lora_A.default.weight", (rank, columns))
            b = self.master(f"{layer}.lora_B.default.weight", (rows, rank))
            # In place: one such tensor at a time.
            merged = base.to(torch.float32, copy=True).addmm_(b, a, alpha=adapter.scale)
            if adapter.dora:
                key = f"{layer}.lora_magnitude_vector.default.weight"
                merged.mul_((self.master(key, (rows,)) / merged.norm(dim=1))[:, None])
            return merged

        if f"{layer}.ia3_l.default" in self.names:
            # The MLP's layers scale their inputs, the attention's their outputs.
            scaled = (1, columns) if ".mlp." in layer else (rows, 1)
            return base.float() * self.master(f"{layer}.ia3_l.default", scaled)
        return base

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the whole model, in the order of `shapes`."""
        return ((name, self.merged(name)) for name in self.shapes)
