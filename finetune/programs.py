"""The schemas of the smaller programs: evaluate, export, generate. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from finetune.config import Config, DataConfig, Dtype, TaskConfig


@dataclass
class EvaluateConfig:
    run: Optional[str] = None
    """Run directory whose newest checkpoint (or export) is evaluated."""
    export_dir: Optional[str] = None
    """Typed as model=DIR: An export, or any GPT-J checkpoint directory."""
    task: TaskConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    batch: int = 8
    """Sequences per rank and forward."""
    dtype: Optional[Dtype] = None
    """Precision; null: the run's or the export's own."""
    packing: bool = True
    """Fill rows to task.max_length (task clm and instruct)."""
    out: Optional[str] = None
    """Where eval.json goes; null: into the run or export directory."""
    verbose: bool = False
    """Let the libraries' own log lines through."""


@dataclass
class ExportAppConfig:
    run: Optional[str] = None
    """Run directory, or one checkpoint in it."""
    kind: Optional[str] = None
    """adapter, merged or full."""
    out: Optional[str] = None
    """Target directory; null: RUN/export-KIND."""
    dtype: Optional[Dtype] = None
    """Precision of the written weights; null: the run's own."""
    max_shard_gib: float = 5.0
    """Largest safetensors file, in GiB."""
    verify: bool = True
    """Reopen with plain transformers and peft in a fresh process and compare logits."""
    verbose: bool = False
    """Let the libraries' own log lines through."""


@dataclass
class GenerateConfig:
    export_dir: Optional[str] = None
    """Typed as model=DIR: An export (adapter, merged or full), or any GPT-J checkpoint directory."""
    prompt: Optional[str] = None
    """One prompt; with neither prompt nor prompts it is read from standard input."""
    prompts: Optional[str] = None
    """File with one prompt a line, or jsonl with a field `prompt`."""
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
    stop: list[str] = field(default_factory=list)
    """Strings that end the text."""
    batch: int = 8
    """Prompts per forward."""
    dtype: Optional[Dtype] = None
    """Precision; null: the export's own."""
    chat: bool = False
    """Wrap the prompt in the export's instruction template."""
    seed: int = 0
    """Sampling seed."""
    verbose: bool = False
    """Let the libraries' own log lines through."""


@dataclass
class ReportConfig:
    run: Optional[str] = None
    """Run directory whose page is written anew; several run= words compare them."""
    runs: list[str] = field(default_factory=list)
    """Run directories to compare, or patterns of them: 'runs=[A,B]', 'runs=multirun/20260101-120000/*'."""
    out: Optional[str] = None
    """The page; null: RUN/report.html, or compare.html here."""


SCHEMAS = {"evaluate": EvaluateConfig, "export": ExportAppConfig, "generate": GenerateConfig,
           "report": ReportConfig, "train": Config, "plan": Config}
