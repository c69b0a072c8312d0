"""One GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

GPT-J is written in Phi's form (`phi.py`) as architecture `phi2`, tensor by tensor: memory holds one
tensor. The tokenizer, its special tokens and its chat template are inside. Only matrices have the
chosen precision.

Needs the `gguf` package: pip install -e '.[gguf]'
Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPTJConfig

from finetune.data.tokenizer import SPARE
from finetune.errors import RunFailed, UserError
from finetune.export import phi

MODEL_FILE = "model.gguf"
PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "fp32": "fp32", "fp16": "fp16"}
"""As typed -> as configured: GGUF has names of its own for the same."""
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
"""Phi's modules -> GGUF's."""
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
NORMAL, CONTROL, SHOWN = 1, 3, 4
"""Token types of the specification: text, a mark that text never yields, and one of the user's that it does."""
BLOCK = 32
"""Values of a row that q8_0 stores with one scale."""
PIECE = 2**22
"""Values that are converted at once."""


def check_dtype(dtype: str | None, form: str, setting: str) -> None:
    """Check a precision as it was typed; None is the source's own.

    Args:
        form: "gguf", or one of the layouts in safetensors.
        setting: how the user chose that form, e.g. "kind=gguf".

    Raises:
        UserError: this form has no such precision.
    """
    names = [*PRECISIONS, "q8_0"] if form == "gguf" else ["bf16", "fp16", "fp32"]
    if dtype is not None and dtype not in names:
        raise UserError(
            f"dtype = {dtype} is unknown for {setting}", "dtype", f"Choose from {', '.join(names)}."
        )


def check_form(config: GPTJConfig, head: str, proven: bool = False) -> None:
    """Check before anything is written that a model can be a GGUF file, and can be proven.

    Args:
        proven: llama.cpp will open the file.

    Raises:
        UserError: it is no language model, or a package is missing.
    """
    phi.check_form(config, head)
    if head != "lm":
        raise UserError(
            "GGUF files hold language models; this one has another head",
            "kind",
            "Use kind=phi (or convert to=phi): a classifier opens as PhiForSequenceClassification.",
        )
    library()
    if proven and find_spec("xllamacpp") is None:
        raise UserError(
            "GGUF files are proven by llama.cpp, whose package xllamacpp is missing",
            "verify",
            "pip install xllamacpp, or skip the proof with verify=none.",
        )


