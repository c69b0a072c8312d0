"""Exports for engines that do not serve GPT-J: Phi's form for vLLM and others, GGUF for llama.cpp.

    phi           the whole model in Hugging Face's Phi layout, proven with plain `PhiForCausalLM`
    phi_adapter   the LoRA alone, for a base in Phi's form (launch/convert.py to=phi), proven by peft
    gguf          one file, proven by llama.cpp, with a Modelfile for Ollama

What Phi's form is: `phi.py`. Which engine reads what: docs/export.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTJConfig

from finetune.errors import RunFailed, UserError, command, setting
from finetune.export import gguf_file, phi
from finetune.export.hf_files import tokenizer_for, write_small_files
from finetune.export.safetensors_writer import file_sha256
from finetune.export.write import (
    ADAPTER_FILE,
    ExportInfo,
    fresh_process,
    verify_export,
    write_model,
)
from finetune.files import read_json, read_object, write_json

KINDS = ("phi", "phi_adapter", "gguf")
Tensors = Iterator[tuple[str, Tensor]]
Shapes = dict[str, tuple[int, ...]]
MODEL_FILE = "model.gguf"


def check_engine(kind: str, config: GPTJConfig, head: str, verify: str) -> None:
    """Check before anything is written that the kind exists for this model, and can be proven.

    Raises:
        UserError: it does not; the message names a kind that does.
    """
    phi.check_form(config, head)
    if kind == "gguf":
        if head != "lm":
            raise UserError(
                "GGUF files hold language models; this run trained a classifier",
                "kind",
                "Use kind=phi, which opens as PhiForSequenceClassification.",
            )
        gguf_file.library()
        if verify == "outputs" and find_spec("xllamacpp") is None:
            raise UserError(
                "GGUF files are proven by llama.cpp, whose package xllamacpp is missing",
                "verify",
                "pip install xllamacpp, or skip the proof with verify=none.",
            )


def check_phi_base(base: str | None, trained_on: Path) -> Path:
    """Return the folder of an adapter's base in Phi's form.

    Raises:
        UserError: there is none. One made of other weights is found out by the proof.
    """
    source = setting("source", trained_on)
    make = command(["python", "launch/convert.py", source, "target=BASE-phi", "to=phi"])
    if not base:
        raise UserError(
            "kind=phi_adapter needs the base model in Phi's form",
            "base",
            f"Make it once, and name it with base=BASE-phi: {make}",
        )
    folder = Path(base).expanduser().absolute()
    if read_object(folder / "config.json").get("model_type") != "phi":
        raise UserError("this is not a model in Phi's form", str(folder), f"Make it with: {make}")
    return folder


def write_phi(
    stage: Path,
    tensors: Tensors,
    shapes: Shapes,
    config: GPTJConfig,
    info: ExportInfo,
    tokenizer: Any,
    max_shard_gib: float,
) -> None:
    """Write the whole model in Hugging Face's Phi layout, one tensor in memory at a time."""
    error = write_model(
        phi.convert_all(tensors, config),
        phi.shapes(shapes, config),
        info.dtype,
        stage,
        max_shard_gib,
    )
    if error is not None:
        raise error
    _write_phi_files(stage, config, info, tokenizer)


def write_phi_adapter(
    stage: Path, config: GPTJConfig, info: ExportInfo, tokenizer: Any, base: Path
) -> None:
    """Rewrite the adapter in `stage`, in peft's layout for GPT-J, for a base in Phi's form."""
    tensors = load_file(stage / ADAPTER_FILE)
    converted = dict(phi.convert_all(iter(tensors.items()), config))
    save_file({name: t.contiguous() for name, t in converted.items()}, stage / ADAPTER_FILE)
    (stage / ADAPTER_FILE).chmod(0o644)
    file = stage / "adapter_config.json"
    write_json(file, phi.adapter_config(read_json(file), str(base)))
    _write_phi_files(stage, config, info, tokenizer, with_config=info.head != "lm")


def _write_phi_files(
    stage: Path, config: GPTJConfig, info: ExportInfo, tokenizer: Any, with_config: bool = True
) -> None:
    write_small_files(
        stage, config, info.head, info.base, info.dtype, info.task, tokenizer, with_config
    )
    file = stage / "config.json"
    if with_config:
        write_json(file, phi.config_values(config, info.head, read_json(file)))


