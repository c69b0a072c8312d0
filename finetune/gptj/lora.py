"""LoRA's products in one autograd function: each output is written once, and nothing saved twice.

For layers i that share an input x (N, in), with frozen weights W_i and rank-r factors A_i, B_i:

    low = x [A_1; A_2; ...]^T               (N, sum of ranks), one pass over x
    y_i = x W_i^T + b_i                     the base product
    y_i += s_i low_i B_i^T                  added into it (`addmm`, alpha = s_i)

    dx  = sum of g_i W_i, += d_low [A_1; ...]    with d_low_i = s_i g_i B_i

peft computes `result + lora_B(lora_A(x)) * scaling`, which writes the full width of the output three
times more in the forward and as often in the backward. Modules, parameter names, checkpoints and
exports stay peft's: only the forward of its linear layers is replaced. A quantised weight is
unpacked for each product. Dropout, DoRA, biases of lora_B, and layers that are merged or disabled
take peft's own path.
Source: Hu et al., arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class LoraProducts(torch.autograd.Function):
    """See the module. Base weights and biases get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scalings: tuple[float, ...],
        read: tuple[Callable[[Tensor, torch.dtype], Tensor], ...],
        *tensors: Tensor | None,
    ):
        """Return one output per layer.

        Args:
            x: (..., in).
            read: of each layer, (weight parameter, precision) -> its weight (out, in).
            tensors: the weight parameters of all layers, then their biases (out,) or None, their
                A (r, in) and their B (out, r).
        """
        layers = len(scalings)
        weights, biases, downs, ups = (tensors[i * layers : (i + 1) * layers] for i in range(4))
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ _stacked(downs).t()
        outputs, pieces = [], low.split([len(down) for down in downs], dim=1)
        for unpack, weight, bias, up, piece, scaling in zip(
            read, weights, biases, ups, pieces, scalings, strict=True
        ):
            output = F.linear(x, unpack(weight, x.dtype), bias)
            output.view(-1, len(up)).addmm_(piece, up.t(), alpha=scaling)
            outputs.append(output)
        # x itself and not its view: a block may save the very same tensor, or compute it again.
        ctx.save_for_backward(x, low, *weights, *downs, *ups)
        ctx.scalings, ctx.read = scalings, read
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        layers = len(ctx.scalings)
        x, low, *tensors = ctx.saved_tensors
        weights, downs, ups = (tensors[i * layers : (i + 1) * layers] for i in range(3))
        ranks = [len(down) for down in downs]
        rows = x.reshape(-1, x.shape[-1])
        wanted = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]

        low_gradient = torch.empty_like(low)
        up_gradients = []
        for gradient, up, piece, target, scaling in zip(
            wanted,
            ups,
            low.split(ranks, dim=1),
            low_gradient.split(ranks, dim=1),
            ctx.scalings,
            strict=True,
        ):
            torch.mm(gradient, up, out=target)
            target.mul_(scaling)
            up_gradients.append((gradient.t() @ piece).mul_(scaling))
        down_gradients = (low_gradient.t() @ rows).split(ranks)

        x_gradient = None
        if ctx.needs_input_grad[0]:
            for i, (unpack, weight, gradient) in enumerate(
                zip(ctx.read, weights, wanted, strict=True)
            ):
                weight = unpack(weight, x.dtype)
                x_gradient = x_gradient.addmm_(gradient, weight) if i else gradient @ weight
            x_gradient.addmm_(low_gradient, _stacked(downs))
            x_gradient = x_gradient.view(x.shape)
        return (x_gradient, None, None, *[None] * (2 * layers), *down_gradients, *up_gradients)


def _as_it_is(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight


def _stacked(downs) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(downs)


def fuse(model: nn.Module) -> None:
    """Compute a peft model's plain LoRA layers by `LoraProducts`.

    Those of a block's q, k and v share one pass over their input. At stage 3, the weights that one
    function reads must be gathered together: their module is marked as a leaf of DeepSpeed's. For
    q and k that is the attention, because the output of a leaf must not be rotated in place.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    for module in model.modules():
        if projected := [name for name in PROJECTIONS if _is_plain(getattr(module, name, None))]:
            module.project = partial(_project, module, projected)  # type: ignore[assignment]
        elif _is_plain(module):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
        else:
            continue
        module._z3_leaf = partitioned  # type: ignore[assignment]
    if partitioned:
        # DeepSpeed releases a leaf's weights when its input has a gradient, or at once if it needs
        # none, which is before the factors of the first block have theirs.
        body = next(m for m in model.modules() if isinstance(getattr(m, "h", None), nn.ModuleList))
        adapted = [block for block in body.h if any(map(_is_plain, block.modules()))]
        for block in adapted[:1]:
            block.register_forward_pre_hook(_with_gradient)


def _with_gradient(block: nn.Module, arguments: tuple) -> tuple | None:
    x, *rest = arguments
    return None if x.requires_grad or not torch.is_grad_enabled() else (x.requires_grad_(), *rest)


def _is_plain(module: object) -> bool:
    """Tell whether a module is a LoRA layer without dropout, DoRA or biases."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or len(module.lora_A) != 1:
        return False
    (name,) = module.lora_A
    return (
        (type(module.base_layer) is nn.Linear or hasattr(module.base_layer, "unpacked"))
        and isinstance(module.lora_dropout[name], nn.Identity)
        and not module.lora_variant
        and not module.lora_bias[name]
        and not module.fan_in_fan_out
    )


def _is_on(layer: Any) -> bool:
    return not layer.disable_adapters and not layer.merged and bool(layer.active_adapters)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """Forward of one peft layer."""
    return _products([layer], x)[0] if _is_on(layer) else type(layer).forward(layer, x)


def _project(attention: Any, adapted: list[str], x: Tensor) -> tuple[Tensor, ...]:
    """Project x to queries, keys and values, those in `adapted` in one pass."""
    layers = [getattr(attention, name) for name in adapted]
    together = (
        dict(zip(adapted, _products(layers, x), strict=True)) if all(map(_is_on, layers)) else {}
    )
    return tuple(
        together[name] if name in together else getattr(attention, name)(x) for name in PROJECTIONS
    )


def _products(layers: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    names = [next(iter(layer.lora_A)) for layer in layers]
    pairs = list(zip(layers, names, strict=True))
    return LoraProducts.apply(
        x,
        tuple(layer.scaling[name] for layer, name in pairs),
        tuple(getattr(layer.base_layer, "unpacked", _as_it_is) for layer in layers),
        *(layer.base_layer.weight for layer in layers),
        *(layer.base_layer.bias for layer in layers),
        *(layer.lora_A[name].weight for layer, name in pairs),
        *(layer.lora_B[name].weight for layer, name in pairs),
    )
