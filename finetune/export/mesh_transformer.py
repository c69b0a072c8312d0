"""Read and write checkpoints of mesh-transformer-jax, GPT-J's trainer, one tensor at a time.

    step_383500/
      shard_0/ 0.npz .. 15.npz      the first core's part of every parameter
      ..
      shard_7/ 0.npz .. 15.npz

The state is a pytree {"params": {module: {"b" or "w" or ..: array}}, "step": ()}, flattened with
sorted keys (so layer_10 comes before layer_2) and cut into 16 files of nearly equal counts. A full
checkpoint starts with the optimizer's leaves; a slim one, as `slim_model.py` writes it, has none.
bfloat16 arrays have numpy's type V2. The format is described by mesh_transformer/checkpoint.py,
layers.py and slim_model.py of github.com/kingoflolz/mesh-transformer-jax.

Arrays of one core, with width d and S cores, and the torch tensors that they become (torch's
weights are the transposes):

    embedding_shard   w (V/S, d) b (d,)      wte = rows joined, plus the sum of b, as each core
                                             adds its own b
    linear, _1, _2    w (d, d/S)             q_proj, v_proj, k_proj: columns joined
    linear_3          w (d/S, d)             out_proj: rows joined
    linear_4          w (d, 4d/S) b (4d/S,)  fc_in: columns joined
    linear_5          w (4d/S, d) b (d,)     fc_out: rows joined, b summed
    replicated_layer_norm scale, offset (d,) ln_1, ln_f: the first core's count
    projection_shard  w (d, V/S) b (V/S,)    lm_head: columns joined
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from finetune.errors import UserError

PIECES = 16
"""Files of one shard."""
ROWS, COLUMNS, SUM, FIRST = "rows", "columns", "sum", "first"
LAYER = [
    ("linear/w", "attn.q_proj.weight", COLUMNS),
    ("linear_1/w", "attn.v_proj.weight", COLUMNS),
    ("linear_2/w", "attn.k_proj.weight", COLUMNS),
    ("linear_3/w", "attn.out_proj.weight", ROWS),
    ("linear_4/b", "mlp.fc_in.bias", COLUMNS),
    ("linear_4/w", "mlp.fc_in.weight", COLUMNS),
    ("linear_5/b", "mlp.fc_out.bias", SUM),
    ("linear_5/w", "mlp.fc_out.weight", ROWS),
    ("replicated_layer_norm/offset", "ln_1.bias", FIRST),
    ("replicated_layer_norm/scale", "ln_1.weight", FIRST),
]
EMBEDDING_BIAS = "(embedding bias)"
"""The one leaf that GPT-J in torch has no parameter for."""


@dataclass
class Leaf:
    """One array of the flattened state."""

    name: str
    """As in GPTJForCausalLM's state dict, EMBEDDING_BIAS or "step"."""
    how: str
    """How the cores' parts make the whole."""


def leaves(layers: int) -> list[Leaf]:
    """Return the slim state's leaves in the order of the files."""
    found = [Leaf(EMBEDDING_BIAS, SUM), Leaf("transformer.wte.weight", ROWS)]
    for layer in sorted(range(layers), key=str):
        found += [Leaf(f"transformer.h.{layer}.{name}", how) for _, name, how in LAYER]
    return [
        *found,
        Leaf("lm_head.bias", COLUMNS),
        Leaf("lm_head.weight", COLUMNS),
        Leaf("transformer.ln_f.bias", FIRST),
        Leaf("transformer.ln_f.weight", FIRST),
        Leaf("step", FIRST),
    ]


def transposed(name: str) -> bool:
    """Tell whether torch stores the transpose: every matrix but the embedding."""
    return name.endswith(".weight") and ".ln_" not in name and not name.endswith("wte.weight")


def is_mesh(folder: Path) -> bool:
    return (folder / "shard_0" / "0.npz").is_file()


