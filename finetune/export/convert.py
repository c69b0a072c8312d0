"""A checkpoint in another form, tensor by tensor.

Sources are Hugging Face's layout and mesh-transformer-jax's; a target may also be in Phi's form or a
GGUF file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPTJConfig

from finetune.config import HEADS, ModelConfig
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import RunFailed, UserError
from finetune.export import gguf_file, phi
from finetune.export.hf_files import config_values
from finetune.export.mesh_transformer import MeshReader, write_checkpoint
from finetune.export.safetensors_writer import ShardWriter
from finetune.files import read_json, read_object, write_json
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

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor, in the order of `shapes`."""
        return ((name, self.read(name)) for name in self.shapes)


def open_hf(folder: Path) -> Checkpoint:
    """Open a Hugging Face directory, whatever its head and file format."""
    config = read_config(folder, ModelConfig(path=str(folder)))
    weights = Weights(folder)
    names = sorted(weights.files)
    # A classifier's files may keep the language model's head too.
    head = next(
        h for h in ("classify", "qa", "lm") if h == "lm" or f"{HEADS[h].module}.weight" in names
    )
    shapes = {name: weights.shape(name) for name in names}
    dtype = weights["transformer.ln_f.weight"].dtype
    return Checkpoint(config, head, shapes, weights.__getitem__, dtype)


def open_mesh(
    folder: Path, config_file: str | None, n_head: int | None, rotary_dim: int | None
) -> Checkpoint:
    """Open a checkpoint of mesh-transformer-jax.

    Its arrays do not tell the heads: they come from its config file, or from `n_head` and
    `rotary_dim`.

    Raises:
        UserError: neither is given for another model than GPT-J-6B, or they do not fit.
    """
    reader = MeshReader(folder)
    sizes = {
        "n_embd": reader.width,
        "n_layer": reader.layers,
        "n_inner": reader.inner,
        "vocab_size": reader.vocabulary,
    }
    if config_file:
        try:
            values = read_json(Path(config_file).expanduser())
            heads = {"n_head": int(values["n_heads"]), "rotary_dim": int(values["pe_rotary_dims"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"not a mesh-transformer-jax config: {error!r}",
                config_file,
                "It needs n_heads and pe_rotary_dims.",
            ) from None
    elif n_head and rotary_dim:
        heads = {"n_head": n_head, "rotary_dim": rotary_dim}
    elif all(sizes[key] == ORIGINAL[key] for key in ("n_embd", "n_layer")):
        heads = {key: ORIGINAL[key] for key in ("n_head", "rotary_dim")}
    else:
        raise UserError(
            "the arrays do not tell the number of heads, and this is not GPT-J-6B",
            "n_head",
            "Pass config=6B_roto_256.json (the training's own file), or n_head=N rotary_dim=N.",
        )
    width = reader.width
    if width % heads["n_head"] or heads["rotary_dim"] > width // heads["n_head"]:
        raise UserError(f"{heads} do not fit a width of {width}", "n_head", "Check both numbers.")

    config = GPTJConfig(
        **sizes,
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


def as_phi(source: Checkpoint) -> Checkpoint:
    """Return the same model in Phi's form; its tensors are made one at a time, as they are read.

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

    return replace(source, shapes=phi.shapes(source.shapes, source.config), read=read)


def write_hf(
    source: Checkpoint,
    folder: Path,
    stage: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    in_phi_form: bool = False,
) -> None:
    """Write a Hugging Face directory of safetensors files of at most `shard_bytes` each into `stage`.

    Args:
        folder: of the source, whose tokenizer and settings are kept.
    """
    writer = ShardWriter(stage, source.shapes, dtype, shard_bytes)
    for name, tensor in source.tensors():
        writer.add(name, cast(name, tensor, dtype))
    writer.close()

    short = next(key for key, value in DTYPES.items() if value == dtype)
    about = read_object(folder / "finetune.json")
    # The card of an export tells the precision, the files and the proof of that export.
    for name in KEPT if about else (*KEPT, "README.md"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, stage / name)
    if about and not in_phi_form:  # finetune.json describes an export for GPT-J
        write_json(stage / "finetune.json", about | {"dtype": short})
    tokenizer = load_tokenizer(str(folder))
    if not (stage / "tokenizer.json").exists():
        tokenizer.save_pretrained(str(stage))
    values = read_object(folder / "config.json") or config_values(
        source.config, "lm", "", short, {}, tokenizer
    )
    values.pop("torch_dtype", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    values["architectures"] = [HEADS[source.head].architecture]
    if in_phi_form:
        values = phi.config_values(source.config, source.head, values)
    write_json(stage / "config.json", values)


def write_gguf(source: Checkpoint, folder: Path, stage: Path, dtype: str, name: str) -> None:
    """Write model.gguf.

    Raises:
        UserError: the source is no language model, or the gguf package is missing.
    """
    check_language_model(source, "GGUF")
    gguf_file.check_form(source.config, source.head)
    tokenizer = load_tokenizer(str(folder))
    file = stage / gguf_file.MODEL_FILE
    gguf_file.write_gguf(
        source.tensors(), source.shapes, source.config, tokenizer, file, dtype, name
    )


def write_mesh(
    source: Checkpoint, stage: Path, dtype: torch.dtype, count: int, step: int | None
) -> None:
    """Write a slim checkpoint of mesh-transformer-jax, cut for `count` cores, into `stage`; step None: the source's."""
    config = source.config
    check_language_model(source, "mesh-transformer-jax")
    inner = config.n_inner or 4 * config.n_embd
    if any(n % count for n in (config.vocab_size, config.n_embd, config.n_head, inner)):
        raise UserError(
            f"shards = {count} does not divide vocabulary {config.vocab_size}, width "
            f"{config.n_embd}, {config.n_head} heads and inner width {inner}",
            "shards",
            "Try shards=1.",
        )
    write_checkpoint(
        stage,
        config.n_layer,
        count,
        dtype,
        lambda name: cast(name, source.read(name), dtype),
        step if step is not None else source.step,
    )


def check_language_model(source: Checkpoint, form: str) -> None:
    """Check that a source has the one head that a form knows.

    Raises:
        UserError: it has another head, or none.
    """
    if source.head != "lm" or "lm_head.bias" not in source.shapes:
        raise UserError(f"{form} has language models only", "source", "Use to=hf or to=phi.")


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor once; never to infinity.

    Raises:
        RunFailed: fp16 cannot hold a value.
    """
    rounded = tensor.to(dtype)
    overflows = dtype == torch.float16 and bool(torch.isinf(rounded).any())
    if overflows and not bool(torch.isinf(tensor).any()):
        raise RunFailed(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, beyond fp16's 65504",
            "dtype",
            "Use dtype=bf16.",
        )
    return rounded


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
