"""A checkpoint in another form, tensor by tensor: Hugging Face's layout and mesh-transformer-jax's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPTJConfig

from finetune.config import HEADS, ModelConfig
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import RunFailed, UserError
from finetune.export import gguf_file, phi
from finetune.export.hf_files import config_values
from finetune.export.mesh_transformer import MeshReader, MeshWriter
from finetune.export.safetensors_writer import ShardWriter
from finetune.files import read_json, write_json
from finetune.gptj.load import DTYPES, Weights, meta_model, read_config

KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "README.md",
    "finetune.json",
)
ORIGINAL = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}
"""GPT-J-6B, whose heads need not be told."""


@dataclass
class Checkpoint:
    """Tensors by name, read one at a time."""

    config: GPTJConfig
    head: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    dtype: torch.dtype
    step: int = 0


def open_hf(folder: Path) -> Checkpoint:
    """A Hugging Face directory, whatever its head and file format."""
    config = read_config(folder, ModelConfig(path=str(folder)))
    weights = Weights(folder)
    names = sorted(weights.files)
    # A classifier's files may keep the language model's head too.
    head = next(
        h for h in ("classify", "qa", "lm") if h == "lm" or f"{HEADS[h].module}.weight" in names
    )
    shapes = {name: weights.shape(name) for name in names}
    return Checkpoint(
        config, head, shapes, weights.__getitem__, weights["transformer.ln_f.weight"].dtype
    )


def open_mesh(
    folder: Path, config_file: str | None, n_head: int | None, rotary_dim: int | None
) -> Checkpoint:
    """A checkpoint of mesh-transformer-jax; heads come from its config file or from `n_head` and `rotary_dim`."""
    reader = MeshReader(folder)
    known = {
        "n_embd": reader.width,
        "n_layer": reader.layers,
        "n_inner": reader.inner,
        "vocab_size": reader.vocabulary,
    }
    heads = _heads(config_file, n_head, rotary_dim, known)
    config = GPTJConfig(
        **known,
        **heads,
        n_positions=2048,
        bos_token_id=50256,
        eos_token_id=50256,
        tie_word_embeddings=False,
    )
    shapes = {name: tuple(p.shape) for name, p in meta_model(config, "lm").named_parameters()}

    def read(name: str) -> Tensor:
        tensor = reader.read(name)
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{name} is {tuple(tensor.shape)}, GPT-J's would be {shapes[name]}", str(folder)
            )
        return tensor

    return Checkpoint(config, "lm", shapes, read, reader.dtype, reader.step)


def _heads(
    config_file: str | None, n_head: int | None, rotary_dim: int | None, known: dict[str, int]
) -> dict[str, int]:
    """The numbers that arrays do not tell."""
    if config_file:
        try:
            values = read_json(Path(config_file).expanduser())
            found = {"n_head": int(values["n_heads"]), "rotary_dim": int(values["pe_rotary_dims"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"not a mesh-transformer-jax config: {error!r}",
                config_file,
                "It needs n_heads and pe_rotary_dims.",
            ) from None
    elif n_head and rotary_dim:
        found = {"n_head": n_head, "rotary_dim": rotary_dim}
    elif known["n_embd"] == ORIGINAL["n_embd"] and known["n_layer"] == ORIGINAL["n_layer"]:
        found = {key: ORIGINAL[key] for key in ("n_head", "rotary_dim")}
    else:
        raise UserError(
            "the arrays do not tell the number of heads, and this is not GPT-J-6B",
            "n_head",
            "Pass config=6B_roto_256.json (the training's own file), or n_head=N rotary_dim=N.",
        )
    if (
        known["n_embd"] % found["n_head"]
        or found["rotary_dim"] > known["n_embd"] // found["n_head"]
    ):
        raise UserError(
            f"{found} do not fit a width of {known['n_embd']}", "n_head", "Check both numbers."
        )
    return found


def as_phi(source: Checkpoint) -> Checkpoint:
    """The same model in Phi's form: its tensors are made one at a time, as they are read.

    Raises:
        UserError: its head or activation has no counterpart.
    """
    phi.check_form(source.config, source.head)
    made_of = {
        new: name
        for name in source.shapes
        for new in phi.shapes({name: source.shapes[name]}, source.config)
    }

    def read(new: str) -> Tensor:
        name = made_of[new]
        return dict(phi.convert(name, source.read(name), source.config))[new]

    shapes = phi.shapes(source.shapes, source.config)
    return Checkpoint(source.config, source.head, shapes, read, source.dtype, source.step)


def write_hf(
    source: Checkpoint,
    folder: Path,
    stage: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    in_phi_form: bool = False,
) -> None:
    """Write a Hugging Face directory of safetensors files of at most `shard_bytes` each into `stage`."""
    writer = ShardWriter(stage, source.shapes, dtype, shard_bytes)
    for name in source.shapes:
        writer.add(name, _cast(name, source.read(name), dtype))
    writer.close()
    short = next(key for key, value in DTYPES.items() if value == dtype)
    about = folder / "finetune.json"
    for name in KEPT:
        # The card of an export tells the precision, the files and the proof of that export.
        if (folder / name).is_file() and not (name == "README.md" and about.is_file()):
            shutil.copyfile(folder / name, stage / name)
    if about.is_file():
        write_json(stage / about.name, read_json(about) | {"dtype": short})
    tokenizer = load_tokenizer(str(folder))
    if not (stage / "tokenizer.json").exists():
        tokenizer.save_pretrained(str(stage))
    file = folder / "config.json"
    values: dict[str, Any] = (
        read_json(file)
        if file.is_file()
        else config_values(source.config, "lm", "", short, {}, tokenizer)
    )
    values.pop("torch_dtype", None)
    values |= {
        "dtype": str(dtype).removeprefix("torch."),
        "architectures": [HEADS[source.head].architecture],
    }
    if in_phi_form:
        values = phi.config_values(source.config, source.head, values)
        (stage / "finetune.json").unlink(missing_ok=True)  # it describes an export for GPT-J
    write_json(stage / "config.json", values)


def write_gguf_file(
    source: Checkpoint, folder: Path, stage: Path, dtype: str, name: str
) -> Callable[[], None]:
    """Write model.gguf; return the function that reads it back and compares every byte.

    Raises:
        UserError: the source is no language model, or the gguf package is missing.
    """
    if source.head != "lm" or "lm_head.bias" not in source.shapes:
        raise UserError("GGUF files hold language models", "source", "Use to=phi.")
    phi.check_form(source.config, "lm")
    file = stage / "model.gguf"
    tensors = ((key, source.read(key)) for key in source.shapes)
    gguf_file.write_gguf(
        tensors, source.shapes, source.config, load_tokenizer(str(folder)), file, dtype, name
    )

    def compare() -> None:
        tensors = ((key, source.read(key)) for key in source.shapes)
        gguf_file.compare(tensors, source.config, file, dtype)

    return compare


def write_mesh(
    source: Checkpoint, stage: Path, dtype: torch.dtype, count: int, step: int | None
) -> None:
    """Write a slim checkpoint of mesh-transformer-jax, cut for `count` cores, into `stage`; step None: the source's."""
    config = source.config
    if source.head != "lm" or "lm_head.bias" not in source.shapes:
        raise UserError("mesh-transformer-jax has language models only", "source", "Use to=hf.")
    inner = config.n_inner or 4 * config.n_embd
    if any(n % count for n in (config.vocab_size, config.n_embd, config.n_head, inner)):
        raise UserError(
            f"shards = {count} does not divide vocabulary {config.vocab_size}, width {config.n_embd}, "
            f"{config.n_head} heads and inner width {inner}",
            "shards",
            "Try shards=1.",
        )
    writer = MeshWriter(stage, config.n_layer, count, dtype)
    writer.write(
        lambda name: _cast(name, source.read(name), dtype),
        step if step is not None else source.step,
    )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once; never to infinity.

    Raises:
        RunFailed: fp16 cannot hold a value.
    """
    cast = tensor.to(dtype)
    if (
        dtype == torch.float16
        and bool(torch.isinf(cast).any())
        and not bool(torch.isinf(tensor).any())
    ):
        raise RunFailed(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, beyond fp16's 65504",
            "dtype",
            "Use dtype=bf16.",
        )
    return cast


def compare(
    source: Checkpoint, written: Callable[[str], Tensor], dtype: torch.dtype, stage: Path
) -> None:
    """Compare what was read back with the source, bit by bit.

    Raises:
        RunFailed: a tensor differs.
    """
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for name in source.shapes:
        a, b = source.read(name).to(dtype).contiguous(), written(name).contiguous()
        if a.shape != b.shape or b.dtype != dtype or not torch.equal(a.view(bits), b.view(bits)):
            raise RunFailed(
                f"{name} read back from the target is not what was written",
                str(stage),
                "The disk may be failing; try another target.",
            )
