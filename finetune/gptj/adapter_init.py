"""LoRAs that begin as the principal components of the base's weights (`adapter.init`).

    pissa   W = U S V^T    A0 = sqrt(S_r / s) V_r^T    B0 = U_r sqrt(S_r / s)    arXiv:2404.02948
    olora   W = Q R        A0 = first r rows of R      B0 = first r columns of Q    arXiv:2406.01775

with r the rank and s the scale. Training computes with the residual W - s B0 A0 in place of W, so
that its first step sees the function of the base. Outside training the base is W, on which a trained
pair (A, B) is a LoRA of rank 2r and the same scale:

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]

A0 and B0 are computed once, by rank 0, and kept in the run directory, as the decomposition of another
machine would differ. Both are in the base's precision. The residual is computed in fp32 on the host
and rounded once to that precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from math import sqrt
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor, nn

from finetune.config import AdapterConfig, Config, Init, LoraConfig
from finetune.errors import RunFailed, UserError
from finetune.files import write_atomic
from finetune.gptj.adapter_start import write_parameter
from finetune.gptj.load import (
    DTYPES,
    Place,
    Weights,
    draw,
    local_folder,
    open_shard,
    read_config,
)
from finetune.planning.shape import PEFT_PREFIX, ModelShape, Shape, load_shape

FILE = "adapter_init.safetensors"
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""Endings of the names of A and B in a peft model."""
EXACT_SIDE = 1024
"""Smaller side up to which a weight is decomposed exactly; larger ones by subspace iteration."""
ITERATIONS, OVERSAMPLED = 16, 16
"""Of subspace iteration (arXiv:0909.4061): its steps, and vectors beyond the rank."""


def starts_from_base(adapter: AdapterConfig) -> TypeGuard[LoraConfig]:
    """Tell whether an adapter begins as components of the base's weights."""
    return isinstance(adapter, LoraConfig) and adapter.init != "default"


def init_problems(cfg: Config) -> Iterator[UserError]:
    """Yield the problem of a rank that exceeds a weight's smaller side, which has no more components."""
    adapter = cfg.adapter
    if not starts_from_base(adapter):
        return
    with suppress(UserError):  # a model that cannot be read is reported elsewhere
        shape = load_shape(str(local_folder(cfg.model, download=False)))
        side = min(shape.n_embd, shape.n_inner)
        if adapter.rank > side:
            yield UserError(
                f"adapter.rank = {adapter.rank}: the weights of this model have {side} components "
                f"for adapter.init={adapter.init} to begin from",
                remedy=f"Try adapter.rank={min(16, side)}, or adapter.init=default.",
            )


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A0 (r, in) and B0 (out, r) of the largest singular values of an fp32 weight."""
    if min(weight.shape) <= EXACT_SIDE:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        width = min(rank + OVERSAMPLED, *weight.shape)
        u, s, v = torch.svd_lowrank(weight, width, niter=ITERATIONS)
        vt = v.t()
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A0 (r, in) and B0 (out, r) of the QR decomposition of an fp32 weight.

    The first columns of Q depend on the first columns of the weight alone.
    """
    q, _ = torch.linalg.qr(weight[:, :rank])
    return (q.t() @ weight).triu(), q


COMPONENTS = {"pissa": pissa, "olora": olora}


def shapes_of(adapter: LoraConfig, folder: Path) -> dict[str, Shape]:
    """Return the names and shapes of A0 and B0, as those of the trained A and B.

    Args:
        folder: of the base model.
    """
    tensors = ModelShape.from_config(folder).trainable_tensors(adapter)
    return {name: shape for name, shape in tensors if name.endswith((DOWN, UP))}


