"""`launch/convert.py`: a checkpoint in another form. Tensor by tensor: the largest tensor is all that memory holds.

source: a Hugging Face directory (.safetensors or .bin, sharded or not, with GPT-J's legacy buffers) or a checkpoint of
mesh-transformer-jax -> target: a Hugging Face directory of sharded safetensors, or a slim mesh-transformer-jax
checkpoint. What was written is read back and compared bit by bit.
"""

from __future__ import annotations

from pathlib import Path

from finetune.assets.paths import resolve
from finetune.cli.schemas import ConvertConfig
from finetune.compose import Composed
from finetune.errors import EXIT_DONE, UserError, command, gib, setting
from finetune.export import gguf_file
from finetune.export.convert import (
    as_phi,
    compare,
    open_hf,
    open_mesh,
    write_gguf,
    write_hf,
    write_mesh,
)
from finetune.export.gguf_file import PRECISIONS, check_dtype
from finetune.export.mesh_transformer import MeshReader, is_mesh
from finetune.export.write import staged
from finetune.gptj.load import DTYPES, Weights
from finetune.reporting.terminal import summary_table

FORMS = ("hf", "jax", "phi", "gguf")


def run(composed: Composed) -> int:
    """Convert one checkpoint; prints what was written."""
    cfg: ConvertConfig = composed.config
    check_words(cfg)
    assert cfg.source and cfg.target
    folder = Path(resolve(cfg.source)).expanduser().absolute()
    target = Path(cfg.target).expanduser().absolute()
    mesh = is_mesh(folder)
    source = open_mesh(folder, cfg.config, cfg.n_head, cfg.rotary_dim) if mesh else open_hf(folder)
    dtype = DTYPES[PRECISIONS.get(cfg.dtype, "fp32")] if cfg.dtype else source.dtype
    short = next((name for name, value in DTYPES.items() if value == dtype), None)
    if short is None:
        raise UserError(
            f"the source's precision is {dtype}", "dtype", "Choose one: dtype=bf16, fp16 or fp32."
        )
    with staged(target, "Free some space.") as stage:
        if cfg.to == "gguf":
            precision = "q8_0" if cfg.dtype == "q8_0" else short.replace("fp", "f")
            write_gguf(source, folder, stage, precision, target.name)
            if cfg.verify:
                file = stage / gguf_file.MODEL_FILE
                gguf_file.compare(source.tensors(), source.config, file, precision)
        elif cfg.to == "jax":
            write_mesh(source, stage, dtype, cfg.shards, cfg.step)
            if cfg.verify:
                compare(source, MeshReader(stage).read, dtype, stage)
        else:
            source = as_phi(source) if cfg.to == "phi" else source
            shard_bytes = int(cfg.max_shard_gib * 2**30)
            write_hf(source, folder, stage, dtype, shard_bytes, cfg.to == "phi")
            if cfg.verify:
                compare(source, Weights(stage).__getitem__, dtype, stage)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    summary_table(
        "converted",
        [
            ("from", str(folder)),
            ("to", str(target)),
            ("tensors", str(len(source.shapes))),
            ("precision", cfg.dtype or str(dtype).removeprefix("torch.")),
            ("size", gib(size)),
            ("read back", "equal bit by bit" if cfg.verify else "no"),
        ],
    )
    return EXIT_DONE


def check_words(cfg: ConvertConfig) -> None:
    """Check what can be seen without opening the source.

    Raises:
        UserError: something is missing or cannot be converted.
    """
    if not cfg.source or not cfg.target:
        raise UserError(
            "source=DIR and target=DIR are both needed",
            remedy="python launch/convert.py source=gpt-j-6b target=gpt-j-6b-bf16 dtype=bf16",
        )
    if cfg.to not in FORMS:
        raise UserError(f"to = {cfg.to} is unknown", "to", f"Choose from {', '.join(FORMS)}.")
    check_dtype(cfg.dtype, cfg.to, f"to={cfg.to}")
    if cfg.max_shard_gib <= 0 or cfg.shards < 1:
        raise UserError(
            "max_shard_gib and shards must be above 0", remedy="Try max_shard_gib=5 shards=8."
        )
    folder, target = Path(resolve(cfg.source)).expanduser(), Path(cfg.target).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}", "source", "Check the path.")
    if (folder / "adapter_config.json").is_file() and not any(
        (folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        run = folder.absolute().parent
        merge = (
            command(["python", "launch/export.py", setting("run", run), "kind=merged"])
            if (run / "config.yaml").is_file()
            else "python launch/export.py run=RUN kind=merged"
        )
        raise UserError(
            "this is an adapter: it has no weights of the model in it",
            str(folder),
            f"Merge it first, and convert what that writes: {merge}",
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            "the target exists and is not empty", str(target), "Choose another with target=DIR."
        )
