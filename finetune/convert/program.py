"""`launch/convert.py`: a checkpoint in another form. Tensor by tensor: the largest tensor is all that memory holds.

source: a Hugging Face directory (.safetensors or .bin, sharded or not, with GPT-J's legacy buffers) or a checkpoint of
mesh-transformer-jax -> target: a Hugging Face directory of sharded safetensors, or a slim mesh-transformer-jax
checkpoint. What was written is read back and compared bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPTJConfig

from finetune.app import Composed
from finetune.assets_path import resolve
from finetune.config import ModelConfig
from finetune.convert.mesh import MeshReader, MeshWriter, is_mesh
from finetune.data.tokenizer import load_tokenizer
from finetune.display import silence_libraries, summary_table
from finetune.errors import EXIT_DONE, RunFailed, UserError, gib
from finetune.gptj.load import DTYPES, Weights, meta_model, read_config
from finetune.gptj.model import ARCHITECTURES
from finetune.hf_layout import config_values
from finetune.programs import ConvertConfig
from finetune.shards import ShardWriter, write_json
from finetune.words import command, setting

KEPT = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
        "added_tokens.json", "chat_template.jinja", "generation_config.json", "README.md", "finetune.json")
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


def run(composed: Composed) -> int:
    """Convert one checkpoint; prints what was written."""
    cfg: ConvertConfig = composed.config
    silence_libraries(cfg.verbose, 0)
    _check(cfg)
    assert cfg.source and cfg.target
    folder, target = Path(resolve(cfg.source)).expanduser().absolute(), Path(cfg.target).expanduser().absolute()
    source = open_mesh(folder, cfg) if is_mesh(folder) else open_hf(folder)
    dtype = DTYPES[cfg.dtype.value] if cfg.dtype else source.dtype
    if dtype not in DTYPES.values():
        raise UserError(f"the source's precision is {dtype}", "dtype", "Choose one: dtype=bf16, fp16 or fp32.")
    stage = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
        if cfg.to == "jax":
            _write_mesh(source, stage, dtype, cfg)
        else:
            _write_hf(source, folder, stage, dtype, cfg)
        if cfg.verify:
            _compare(source, MeshReader(stage).read if cfg.to == "jax" else Weights(stage).__getitem__, dtype, stage)
        if target.exists():
            target.rmdir()
        stage.rename(target)
    except OSError as error:
        raise RunFailed(f"the target could not be written: {error}", str(target), "Free some space.") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    summary_table("converted", [("from", str(folder)), ("to", str(target)), ("tensors", str(len(source.shapes))),
                                ("precision", str(dtype).removeprefix("torch.")), ("size", gib(size)),
                                ("read back", "equal bit by bit" if cfg.verify else "no")])
    return EXIT_DONE


def _check(cfg: ConvertConfig) -> None:
    if not cfg.source or not cfg.target:
        raise UserError("source=DIR and target=DIR are both needed",
                        remedy="python launch/convert.py source=gpt-j-6b target=gpt-j-6b-bf16 dtype=bf16")
    if cfg.to not in ("hf", "jax"):
        raise UserError(f"to = {cfg.to} is unknown", "to", "Choose from hf, jax.")
    if cfg.max_shard_gib <= 0 or cfg.shards < 1:
        raise UserError("max_shard_gib and shards must be above 0", remedy="Try max_shard_gib=5 shards=8.")
    folder, target = Path(resolve(cfg.source)).expanduser(), Path(cfg.target).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}", "source", "Check the path.")
    if (folder / "adapter_config.json").is_file() and not any(
            (folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        run = folder.absolute().parent
        merge = command(["python", "launch/export.py", setting("run", run), "kind=merged"]) if (
            run / "config.yaml").is_file() else "python launch/export.py run=RUN kind=merged"
        raise UserError("this is an adapter: it has no weights of the model in it", str(folder),
                        f"Merge it first, and convert what that writes: {merge}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("the target exists and is not empty", str(target), "Choose another with target=DIR.")


def open_hf(folder: Path) -> Checkpoint:
    """A Hugging Face directory, whatever its head and file format."""
    config = read_config(folder, ModelConfig(path=str(folder)))
    weights = Weights(folder)
    names = sorted(weights.files)
    head = "classify" if "score.weight" in names else "qa" if "qa_outputs.weight" in names else "lm"
    shapes = {name: weights.shape(name) for name in names}
    return Checkpoint(config, head, shapes, weights.__getitem__, weights["transformer.ln_f.weight"].dtype)


def open_mesh(folder: Path, cfg: ConvertConfig) -> Checkpoint:
    """A checkpoint of mesh-transformer-jax; heads come from its config file or from `n_head` and `rotary_dim`."""
    reader = MeshReader(folder)
    known = {"n_embd": reader.width, "n_layer": reader.layers, "n_inner": reader.inner, "vocab_size": reader.vocabulary}
    heads = _heads(cfg, known)
    config = GPTJConfig(**known, **heads, n_positions=2048, bos_token_id=50256, eos_token_id=50256,
                        tie_word_embeddings=False)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config, "lm").named_parameters()}

    def read(name: str) -> Tensor:
        tensor = reader.read(name)
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{name} is {tuple(tensor.shape)}, GPT-J's would be {shapes[name]}", str(folder))
        return tensor

    return Checkpoint(config, "lm", shapes, read, reader.dtype, reader.step)


def _heads(cfg: ConvertConfig, known: dict[str, int]) -> dict[str, int]:
    """The numbers that arrays do not tell."""
    if cfg.config:
        try:
            values = json.loads(Path(cfg.config).expanduser().read_text(encoding="utf-8"))
            found = {"n_head": int(values["n_heads"]), "rotary_dim": int(values["pe_rotary_dims"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a mesh-transformer-jax config: {error!r}", str(cfg.config),
                            "It needs n_heads and pe_rotary_dims.") from None
    elif cfg.n_head and cfg.rotary_dim:
        found = {"n_head": cfg.n_head, "rotary_dim": cfg.rotary_dim}
    elif known["n_embd"] == ORIGINAL["n_embd"] and known["n_layer"] == ORIGINAL["n_layer"]:
        found = {key: ORIGINAL[key] for key in ("n_head", "rotary_dim")}
    else:
        raise UserError("the arrays do not tell the number of heads, and this is not GPT-J-6B", "n_head",
                        "Pass config=6B_roto_256.json (the training's own file), or n_head=N rotary_dim=N.")
    if known["n_embd"] % found["n_head"] or found["rotary_dim"] > known["n_embd"] // found["n_head"]:
        raise UserError(f"{found} do not fit a width of {known['n_embd']}", "n_head", "Check both numbers.")
    return found


def _write_hf(source: Checkpoint, folder: Path, stage: Path, dtype: torch.dtype, cfg: ConvertConfig) -> None:
    writer = ShardWriter(stage, source.shapes, dtype, int(cfg.max_shard_gib * 2**30))
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
        write_json(stage / about.name, json.loads(about.read_text(encoding="utf-8")) | {"dtype": short})
    tokenizer = load_tokenizer(str(folder))
    if not (stage / "tokenizer.json").exists():
        tokenizer.save_pretrained(str(stage))
    file = folder / "config.json"
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else config_values(
        source.config, "lm", "", short, {}, tokenizer)
    values.pop("torch_dtype", None)
    values |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [ARCHITECTURES[source.head]]}
    write_json(stage / "config.json", values)


def _write_mesh(source: Checkpoint, stage: Path, dtype: torch.dtype, cfg: ConvertConfig) -> None:
    config, count = source.config, cfg.shards
    if source.head != "lm" or "lm_head.bias" not in source.shapes:
        raise UserError("mesh-transformer-jax has language models only", "source", "Use to=hf.")
    inner = config.n_inner or 4 * config.n_embd
    if any(n % count for n in (config.vocab_size, config.n_embd, config.n_head, inner)):
        raise UserError(f"shards = {count} does not divide vocabulary {config.vocab_size}, width {config.n_embd}, "
                        f"{config.n_head} heads and inner width {inner}", "shards", "Try shards=1.")
    writer = MeshWriter(stage, config.n_layer, count, dtype)
    writer.write(lambda name: _cast(name, source.read(name), dtype), cfg.step if cfg.step is not None else source.step)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once; never to infinity.

    Raises:
        RunFailed: fp16 cannot hold a value.
    """
    cast = tensor.to(dtype)
    if dtype == torch.float16 and bool(torch.isinf(cast).any()) and not bool(torch.isinf(tensor).any()):
        raise RunFailed(f"{name} has values up to {float(tensor.abs().max()):.3g}, beyond fp16's 65504", "dtype",
                        "Use dtype=bf16.")
    return cast


def _compare(source: Checkpoint, written: Callable[[str], Tensor], dtype: torch.dtype, stage: Path) -> None:
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for name in source.shapes:
        a, b = source.read(name).to(dtype).contiguous(), written(name).contiguous()
        if a.shape != b.shape or b.dtype != dtype or not torch.equal(a.view(bits), b.view(bits)):
            raise RunFailed(f"{name} read back from the target is not what was written", str(stage),
                            "The disk may be failing; try another target.")