def write_init(
    cfg: Config, file: Path, device: torch.device, progress: Callable[[int, int], None]
) -> None:
    """Compute A0 and B0 of every adapted weight, and write them in one piece.

    Args:
        device: where the decompositions are computed.
        progress: called with the number of weights that are done, and that of all.

    Raises:
        RunFailed: the file could not be written.
    """
    adapter, folder, dtype = cfg.adapter, local_folder(cfg.model), DTYPES[cfg.model.dtype.value]
    assert starts_from_base(adapter)
    config, shapes = read_config(folder, cfg.model), shapes_of(adapter, folder)
    source = Weights(folder) if cfg.model.init is Init.pretrained else None
    layers = [name.removesuffix(DOWN) for name in shapes if name.endswith(DOWN)]
    tensors: dict[str, Tensor] = {}
    for done, layer in enumerate(layers, 1):
        name = f"{layer.removeprefix(PEFT_PREFIX)}.weight"
        if source is not None:
            weight = source[name]
        else:
            size = (shapes[layer + UP][0], shapes[layer + DOWN][1])
            weight = draw(name, size, config, cfg.seed)
        torch.manual_seed(cfg.seed)  # subspace iteration begins from random vectors
        weight = weight.to(dtype).to(device, torch.float32)
        down, up = COMPONENTS[adapter.init](weight, adapter.rank, adapter.scale)
        tensors[layer + DOWN] = down.to("cpu", dtype).contiguous()
        tensors[layer + UP] = up.to("cpu", dtype).contiguous()
        progress(done, len(layers))
    try:
        write_atomic(file, save(tensors))
    except OSError as error:
        reason, remedy = f"could not be written: {error}", "Free some space, and start again."
        raise RunFailed(reason, str(file), remedy) from None


class AdapterInit:
    """A0 and B0 of a run, read from its file one tensor at a time.

    Args:
        folder: of the base model.

    Raises:
        UserError: the file is missing, damaged, or of other shapes.
    """

    def __init__(self, adapter: LoraConfig, folder: Path, file: Path):
        kind = f"the adapter began from (adapter.init={adapter.init}, adapter.rank={adapter.rank})"
        remedy = (
            "It belongs to the run's checkpoints: put back the file that the run wrote, or start "
            "anew with resume=never."
        )
        if not file.is_file():
            raise UserError(f"the matrices that {kind} are missing", str(file), remedy)
        self.adapter, self.shapes = adapter, shapes_of(adapter, folder)
        self.handle: Any = open_shard(file)
        names = self.handle.keys()
        stored = {name: tuple(self.handle.get_slice(name).get_shape()) for name in names}
        if stored != self.shapes:
            raise UserError(f"these are not the matrices that {kind}", str(file), remedy)

    def residual(self, name: str, weight: Tensor) -> Tensor:
        """Return W - s B0 A0 of a host tensor of the base in its precision; others as they are."""
        layer = f"{PEFT_PREFIX}{name}".removesuffix(".weight")
        if layer + DOWN not in self.shapes:
            return weight
        down, up = (self.handle.get_tensor(layer + end).float() for end in (DOWN, UP))
        exact = weight.to(torch.float32, copy=True).addmm_(up, down, alpha=-self.adapter.scale)
        return exact.to(weight.dtype)

    def fill(self, module: nn.Module, place: Place) -> None:
        """Let A and B of a peft model begin as A0 and B0.

        Args:
            place: writes a tensor into a parameter that ZeRO-3 has partitioned (collective).
        """
        for name, parameter in module.named_parameters():
            if name in self.shapes:
                write_parameter(parameter, self.handle.get_tensor(name), place)

    def on_base(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return trained tensors by name with each A and B extended by A0 and -B0: for W as it was."""
        extended = dict(trained)
        for name in self.shapes:
            tensor, first = trained[name], self.handle.get_tensor(name).to(trained[name].dtype)
            down = name.endswith(DOWN)
            extended[name] = torch.cat([tensor, first if down else -first], dim=0 if down else 1)
        return extended

    def settings_on_base(self) -> dict[str, Any]:
        """Return rank and alpha in adapter_config.json of `on_base`: twice the rank, the same scale."""
        alpha = self.adapter.alpha * (sqrt(2) if self.adapter.rslora else 2)
        return {"r": 2 * self.adapter.rank, "lora_alpha": alpha}


def read_init(cfg: Config, run_dir: Path) -> AdapterInit | None:
    """Return what a run's adapter began from; None if it does not begin from the base's weights."""
    adapter = cfg.adapter
    if not starts_from_base(adapter):
        return None
    return AdapterInit(adapter, local_folder(cfg.model), run_dir / FILE)