class MeshReader:
    """Reader of a checkpoint's whole tensors, by torch's names.

    Raises:
        UserError: a shard or file is missing or damaged, or the arrays are not GPT-J's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        count = len([p for p in folder.iterdir() if p.name.startswith("shard_")])
        self.shards = [folder / f"shard_{i}" for i in range(count)]
        self.places = places(self.shards[0])
        for shard in self.shards[1:]:
            if places(shard) != self.places:
                raise UserError(
                    "this shard holds other arrays than shard_0",
                    str(shard),
                    "Copy the checkpoint again.",
                )
        self.layers, skipped = self._layers()
        self.leaves = {leaf.name: (leaf, skipped + i) for i, leaf in enumerate(leaves(self.layers))}
        self.width = self._part(EMBEDDING_BIAS).shape[0]
        self.vocabulary = self._part("transformer.wte.weight").shape[0] * count
        self.inner = self._part("transformer.h.0.mlp.fc_in.bias").shape[0] * count
        self.dtype = self.read("transformer.ln_f.weight").dtype
        self.step = int(self._part("step"))

    def read(self, name: str) -> Tensor:
        """Return one whole tensor in torch's layout; sums are made in fp32 and rounded once."""
        how = self.leaves[name][0].how
        shards = range(len(self.shards) if how != FIRST else 1)
        parts = [self._part(name, shard) for shard in shards]
        if how in (ROWS, COLUMNS):
            whole = torch.cat(parts, 0 if how == ROWS else -1)
        else:
            whole = parts[0].float()
            for part in parts[1:]:
                whole = whole + part.float()
            whole = whole.to(parts[0].dtype)
        if name == "transformer.wte.weight":
            bias = self.read(EMBEDDING_BIAS)
            if bool(bias.any()):
                whole = (whole.float() + bias.float()).to(whole.dtype)
        return whole.T.contiguous() if transposed(name) else whole.contiguous()

    def _part(self, leaf: str | int, shard: int = 0) -> Tensor:
        """Return one core's part of a leaf, given by name or place."""
        file, member = self.places[leaf if isinstance(leaf, int) else self.leaves[leaf][1]]
        path = self.shards[shard] / file
        try:
            with np.load(path, allow_pickle=False) as opened:
                array = opened[member]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot be read: {error}", str(path), "Copy the file again.") from None
        if array.dtype == np.dtype("V2"):
            return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _layers(self) -> tuple[int, int]:
        """Return the number of layers and of the optimizer's leaves in front of the parameters."""
        total = len(self.places)
        slim = self._part(0).ndim == 1
        if slim and (total - 7) % 10 == 0:
            return (total - 7) // 10, 0
        # A full checkpoint: the optimizer's counters, then both moments of every parameter.
        for scalars in range(1, 5):
            layers, rest = divmod(total - 19 - scalars, 30)
            if not slim and rest == 0 and layers > 0:
                return layers, total - (10 * layers + 7)
        raise UserError(
            f"{total} arrays are neither a slim nor a full GPT-J checkpoint",
            str(self.folder),
            "A slim checkpoint has 10 for each layer and 7 more.",
        )


def places(shard: Path) -> list[tuple[str, str]]:
    """Return (file, member) of each leaf, in order."""
    found = []
    for i in range(PIECES):
        path = shard / f"{i}.npz"
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"cannot be read: {error}",
                str(path),
                f"Every shard has {PIECES} files; copy it again.",
            ) from None
        found += [(path.name, f"arr_{n}") for n in range(len(names))]
    return found


def write_checkpoint(
    folder: Path,
    layers: int,
    shards: int,
    dtype: torch.dtype,
    tensor_of: Callable[[str], Tensor],
    step: int,
) -> None:
    """Write a slim checkpoint leaf by leaf, in the files' order, all shards at once.

    Args:
        dtype: of every parameter.
        tensor_of: name -> whole tensor in torch's layout.
    """

    def parts(leaf: Leaf) -> Iterator[np.ndarray]:
        """Yield every core's part of a leaf."""
        if leaf.name == "step":
            yield from [np.array(step, np.int32)] * shards
            return
        if leaf.name == EMBEDDING_BIAS:
            # torch has it inside wte; adding -0.0 changes nothing, not even a sign.
            whole = torch.full_like(tensor_of("transformer.ln_f.bias"), -0.0, dtype=dtype)
        else:
            whole = tensor_of(leaf.name).to(dtype)
        whole = whole.T if transposed(leaf.name) else whole
        if leaf.how in (ROWS, COLUMNS):
            cut = whole.chunk(shards, 0 if leaf.how == ROWS else -1)
        else:
            rest = whole if leaf.how == FIRST else torch.full_like(whole, -0.0)
            cut = [whole] + [rest] * (shards - 1)
        for part in cut:
            part = part.contiguous()
            is_bf16 = part.dtype == torch.bfloat16
            yield part.view(torch.uint16).numpy().view("V2") if is_bf16 else part.numpy()

    order = leaves(layers)
    size, more = divmod(len(order), PIECES)
    waiting = iter(order)
    for piece in range(PIECES):
        with ExitStack() as stack:
            archives = []
            for i in range(shards):
                path = folder / f"shard_{i}" / f"{piece}.npz"
                path.parent.mkdir(parents=True, exist_ok=True)
                archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
                archives.append(stack.enter_context(archive))
            # Counts differ by one at most; the first files have more.
            for member, leaf in enumerate(islice(waiting, size + (piece < more))):
                for archive, part in zip(archives, parts(leaf), strict=True):
                    with archive.open(f"arr_{member}.npy", "w", force_zip64=True) as f:
                        npy.write_array(f, part, allow_pickle=False)