def write_gguf(
    stage: Path,
    tensors: Tensors,
    shapes: Shapes,
    config: GPTJConfig,
    info: ExportInfo,
    tokenizer: Any,
    dtype: str,
) -> None:
    """Write the model as one GGUF file, and a Modelfile for Ollama."""
    ready = tokenizer_for(tokenizer, info.head, info.task, config.vocab_size)
    gguf_file.write_gguf(tensors, shapes, config, ready, stage / MODEL_FILE, dtype, info.name)
    template = "{{ .Prompt }}"
    if ready.chat_template:
        template = ready.apply_chat_template(
            [{"role": "user", "content": template}], add_generation_prompt=True, tokenize=False
        )
    (stage / "Modelfile").write_text(
        f'FROM ./{MODEL_FILE}\nTEMPLATE """{template}"""\nPARAMETER stop {ready.eos_token}\n'
        f"PARAMETER num_ctx {config.n_positions}\n",
        encoding="utf-8",
    )


def verify_engine(kind: str, stage: Path, reference: dict[str, Tensor], dtype: str) -> dict:
    """Reopen what was written in a fresh process, with the engine's own code, and compare outputs.

    Raises:
        RunFailed: it does not open, or it is not the trained model.
    """
    if kind != "gguf":
        return verify_export(stage, reference)
    file = stage.with_name(f"{stage.name}.reference.safetensors")
    save_file(reference, file)
    try:
        line = fresh_process(
            "finetune.export.verify_gguf", [str(stage / MODEL_FILE), str(file), dtype], str(stage)
        )
    finally:
        file.unlink(missing_ok=True)
    figures = json.loads(line)
    if not figures["equal"]:
        raise RunFailed(f"the export is not equal to the trained model: {figures}", str(stage))
    return {"verified": True, **figures}


def finish_engine_export(
    kind: str, stage: Path, info: ExportInfo, figures: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Write export.json and the model card; return the figures of export.json."""
    weights = sorted([*stage.glob("*.safetensors"), *stage.glob("*.gguf")])
    figures = {"kind": kind, "verified": False, "pads": True, **figures}
    figures["files"] = {file.name: file_sha256(file) for file in weights}
    write_json(stage / "export.json", figures)
    (stage / "README.md").write_text(engine_card(kind, info, figures, dtype), encoding="utf-8")
    return figures


PROOF = {
    "phi": "plain `transformers` in a fresh process: the trained model's outputs, padded batches too",
    "phi_adapter": "plain `transformers` and `peft` on the base in Phi's form, in a fresh process",
    "gguf": "llama.cpp in a fresh process: the trained model's next tokens and log-probabilities",
}
SERVE = {
    "phi": [
        ("vLLM", "vllm serve THIS_FOLDER"),
    ],
    "phi_adapter": [
        ("vLLM", "vllm serve {base} --enable-lora --lora-modules {name}=THIS_FOLDER"),
    ],
    "gguf": [
        ("llama.cpp", "llama-server -m THIS_FOLDER/model.gguf"),
        ("Ollama", "ollama create {name} -f THIS_FOLDER/Modelfile && ollama run {name}"),
        ("LM Studio", "copy model.gguf to its models folder"),
    ],
}
"""Kind -> (engine, command)."""


def engine_card(kind: str, info: ExportInfo, figures: dict[str, Any], dtype: str) -> str:
    """Return the model card: what this is, how to serve it, and by what it was proven."""
    phi_base = figures.get("phi_base", "")
    lines = [
        "---",
        "license: apache-2.0",
        f"library_name: {'peft' if kind == 'phi_adapter' else 'gguf' if kind == 'gguf' else 'transformers'}",
        "---",
        f"# {info.name}",
        "",
        f"GPT-J (`{info.base}`), fine-tuned, in {dtype}, "
        + (
            "as a GGUF file."
            if kind == "gguf"
            else "in Phi's form: the same function, for engines that serve Phi."
        ),
        "",
        "| serve with | command |",
        "|---|---|",
        *(
            f"| {engine} | `{words.format(base=phi_base, name=info.name)}` |"
            for engine, words in SERVE[kind]
        ),
        "",
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in info.facts.items() if value is not None),
        *(
            f"- evaluation, {key}: {value:.6g}"
            for key, value in info.metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ),
        "",
        "## Proof",
        "",
        f"Proven by {PROOF[kind]}." if figures["verified"] else "Not verified.",
        "",
        *(
            f"- {key}: {value}"
            for key, value in figures.items()
            if key not in ("files", "kind", "verified", "equal")
        ),
        "",
        "| file | SHA-256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in figures["files"].items()),
        "",
    ]
    return "\n".join(lines)
