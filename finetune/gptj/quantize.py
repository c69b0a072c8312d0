"""Frozen linear layers in 8 or 4 bits, in bitsandbytes' formats: LLM.int8()'s rows, or QLoRA's nf4.

A weight is quantised when it is loaded and dequantised for every product, in the forward and again
in the backward: at any moment one weight exists in full, and activations keep their precision. Its
bytes are one frozen parameter, laid out as in `planning/quantization.py` and typed as numbers of the
model's precision. So whatever DeepSpeed does with parameters (partition, gather, broadcast, offload)
holds for it, and peft adapts the layer as it adapts any `nn.Linear`.
Sources: Dettmers et al., arXiv:2208.07339 (int8) and arXiv:2305.14314 (nf4).
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import ModelConfig, Quantize
from finetune.planning.quantization import BLOCK, SCALE_BLOCK, packed_bytes, sections

PIECE = 2**20
"""Values that are quantised at once, whole blocks of them."""
INT8_STEP = 1.0 / 127.0
"""An int8 code counts steps of this share of its row's scale, the largest value."""


class DequantizedLinear(torch.autograd.Function):
    """x W^T + b of a `QuantizedLinear`, which saves the packed weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: QuantizedLinear):
        ctx.save_for_backward(weight)
        ctx.layer = layer
        return F.linear(x, layer.unpacked(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        (weight,) = ctx.saved_tensors
        return gradient @ ctx.layer.unpacked(weight, gradient.dtype), None, None, None


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is frozen and kept in the format of `model.quantize`."""

    def __init__(self, model: ModelConfig, in_features: int, out_features: int, bias: bool = True):
        nn.Module.__init__(self)  # nn.Linear would allocate the weight in full
        self.in_features, self.out_features = in_features, out_features
        self.int8 = model.quantize is Quantize.int8
        self.double = model.quantize_double and not self.int8
        layout = model.quantize, self.double, out_features, in_features
        self.sections = sections(*layout)
        self.elements = packed_bytes(*layout) // model.dtype.element_bytes
        self.weight = nn.Parameter(torch.empty(self.elements), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that is packed."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        return DequantizedLinear.apply(x, self.weight, self.bias, self)

    def pack(self, value: Tensor) -> Tensor:
        """Quantise a weight of the model's precision; return the content of the parameter.

        Some values at a time, since on a CPU bitsandbytes needs 20 bytes for each of them.
        """
        if self.int8:
            rows = max(1, PIECE // self.in_features)
            pieces = [bnb.int8_vectorwise_quant(p.to(torch.float16)) for p in value.split(rows)]
            parts = {
                name: torch.cat([p[i] for p in pieces])
                for i, name in enumerate(("codes", "scales"))
            }
        else:
            pieces = [
                bnb.quantize_4bit(p, blocksize=BLOCK, quant_type="nf4")
                for p in value.reshape(-1).split(PIECE)
            ]
            scales = torch.cat([state.absmax for _, state in pieces])
            parts = {"codes": torch.cat([codes for codes, _ in pieces]), "scales": scales}
            if self.double:
                offset = scales.mean()
                codes, state = bnb.quantize_blockwise(scales - offset, blocksize=SCALE_BLOCK)
                parts |= {"scales": codes, "outer": state.absmax, "offset": offset}
        packed = torch.zeros(self.elements, dtype=value.dtype, device=value.device)
        content = packed.view(torch.uint8)
        for name, start, size in self.sections:
            content[start : start + size] = parts[name].reshape(-1).view(torch.uint8)
        return packed

    def unpacked(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) of its packed form, rounded to the model's precision.

        Args:
            dtype: precision of the result.
        """
        content = weight.detach().view(torch.uint8)
        codes, *scales = (content[start : start + size] for _, start, size in self.sections)
        if self.int8:
            whole = codes.view(torch.int8).view(self.shape).to(weight.dtype)
            return whole.mul_(_numbers(scales[0]).mul_(INT8_STEP)[:, None]).to(dtype)
        absmax = _numbers(scales[0]) if not self.double else None
        if absmax is None:
            outer = _numbers(scales[1])
            absmax = bnb.dequantize_blockwise(scales[0], absmax=outer, blocksize=SCALE_BLOCK)
            absmax += _numbers(scales[2])
        # As one row: for columns that are no multiple of a block, bitsandbytes 0.50's CPU kernel
        # takes the scales of other blocks.
        flat = torch.Size([self.in_features * self.out_features])
        state = bnb.QuantState(absmax, flat, None, BLOCK, "nf4", weight.dtype)
        return bnb.dequantize_4bit(codes.view(-1, 1), state).view(self.shape).to(dtype)

    # peft dequantises a layer that has a `W_q`, as HQQ's layers do, by its `dequantize` (DoRA).
    @property
    def W_q(self) -> Tensor:
        return self.weight

    def dequantize(self) -> Tensor:
        return self.unpacked(self.weight, self.weight.dtype)

    def _apply(self, fn, recurse=True):
        """Move the packed weight with the module, but never convert its bytes to other numbers."""
        weight = self.weight
        weight.data = fn(weight.data.view(torch.uint8)).view(weight.dtype)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self


def _numbers(content: Tensor) -> Tensor:
    """Return fp32 numbers of bytes, copied: in a gathered buffer they may lie anywhere."""
    return content.clone().view(torch.float32)