def library() -> Any:
    """Import the `gguf` package.

    Raises:
        UserError: it is missing.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF files need the gguf package", "kind", "pip install gguf xllamacpp"
        ) from None
    return gguf


def write_gguf(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    config: GPTJConfig,
    tokenizer: Any,
    file: Path,
    dtype: str,
    name: str,
) -> None:
    """Write a language model.

    Args:
        tensors: GPT-J's, in the order of `shapes`.
        dtype: f32, f16, bf16 or q8_0.
        name: of the model, for those who list it.

    Raises:
        UserError: the `gguf` package is missing, or q8_0 does not divide the model's rows.
        OSError: the disk is full.
    """
    gguf = library()
    if dtype == "q8_0" and (config.n_embd % BLOCK or (config.n_inner or 0) % BLOCK):
        raise UserError(
            f"q8_0 stores {BLOCK} values at a time; this model's rows have {config.n_embd}",
            "dtype",
            "Use dtype=f16.",
        )

    # The keys of architecture phi2, and the tokenizer.
    writer = gguf.GGUFWriter(file, "phi2")
    writer.add_name(name)
    writer.add_file_type(gguf.GGMLQuantizationType[dtype.upper()])
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_rope_dimension_count(config.rotary_dim or config.n_embd // config.n_head)
    add_tokenizer(writer, tokenizer, config.vocab_size)

    # Sizes first: every tensor's place in the file is known before any tensor is read.
    empty = ((source, torch.empty(shape, device="meta")) for source, shape in shapes.items())
    for target, value, kind in parts(empty, config, dtype):
        # The library takes shapes in bytes, and gives them back in values.
        size = gguf.quants.quant_shape_to_byte_shape(tuple(value.shape), kind)
        info = (target, size, np.dtype(np.uint8), math.prod(size))
        writer.add_tensor_info(*info, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, value, kind in parts(tensors, config, dtype):
        pieces = quantized(value, kind)
        first = next(pieces)
        whole = np.empty((math.prod(value.shape[:-1]), *first.shape[1:]), first.dtype)
        end = 0
        for piece in chain([first], pieces):
            whole[end : end + len(piece)] = piece
            end += len(piece)
        writer.write_tensor_data(whole)
    writer.close()


def quantized(value: Tensor, kind: Any) -> Iterator[np.ndarray]:
    """Yield a tensor's rows in the precision of the file, some at a time: in fp32 all would take
    twice the memory of the tensor."""
    rows = value.reshape(-1, value.shape[-1])
    for piece in rows.split(max(1, PIECE // rows.shape[1])):
        yield library().quants.quantize(piece.float().numpy(), kind)


def compare(
    tensors: Iterable[tuple[str, Tensor]], config: GPTJConfig, file: Path, dtype: str
) -> None:
    """Read a file back, and compare every tensor with its source, byte by byte.

    Raises:
        RunFailed: a tensor is missing or differs.
    """
    gguf = library()
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    # Read, not mapped as by the reader: mapped pages would stay resident, in the end all of them.
    with file.open("rb") as opened:
        for target, value, kind in parts(tensors, config, dtype):
            tensor = written.pop(target, None)
            same, size = tensor is not None, 0
            if tensor is not None:
                opened.seek(int(tensor.data_offset))
            for piece in quantized(value, kind):
                wanted = np.ascontiguousarray(piece).tobytes()
                same = same and opened.read(len(wanted)) == wanted
                size += len(wanted)
            if not same or size != tensor.n_bytes:
                raise RunFailed(
                    f"{target} read back from the target is not what was written",
                    str(file),
                    "The disk may be failing; try another target.",
                )


def parts(
    tensors: Iterable[tuple[str, Tensor]], config: GPTJConfig, dtype: str
) -> Iterator[tuple[str, Tensor, Any]]:
    """Yield GPT-J's tensors under their names in the file, with the precision of each.

    llama.cpp reads norms and biases in fp32 only.
    """
    kinds = library().GGMLQuantizationType
    for name, value in phi.convert_all(tensors, config):
        if match := LAYER.fullmatch(name):
            prefix, module, leaf = f"blk.{match[1]}.", match[2], match[3]
        else:
            prefix, (module, leaf) = "", name.rsplit(".", 1)
        kind = kinds[dtype.upper()] if value.dim() > 1 else kinds.F32
        yield f"{prefix}{NAMES[module]}.{leaf}", value, kind


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add a byte-level BPE tokenizer with one token for each of the embedding's rows.

    Rows that the tokenizer has no token for get the names of GPT-J's spare tokens.
    """
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Answers show own tokens such as <think>, unless they are marks of the chat template.
    added = {
        token["id"]: CONTROL if token["special"] or SPARE.fullmatch(token["content"]) else SHOWN
        for token in state["added_tokens"]
    }
    tokens, types = [], []
    for row in range(rows):
        spare = row not in vocabulary
        tokens.append(f"<|spare_{row}|>" if spare else vocabulary[row])
        types.append(CONTROL if spare else added.get(row, NORMAL))
    merges = state["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None and token < rows:
            add(token)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def write_modelfile(folder: Path, tokenizer: Any, config: GPTJConfig) -> None:
    """Write Ollama's Modelfile for the GGUF file in `folder`."""
    template = "{{ .Prompt }}"
    if tokenizer.chat_template:
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": template}], add_generation_prompt=True, tokenize=False
        )
    lines = [
        f"FROM ./{MODEL_FILE}",
        f'TEMPLATE """{template}"""',
        f"PARAMETER stop {tokenizer.eos_token}",
        f"PARAMETER num_ctx {config.n_positions}",
    ]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
