"""The kinds of exports: what each is made of, where it opens, and which engine proves it.

adapter, merged, full      Hugging Face's GPT-J layout, for transformers and peft
phi, phi_adapter           the same function in Phi's form (`phi.py`), for engines that serve Phi
gguf                       one file for llama.cpp (`gguf_file.py`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config import HEADS, AdapterConfig, FullConfig, Ia3Config, LoraConfig
from finetune.errors import UserError

PROVEN = "this export, reopened in a fresh process"
READ = "the engine's sources were read; it was not run"
TESTED = (
    "this project's tests, on another export; wants a tokenizer with a token for each row of the "
    "vocabulary, as GPT-J's own has"
)
HERE = "this project's own model and tests"
LLAMA_CPP = "llama.cpp, on which it is built; it was not run itself"


@dataclass(frozen=True)
class Engine:
    """A program that opens an export."""

    name: str
    command: str
    """With {base} for an adapter's base model and {name} for the run's name."""
    proof: str
    """Words for the model card: `PROVEN`, `READ`, ..."""
    heads: tuple[str, ...] = ("lm",)


ALL = ("lm", "classify", "qa")
PYTHON = "the lines under Loading"
CTRANSLATE2 = "ct2-transformers-converter --model THIS_FOLDER --output_dir ctranslate2"
OWN_SERVER = Engine("this project's local server", "python launch/serve.py model=THIS_FOLDER", HERE)
WHOLE_GPTJ = (
    Engine("transformers", PYTHON, PROVEN, ALL),
    Engine("vLLM", "vllm serve THIS_FOLDER --max-model-len 2048", READ),
    Engine("CTranslate2", CTRANSLATE2, TESTED),
    OWN_SERVER,
)


@dataclass(frozen=True)
class Kind:
    """One kind of export, a value of `kind=`."""

    made_of: str
    """What the run must have trained: an "adapter", "all weights", or "any" of them."""
    form: str
    """gptj, phi or gguf."""
    whole: bool
    """Holds the whole model; False: an adapter alone."""
    what: str
    """First words of the model card, with {base}."""
    library: str
    """Library in the metadata of a model card."""
    engines: tuple[Engine, ...]


KINDS = {
    "adapter": Kind(
        made_of="adapter",
        form="gptj",
        whole=False,
        what="An adapter for `{base}`",
        library="peft",
        engines=(Engine("transformers and peft", PYTHON, PROVEN, ALL), OWN_SERVER),
    ),
    "merged": Kind(
        made_of="adapter",
        form="gptj",
        whole=True,
        what="An adapter merged into `{base}`",
        library="transformers",
        engines=WHOLE_GPTJ,
    ),
    "full": Kind(
        made_of="all weights",
        form="gptj",
        whole=True,
        what="All weights, trained from `{base}`",
        library="transformers",
        engines=WHOLE_GPTJ,
    ),
    "phi": Kind(
        made_of="any",
        form="phi",
        whole=True,
        what="GPT-J (`{base}`), fine-tuned, in Phi's form: the same function, for engines that "
        "serve Phi",
        library="transformers",
        engines=(
            Engine("transformers", PYTHON, PROVEN, ALL),
            Engine("vLLM", "vllm serve THIS_FOLDER", READ),
        ),
    ),
    "phi_adapter": Kind(
        made_of="adapter",
        form="phi",
        whole=False,
        what="An adapter for `{base}`, a GPT-J in Phi's form, for engines that serve Phi",
        library="peft",
        engines=(
            Engine("transformers and peft", PYTHON, PROVEN, ALL),
            Engine(
                "vLLM",
                "vllm serve {base} --enable-lora --lora-modules {name}=THIS_FOLDER",
                READ,
            ),
        ),
    ),
    "gguf": Kind(
        made_of="any",
        form="gguf",
        whole=True,
        what="GPT-J (`{base}`), fine-tuned, as a GGUF file",
        library="gguf",
        engines=(
            Engine("llama.cpp", "llama-server -m THIS_FOLDER/model.gguf", PROVEN),
            Engine(
                "Ollama",
                "ollama create {name} -f THIS_FOLDER/Modelfile && ollama run {name}",
                LLAMA_CPP,
            ),
            Engine(
                "LM Studio",
                "mkdir -p ~/.lmstudio/models/mine/{name} && "
                "cp THIS_FOLDER/model.gguf ~/.lmstudio/models/mine/{name}/",
                LLAMA_CPP,
            ),
        ),
    ),
}


def check_kind(name: str, adapter: AdapterConfig, tokens: Sequence[str] = ()) -> Kind:
    """Return the kind of that name, if a run that trained `adapter` can be exported as such.

    Args:
        tokens: the task's own tokens.

    Raises:
        UserError: there is no such kind, or the run has nothing that it is made of.
    """
    if name not in KINDS:
        raise UserError(f"kind = {name} is unknown", "kind", f"Choose from {', '.join(KINDS)}.")
    kind, full = KINDS[name], isinstance(adapter, FullConfig)
    if full and kind.made_of == "adapter":
        raise UserError(
            f"this run trained every weight: there is no adapter to export as {name}",
            "kind",
            "Use kind=full.",
        )
    if not full and kind.made_of == "all weights":
        raise UserError(
            "this run trained an adapter",
            "kind",
            "Use kind=merged for a whole model, or kind=adapter.",
        )
    if not full and kind.whole and not isinstance(adapter, (LoraConfig, Ia3Config)):
        raise UserError(
            "prompts and prefixes are inputs, not weights: they cannot be merged",
            "kind",
            "Use kind=adapter.",
        )
    if name == "phi_adapter":
        words = type(adapter).__name__.removesuffix("Config").lower()
        if isinstance(adapter, LoraConfig):
            words = "dora" if adapter.dora else ""
            if adapter.modules_to_save:
                words = f"lora with whole modules ({', '.join(adapter.modules_to_save)})"
            elif tokens:  # engines load no rows of the vocabulary beside a LoRA
                words = f"lora with trained tokens ({', '.join(tokens)})"
        if words:
            raise UserError(
                f"an adapter of kind {words} has no counterpart for a base in Phi's form",
                "kind",
                "Use kind=phi, which merges it into a whole model.",
            )
    return kind


def serving_command(kind: str, head: str, folder: str, base: str) -> str:
    """Return the command that serves an export for another engine, as its model card has it."""
    for engine in KINDS[kind].engines:
        if head in engine.heads and engine.command != PYTHON:
            command = engine.command.format(base=base, name="mine")
            return command.replace("THIS_FOLDER", folder)
    return f"transformers' {HEADS[head].auto_class}.from_pretrained({folder!r})"
