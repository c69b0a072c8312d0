"""The schemas of all programs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from finetune.config import Config, DataConfig, Dtype, TaskConfig, Text


@dataclass
class ModelUserConfig:
    """Settings of the programs that use a trained model."""

    export_dir: Optional[str] = None
    """An export (adapter, merged or full), or any GPT-J checkpoint directory."""
    base: Optional[str] = None
    """An adapter's base model, directory or hub id, where the adapter does not name it or it lies elsewhere here."""
    dtype: Optional[Dtype] = None
    """Precision; null: the run's or the export's own."""
    verbose: bool = False
    """Let the libraries' own log lines through."""


@dataclass
class EvaluateConfig(ModelUserConfig):
    run: Optional[str] = None
    """Run directory whose newest checkpoint (or export) is evaluated."""
    task: TaskConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    batch: int = 8
    """Sequences per rank and forward."""
    packing: bool = True
    """Fill rows to task.max_length (task clm and instruct)."""
    suite: str = "task"
    """task: the metrics of the model's own task; lm_eval: EleutherAI's lm-eval, on `tasks`."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval, e.g. tasks=lambada_openai,piqa."""
    task_dir: Optional[str] = None
    """Folder with lm-eval task files (yaml) of one's own; their data may be local files."""
    fewshot: Optional[int] = None
    """Worked examples in each lm-eval prompt; null: the task's own number."""
    limit: Optional[float] = None
    """Examples of each lm-eval task, or below 1 a share of them; null: all."""
    chat: bool = False
    """Put lm-eval's prompts into the export's instruction template."""
    seed: int = 0
    """Seed of lm-eval's few-shot examples."""
    out: Optional[str] = None
    """Directory of eval.json; null: the run or export directory."""


@dataclass
class ExportAppConfig:
    run: Optional[str] = None
    """Run directory, or one checkpoint in it."""
    kind: Optional[str] = None
    """adapter, merged or full; for other engines phi (whole model), phi_adapter or gguf (docs/export.md)."""
    out: Optional[str] = None
    """Target directory; null: RUN/export-KIND."""
    dtype: Optional[str] = None
    """Precision of the written weights: bf16, fp16 or fp32, of a GGUF file also q8_0; null: the run's own."""
    base: Optional[str] = None
    """For kind=phi_adapter: the base model in Phi's form, as launch/convert.py to=phi writes it."""
    max_shard_gib: float = 5.0
    """Largest safetensors file, in GiB."""
    verify: Any = "outputs"
    """outputs: reopen with plain transformers and peft in a fresh process (host memory: the model once) and compare
    outputs; tensors: read the files back tensor by tensor (host memory: a few tensors); none."""
    push_to_hub: Optional[str] = None
    """ORG/NAME: upload the verified export to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN."""
    hub_private: bool = True
    """Make a new hub repository private."""
    hub_base: Optional[str] = None
    """Hub id of the model that an uploaded adapter belongs to, where it lies in a folder here."""
    verbose: bool = False
    """Let the libraries' own log lines through."""


@dataclass
class GenerateConfig(ModelUserConfig):
    prompt: Optional[Text] = None
    """One prompt; with neither prompt nor prompts it is read from standard input."""
    prompts: Optional[str] = None
    """File with one prompt a line, or with rows (jsonl, json, csv, parquet) of the fields that the export was trained on."""
    question: Optional[Text] = None
    """For a question answering export, with `context`."""
    context: Optional[Text] = None
    """Text that holds the answer to `question`."""
    out: Optional[str] = None
    """jsonl file for the answers; null: standard output."""
    max_new_tokens: int = 100
    """Longest continuation, in tokens."""
    temperature: float = 0.9
    """Sampling temperature; 0: greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability, 0 to 1."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all."""
    beams: int = 1
    """Beams of a beam search; 1: none."""
    stop: Optional[list[Text]] = None
    """Text, or list of texts, that end the continuation and are cut off: stop=END, stop='["###", "\\n"]'."""
    batch: int = 8
    """Prompts per forward."""
    chat: bool = False
    """Wrap the prompt in the export's instruction template."""
    engine: str = "torch"
    """torch; compiled: the decoding step compiled for a cache of fixed length, for many texts on a GPU; or deepspeed:
    DeepSpeed-Inference, on GPUs only."""
    seed: int = 0
    """Sampling seed; with it and its own words a prompt gets the same text in any batch."""


