"""Build a GPT-J and load its weights tensor by tensor, each directly to its final place.

config.json -> module on the meta device (or partitioned, under zero.Init) -> for every parameter:
read, cast, quantise, place.

Sources: safetensors or pytorch_model.bin, sharded or not, in any precision, with the legacy buffers
of the published file. Peak host memory is the weights that are kept there plus the largest tensor.
Random weights are drawn from a seed per parameter, so they do not depend on the number of ranks or
the ZeRO stage. The only contact with DeepSpeed is the context that the caller passes.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GPTJConfig

from finetune.assets.paths import resolve
from finetune.config import HEADS, Dtype, Init, ModelConfig, Quantize, read_gptj_config
from finetune.data.tokenizer import TOKENIZER_FILES
from finetune.errors import UserError
from finetune.files import read_json, refuse_pointer
from finetune.gptj.model import MODELS, copy_config
from finetune.planning.shape import GPTJ_6B_ID

LEGACY = re.compile(r"(\.attn\.(bias|masked_bias|embed_positions)|\.rotary_emb\.inv_freq)$")
DTYPES: dict[str, torch.dtype] = {d.value: getattr(torch, d.torch_name) for d in Dtype}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
PATTERNS = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
]
MAPPED_BYTES = 1 << 26
"""Bytes read from mapped files after which they are mapped anew."""
PIECES, PIECE_BYTES = 128, 1 << 16
"""Read of a file, evenly spread, to recognise it: 8 MiB of one whose whole would take minutes."""
SAMPLED_ROWS = 16
"""Rows of a tensor that recognise it."""
ZIP_MAGIC = b"PK\x03\x04"
Place = Callable[[nn.Parameter, Tensor | None], None]


class Weights:
    """The tensors of a checkpoint directory by name, read one at a time.

    Raises:
        UserError: there are no weights, or a shard is missing, truncated or outside the directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        self._touched = 0
        self._stored: dict[str, str] = {}
        self._whole: set[Path] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, file in _name_to_file(folder, self._handle).items():
            if not LEGACY.search(name):
                self.files[_full_name(name)] = file
        for file in sorted(set(self.files.values())):
            handle = self._handle(file)
            self._stored |= {_full_name(name): name for name in handle.keys()}  # noqa: SIM118 - not always a dict
            if _in_memory(file):
                self._whole.add(file)
                self._shapes |= {
                    _full_name(name): tuple(tensor.shape) for name, tensor in handle.items()
                }

    def _handle(self, file: Path):
        # Pages that were read stay resident for as long as a file is mapped.
        if self._touched > MAPPED_BYTES:
            self._open = {f: handle for f, handle in self._open.items() if f in self._whole}
            self._touched = 0
        if file not in self._open:
            if _in_memory(file):  # it is read whole: one such file at a time
                self._open.clear()
            self._open[file] = open_shard(file)
        return self._open[file]

    def __getitem__(self, name: str) -> Tensor:
        handle = self._handle(self.files[name])
        stored = self._stored[name]
        tensor = handle[stored] if isinstance(handle, dict) else handle.get_tensor(stored)  # type: ignore[union-attr]
        self._touched += tensor.numel() * tensor.element_size()
        return tensor

    def sample(self, name: str, places: list[int] | None = None) -> Tensor:
        """Return some rows of a tensor; places None: `evenly_spaced` ones."""
        if places is None:
            places = evenly_spaced(self.shape(name)[0])
        handle, stored = self._handle(self.files[name]), self._stored[name]
        source = handle[stored] if isinstance(handle, dict) else handle.get_slice(stored)  # type: ignore[union-attr]
        rows = torch.cat([source[place : place + 1] for place in places])
        # The kernel maps the neighbourhood of what is read, at worst all of the tensor.
        self._touched += prod(self.shape(name)) * rows.element_size()
        return rows

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        handle, stored = self._handle(self.files[name]), self._stored[name]
        if isinstance(handle, dict):
            return tuple(handle[stored].shape)
        return tuple(handle.get_slice(stored).get_shape())  # type: ignore[union-attr]