@dataclass
class ReportConfig:
    run: Optional[str] = None
    """Run directory whose page is written anew; several run= words compare them."""
    runs: list[str] = field(default_factory=list)
    """Run directories to compare, or patterns of them: 'runs=[A,B]', 'runs=multirun/20260101-120000/*'."""
    out: Optional[str] = None
    """The page; null: RUN/report.html, or compare.html here."""


@dataclass
class ServeConfig(ModelUserConfig):
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs a token in the environment variable SERVE_TOKEN."""
    port: int = 8000
    """Port to listen on; 0: a free one."""
    name: Optional[str] = None
    """The model's name for clients; null: the run's or folder's."""
    max_tokens: int = 512
    """Longest continuation that a request may ask for, in tokens."""
    max_texts: int = 8
    """Most texts of one request: prompts times n."""
    max_body_bytes: int = 1_000_000
    """Largest request body, in bytes."""
    concurrency: int = 8
    """Requests that may wait or run at once; further ones get status 429."""
    engine: str = "torch"
    """torch; compiled: the decoding step compiled for a cache of fixed length, for many texts on a GPU; or deepspeed:
    DeepSpeed-Inference, on GPUs only."""


@dataclass
class ConvertConfig:
    source: Optional[str] = None
    """Hugging Face directory of a GPT-J, or a checkpoint of mesh-transformer-jax (the folder with shard_0)."""
    target: Optional[str] = None
    """Directory that is made."""
    to: str = "hf"
    """hf: sharded safetensors; jax: a slim checkpoint of mesh-transformer-jax; phi: the same function as a Phi model;
    gguf: one file for llama.cpp."""
    dtype: Optional[str] = None
    """Precision of the target: bf16, fp16 or fp32, of a GGUF file also q8_0; null: the source's own."""
    max_shard_gib: float = 5.0
    """Largest safetensors file, in GiB."""
    shards: int = 8
    """Cores that a mesh-transformer-jax checkpoint is cut for (its cores_per_replica)."""
    step: Optional[int] = None
    """Training step written into a mesh-transformer-jax checkpoint; null: the source's, or 0."""
    config: Optional[str] = None
    """The mesh-transformer-jax config (json) of a source that is not GPT-J-6B; or give n_head and rotary_dim."""
    n_head: Optional[int] = None
    """Attention heads of a mesh-transformer-jax source."""
    rotary_dim: Optional[int] = None
    """Rotated dimensions of each head of a mesh-transformer-jax source."""
    verify: bool = True
    """Read the target back and compare every tensor bit by bit."""
    verbose: bool = False
    """Let the libraries' own log lines through."""


@dataclass
class DoctorConfig:
    json: bool = False
    """Print one JSON object and nothing else; --json is short for it."""


SCHEMAS = {
    "doctor": DoctorConfig,
    "evaluate": EvaluateConfig,
    "export": ExportAppConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "convert": ConvertConfig,
    "report": ReportConfig,
    "train": Config,
    "plan": Config,
}

ALIASES = {
    "evaluate": {"model": "export_dir"},
    "generate": {"model": "export_dir"},
    "serve": {"model": "export_dir"},
    "export": {
        "export.push_to_hub": "push_to_hub",
        "export.hub_private": "hub_private",
        "export.hub_base": "hub_base",
    },
}
"""Program -> key as users type it -> key in the schema: `model` alone would name the group of base models."""