def evenly_spaced(size: int) -> list[int]:
    """Return the rows that recognise a tensor of `size` rows, both ends included."""
    return sorted({(size - 1) * i // (SAMPLED_ROWS - 1) for i in range(SAMPLED_ROWS)})


def _full_name(name: str) -> str:
    """Add the `transformer.` prefix to names from checkpoints of the bare body (`h.0...`)."""
    return f"transformer.{name}" if re.match(r"(h\.\d+|wte|ln_f)\.", name) else name


def _name_to_file(folder: Path, handle: Callable[[Path], Any]) -> dict[str, Path]:
    for index in INDEXES:
        if (folder / index).is_file():
            return _read_index(folder, folder / index)
    for single in SINGLES:
        if (folder / single).is_file():
            file = folder / single
            return {name: file for name in handle(file).keys()}  # noqa: SIM118 - not always a dict
    raise UserError(
        "there are no weights here: neither model.safetensors nor pytorch_model.bin, sharded or "
        "not",
        str(folder),
        "Point model.path at a GPT-J checkpoint, or start fresh with model.init=random.",
    )


def _read_index(folder: Path, index: Path) -> dict[str, Path]:
    refuse_pointer(index)
    try:
        names = read_json(index)["weight_map"]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"not a weight index: {error}", str(index), "Download the file again."
        ) from None
    files = {}
    for name, file in names.items():
        path = folder / file
        if Path(file).name != file:
            raise UserError(
                f"the index sends '{name}' to '{file}', outside its own directory",
                str(index),
                "Refused: an index may only name files beside it.",
            )
        if not path.is_file():
            raise UserError(
                f"the shard {file} is missing", str(index), "Download the missing file."
            )
        files[name] = path
    return files


def refuse_pointers(folder: Path, weights: bool) -> None:
    """Check that git-lfs has fetched the files of a checkpoint that will be read.

    Args:
        weights: whether the weights will be read too, not just config.json and the tokenizer.

    Raises:
        UserError: one of the files is a git-lfs pointer.
    """
    for name in ("config.json", *TOKENIZER_FILES):
        refuse_pointer(folder / name)
    for index in INDEXES if weights else ():
        if (folder / index).is_file():
            for file in sorted(set(_read_index(folder, folder / index).values())):
                refuse_pointer(file)
            return
    for single in SINGLES if weights else ():
        if (folder / single).is_file():
            refuse_pointer(folder / single)
            return


def open_shard(file: Path):
    """Open a weights file and return a handle with `keys()`.

    A safetensors file is memory-mapped. A .bin file becomes a dict of memory-mapped tensors, or of
    tensors in memory if it has the format that torch wrote before 1.6
    (`torch.save(..., _use_new_zipfile_serialization=False)`).
    """
    refuse_pointer(file)
    try:
        if file.suffix == ".safetensors":
            return safe_open(str(file), framework="pt")
        return torch.load(file, map_location="cpu", mmap=not _in_memory(file), weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(
            f"cannot be read, truncated or corrupt: {str(error).splitlines()[0]}",
            str(file),
            "Download or copy the file again and compare its size and hash.",
        ) from None
    except (
        Exception
    ) as error:  # pickle.UnpicklingError: weights_only refused code that the file would run
        raise UserError(
            f"refused: {str(error).splitlines()[0]}",
            str(file),
            "Convert the checkpoint to safetensors with a tool you trust.",
        ) from None


def _in_memory(file: Path) -> bool:
    """Tell whether a .bin file predates torch 1.6: it is no zip archive and cannot be mapped."""
    if file.suffix != ".bin":
        return False
    with file.open("rb") as opened:
        return opened.read(len(ZIP_MAGIC)) != ZIP_MAGIC


def local_folder(cfg: ModelConfig, download: bool = True) -> Path:
    """Return the checkpoint's directory; a hub id is downloaded (only the files that are needed).

    Args:
        download: False only looks on this machine.

    Raises:
        UserError: there is no such directory, or the hub cannot be reached.
    """
    path = Path(resolve(cfg.path)).expanduser()
    if path.is_dir():
        return path
    if cfg.init is Init.random and cfg.path.lower() == GPTJ_6B_ID:
        return Path(resolve("asset:gptj_6b"))
    if cfg.path.count("/") > 1 or cfg.path.startswith((".", "/", "~")):
        raise UserError(f"there is no directory {cfg.path}", "model.path", "Check the path.")
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if cfg.init is Init.random else PATTERNS
    try:
        return Path(
            snapshot_download(
                cfg.path,
                revision=cfg.revision,
                allow_patterns=patterns,
                local_files_only=not download,
            )
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the weights of {cfg.path} are neither on this machine nor can they be downloaded "
            f"({reason[:160]})"
            if download
            else f"the weights of {cfg.path} are not on this machine",
            "model.path",
            "Copy a checkpoint directory here and pass model.path=DIR; or download it where there "
            "is a network:\n"
            f"    hf download {cfg.path}\n"
            "  What runs right now, without them: deepspeed launch/train.py recipe=quickstart",
        ) from None


def tokenizer_of(cfg: ModelConfig) -> str:
    """Return the argument of `load_tokenizer` for this model.

    It is the configured tokenizer, or else the checkpoint's directory, which may hold one.
    """
    return cfg.tokenizer or str(local_folder(cfg))


def weights_identity(folder: Path) -> str:
    """Return a hash that changes with the weight files.

    It covers the names and sizes of the files and `PIECES` pieces of each, both ends included.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(
        p
        for p in folder.iterdir()
        if p.suffix in (".safetensors", ".bin") or p.name == "config.json"
    ):
        last = max(0, file.stat().st_size - PIECE_BYTES)
        digest.update(repr((file.name, file.stat().st_size)).encode())
        with file.open("rb") as f:
            for start in sorted({last * i // (PIECES - 1) for i in range(PIECES)}):
                f.seek(start)
                digest.update(f.read(PIECE_BYTES))
    return digest.hexdigest()


def base_record(folder: Path, head: str) -> dict[str, str]:
    """Return two hashes, of files and of values, that identify an adapter's base weights.

    `same_base` compares them. The values are rows of every tensor that the adapter's head uses,
    rounded to bf16, so other files of the same model (safetensors for .bin, other shards, a copy in
    bf16) give the same hash.
    """
    source, digest = Weights(folder), hashlib.blake2b(digest_size=8)
    used = ("transformer.", "lm_head.") if head == "lm" else ("transformer.",)
    for name in sorted(name for name in source.files if name.startswith(used)):
        values = source.sample(name).to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(repr((name, source.shape(name))).encode() + values.numpy().tobytes())
    return {"files": weights_identity(folder), "values": digest.hexdigest()}


def same_base(folder: Path, head: str, record: dict[str, str]) -> bool:
    """Tell whether the weights in `folder` are the ones in the record of `base_record`.

    The values are read only if the files differ.
    """
    return (
        weights_identity(folder) == record["files"]
        or base_record(folder, head)["values"] == record["values"]
    )


def read_config(folder: Path, cfg: ModelConfig, num_labels: int | None = None) -> GPTJConfig:
    """Read the checkpoint's config and set the dropouts of `cfg` in it.

    Raises:
        UserError: config.json is missing, broken, or not a GPT-J's.
    """
    config = GPTJConfig.from_dict(read_gptj_config(folder))
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if getattr(cfg, name) is not None:
            setattr(config, name, getattr(cfg, name))
    if num_labels is not None:
        config.num_labels = num_labels
    config.use_cache = False
    return config


def build_model(
    cfg: ModelConfig,
    head: str,
    *,
    device: torch.device,
    seed: int,
    num_labels: int | None = None,
    checkpointing: bool | str = False,
    neftune_alpha: float = 0.0,
    partition: AbstractContextManager | None = None,
    place: Place | None = None,
    reads: bool = True,
    change: Callable[[str, Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Build a GPT-J with its weights, in `cfg.dtype` on `device`.

    Args:
        head: lm, classify or qa; a head that the checkpoint lacks is drawn from the seed.
        checkpointing: kind of activation checkpointing in training; one of `recompute.KINDS`.
        neftune_alpha: strength of the noise on embeddings in training; 0: none.
        partition: zero.Init context at stage 3, else None.
        place: writes one tensor into a partitioned parameter (collective); None if nothing is
            partitioned.
        reads: whether this rank reads the files; at stage 3 only one rank does.
        change: (name, host tensor in `cfg.dtype`) -> what takes its place in the model.
        progress: called with the number of elements placed so far.
    """
    folder = local_folder(cfg)
    config = read_config(folder, cfg, num_labels)
    dtype = DTYPES[cfg.dtype.value]

    # The module, without memory for its parameters.
    linear: Callable[..., nn.Module] = nn.Linear
    if cfg.quantize is not Quantize.none:
        # Imported here: bitsandbytes takes seconds, and most runs do without it.
        from finetune.gptj.quantize import QuantizedLinear

        linear = partial(QuantizedLinear, cfg)
    with (
        _no_init(),
        partition or torch.device("meta"),
        _default_dtype(dtype if partition else torch.float32),
    ):
        model = MODELS[head](
            copy_config(config), cfg.attention.value, checkpointing, linear, neftune_alpha
        )

    # The parameters' names and shapes, which must be the checkpoint's.
    names = dict(model.named_parameters())
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in names.items()}
    modules = model.named_modules()
    quantized: dict[str, Any] = {f"{n}.weight": m for n, m in modules if hasattr(m, "pack")}
    shapes |= {name: layer.shape for name, layer in quantized.items()}
    source = Weights(folder) if cfg.init is Init.pretrained and reads else None
    if source is not None:
        _check_names(source, shapes, folder)

    # One parameter at a time: read it or draw it, quantise it, and put it in its place.
    done = 0
    for name, parameter in names.items():
        tensor, layer = None, quantized.get(name)
        if source is not None and name in source.files:
            tensor = source[name]
        elif reads:
            tensor = draw(name, shapes[name], config, seed)
        if tensor is not None and change is not None:
            tensor = change(name, tensor.to(dtype))
        if layer is not None and tensor is not None:
            tensor = layer.pack(tensor.to(device=device, dtype=dtype))
        if place is not None:
            place(parameter, None if tensor is None else tensor.to("cpu", dtype))
        else:
            assert tensor is not None
            fresh = tensor.to(device=device, dtype=dtype)
            # A tensor that is still a view of the file would keep the whole mapping alive.
            if layer is None and fresh.data_ptr() == tensor.data_ptr():
                fresh = fresh.clone()
            owner, _, leaf = name.rpartition(".")
            filled = nn.Parameter(fresh, requires_grad=layer is None)
            setattr(model.get_submodule(owner), leaf, filled)
        done += prod(shapes[name])
        if progress is not None:
            progress(done)
    return model


def meta_model(config: GPTJConfig, head: str) -> nn.Module:
    """Build the module on the meta device: names and shapes without memory for the parameters."""
    with _no_init(), torch.device("meta"):
        return MODELS[head](copy_config(config))


def _check_names(source: Weights, wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Check that the checkpoint has all parameters of the model in their shapes, and no others.

    The heads of classification and QA may be missing, as they are drawn anew. Unused heads are
    ignored.
    """
    heads = tuple(f"{head.module}." for head in HEADS.values())
    missing = [n for n in wanted if n not in source.files and not (n.startswith(heads[1:]))]
    extra = [n for n in source.files if n not in wanted and not n.startswith(heads)]
    shapes = [
        f"{n} is {source.shape(n)}, the config says {s}"
        for n, s in wanted.items()
        if n in source.files and source.shape(n) != s
    ]
    lines = []
    for title, items in (
        ("missing", missing),
        ("not GPT-J's", extra),
        ("of another shape", shapes),
    ):
        if items:
            more = f" ... and {len(items) - 8} more" if len(items) > 8 else ""
            lines.append(f"{len(items)} tensors are {title}: {', '.join(items[:8])}{more}")
    if lines:
        raise UserError("; ".join(lines), str(folder), "Is config.json the one of these weights?")


def draw(name: str, shape: tuple[int, ...], config: GPTJConfig, seed: int) -> Tensor:
    """Draw a new fp32 parameter from (seed, name).

    Matrices follow N(0, initializer_range), biases are zero and layer norm weights are one.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if ".ln_" in name:
        return torch.ones(shape)
    # torch's CPU generator uses only 32 bits of its seed.
    mixed = zlib.crc32(name.encode()) ^ (seed * 2654435761 % 2**32)
    generator = torch.Generator().manual_seed(mixed)
    return torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)


@contextmanager
def _no_init() -> Iterator[None]:
    """Skip torch's own initialisation, because every value is overwritten afterwards."""
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm)
    patches = [mock.patch.object(kind, "reset_parameters", lambda self: None) for kind in kinds]
    with patches[0], patches[1], patches[2]:
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
