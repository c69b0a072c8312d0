"""The schema: one dataclass per conf group, with a description under every field.

Flow: argv -> Hydra -> these classes -> `check` -> the rest of the program. yaml only fills values;
nothing downstream ever sees a DictConfig. A field states its bounds or choices itself (`bounded`,
`choice`); `check` only validates, and raises one error that lists all problems; it derives nothing.
Does not compose (see `compose.py`) and imports no torch.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from omegaconf import MISSING, OmegaConf

from finetune.errors import UserError
from finetune.files import read_settings

GPTJ_POSITIONS = 2048

Text = str
"""Type of settings that hold somebody's words, such as prompts: the command line gives them as they are typed."""

Sources = Any
"""Type of settings that name data: a path as it is typed, or a list or dict of sources (finetune/data/mixture.py)."""


@dataclass(frozen=True)
class Limits:
    """The values that a setting may have: finite numbers within bounds, or one of `choices`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    choices: tuple[Any, ...] = ()
    """Beside bounds: values that are allowed besides numbers."""
    suggest: Any = None
    """The value that an error proposes; None: there are choices alone."""

    def allow(self, value: Any) -> bool:
        if value in self.choices:
            return True
        # A setting of several types may hold a text where a number belongs.
        if self.suggest is None or isinstance(value, str) or not math.isfinite(value):
            return False
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        """Return the bounds in words, such as `at least 0 and below 1`."""
        bounds = {name: getattr(self, name) for name in ("at_least", "above", "at_most", "below")}
        return " and ".join(
            f"{name.replace('_', ' ')} {limit:g}"
            for name, limit in bounds.items()
            if math.isfinite(limit)
        )


def bounded(default: Any, *, suggest: Any = None, besides: tuple = (), **bounds: float) -> Any:
    """Return a dataclass field for a finite number within bounds, which `check` enforces.

    A null passes, as an Optional type allows it.

    Args:
        suggest: the value that an error proposes; None: the default.
        besides: values that are allowed besides numbers.
        bounds: at_least, above, at_most or below.
    """
    limits = Limits(**bounds, choices=besides, suggest=default if suggest is None else suggest)
    return field(default=default, metadata={"limits": limits})


def choice(default: Any, choices: tuple[Any, ...]) -> Any:
    """Return a dataclass field for one of a few values, which `check` enforces."""
    return field(default=default, metadata={"limits": Limits(choices=choices)})


class Dtype(Enum):
    """Precision of weights: its name here, its name in torch and transformers, bytes of an element."""

    bf16 = "bf16", "bfloat16", 2
    fp16 = "fp16", "float16", 2
    fp32 = "fp32", "float32", 4

    def __new__(cls, name: str, torch_name: str, element_bytes: int) -> Dtype:
        member = object.__new__(cls)
        member._value_ = name
        member.torch_name, member.element_bytes = torch_name, element_bytes
        return member

    torch_name: str
    element_bytes: int


class Init(Enum):
    pretrained = "pretrained"
    random = "random"


class Quantize(Enum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class OptimName(Enum):
    adamw = "adamw"
    adamw8bit = "adamw8bit"
    adafactor = "adafactor"


class Offload(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class FinalCheckpoint(Enum):
    full = "full"
    weights = "weights"
    none = "none"


class Attention(Enum):
    auto = "auto"
    sdpa = "sdpa"
    flex = "flex"
    eager = "eager"


class OnBadRow(Enum):
    error = "error"
    skip = "skip"


class WeightBy(Enum):
    auto = "auto"
    tokens = "tokens"
    rows = "rows"


class Quotes(Enum):
    auto = "auto"
    enclose = "enclose"
    text = "text"


@dataclass
class ModelConfig:
    path: str = MISSING
    """Checkpoint directory or hub id; `asset:NAME` is a directory that ships with the project."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub id."""
    tokenizer: Optional[str] = None
    """Directory or hub id; null: the checkpoint's own, or GPT-J's that ships with the project."""
    dtype: Dtype = Dtype.bf16
    """Precision of weights and arithmetic; optimizer states are fp32 always."""
    quantize: Quantize = Quantize.none
    """Format of the frozen linear weights of the blocks, for any adapter: none, int8 (8 bits), or nf4 (4 bits, QLoRA)."""
    quantize_double: bool = True
    """nf4: keep its scales in 8 bits too, which saves 0.4 bits per weight."""
    init: Init = Init.pretrained
    """`random`: only config.json is read from `path`; weights are drawn from the seed, parameter by parameter."""
    attention: Attention = Attention.auto
    """Attention kernel; auto picks the fastest one that this machine has."""
    embd_pdrop: Optional[float] = bounded(None, at_least=0, below=1, suggest=0.1)
    """Dropout on embeddings, 0 to 1; null: the checkpoint's own value."""
    attn_pdrop: Optional[float] = bounded(None, at_least=0, below=1, suggest=0.1)
    """Dropout on attention probabilities, 0 to 1; null: the checkpoint's own value."""
    resid_pdrop: Optional[float] = bounded(None, at_least=0, below=1, suggest=0.1)
    """Dropout on attention and MLP outputs, 0 to 1; null: the checkpoint's own value."""


@dataclass
class TaskConfig:
    head = "lm"
    """Head of GPT-J that the task trains, a key of `HEADS`."""
    documents = 1
    """Documents of at most `max_length` tokens in a sequence: preferences have two answers."""
    max_length: int = GPTJ_POSITIONS
    """Sequence length in tokens."""
    weight_field: Optional[str] = "weight"
    """Record field with a row's training weight, 1 (takes part, as rows without it) or 0 (left out); null: no field."""
    tokens: list[str] = field(default_factory=list)
    """Tokens of your own, such as [<think>,</think>]: names for spare rows of the vocabulary (GPT-J has 143), which are
    trained beside a LoRA or with all weights. task.template=chatml brings its two by itself."""


@dataclass
class ClmConfig(TaskConfig):
    text_field: str = "text"
    """Record field with the document; dots reach into objects."""
    subset_field: Optional[str] = "meta.pile_set_name"
    """Record field that names the subset evaluation is broken down by; absent fields are fine."""


@dataclass
class InstructConfig(TaskConfig):
    format: str = choice("auto", ("auto", "prompt", "messages", "alpaca", "sharegpt"))
    """Row layout: auto, prompt, messages, alpaca or sharegpt."""
    template: str = "alpaca"
    """Prompt template: alpaca, chat, chatml or plain, or a file with a Jinja chat template."""
    prompt_field: str = "prompt"
    """Record field with the prompt (format prompt)."""
    completion_field: str = "completion"
    """Record field with the completion (format prompt)."""


@dataclass
class ClassifyConfig(TaskConfig):
    head = "classify"
    text_field: str = "text"
    """Record field with the text."""
    text_pair_field: Optional[str] = None
    """Record field with the second text of a pair; null: single texts."""
    label_field: str = "label"
    """Record field with the label: an integer, a string, a list (multi-label) or a number (regression)."""
    problem: str = choice("single_label", ("single_label", "multi_label", "regression"))
    """single_label, multi_label or regression."""
    labels: Optional[list[str]] = None
    """Label names in the order of the head's outputs; null: collected from the training data, sorted."""
    label_separator: Optional[str] = None
    """Separator of the labels in a multi-label cell such as `a,b`: comma, semicolon, pipe, space, tab, or any
    other text; null: cells are arrays."""
    class_weights: Any = None
    """Loss weight of each class, a list; balanced: examples / (classes x examples of the class), from the training data;
    null: all 1."""
    truncation: str = choice("head", ("head", "head_tail"))
    """Part of a too long text that is kept: head, or head_tail (half from either end)."""


@dataclass
class QaConfig(TaskConfig):
    head = "qa"
    stride: int = bounded(128, at_least=0)
    """Tokens that neighbouring windows of a long context share."""
    max_answer_tokens: int = bounded(32, at_least=1)
    """Longest answer that decoding considers, in tokens."""
    n_best: int = bounded(20, at_least=1)
    """Start and end candidates that decoding combines."""
    null_threshold: float = 0.0
    """SQuAD v2: answer nothing when the null score beats the best span by more than this (logits)."""


TEMPLATE_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
"""Shipped template -> the tokens of its own that it is written with; the last one ends turns."""


def template_tokens(task: TaskConfig) -> tuple[str, ...]:
    """Return the tokens that the task's template brings."""
    return TEMPLATE_TOKENS.get(getattr(task, "template", ""), ())


def own_tokens(task: TaskConfig) -> list[str]:
    """Return the tokens whose rows are trained: those of the template, then the others of `task.tokens`."""
    return list(dict.fromkeys((*template_tokens(task), *task.tokens)))


PREFERENCE_LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")


@dataclass
class PairConfig(TaskConfig):
    documents = 2
    template: str = "alpaca"
    """Prompt template: a name from finetune/data/templates, or a file with a Jinja chat template."""
    prompt_field: str = "prompt"
    """Record field with the prompt, a text or messages; not needed where the answers are whole conversations."""
    chosen_field: str = "chosen"
    """Record field with the better answer: a text, messages, or the whole conversation."""
    rejected_field: str = "rejected"
    """Record field with the worse answer."""


@dataclass
class PreferenceConfig(PairConfig):
    loss: str = choice("dpo", PREFERENCE_LOSSES)
    """dpo, ipo, kto (against the reference model), orpo or simpo (without one)."""
    beta: float = bounded(0.1, above=0)
    """Pull of the reference model on the trained one; of orpo, the weight of the odds ratio; of simpo, the scale of
    the rewards (its paper takes 2 to 10)."""
    label_smoothing: float = bounded(0.0, at_least=0, below=0.5)
    """dpo and simpo: share of the preferences that are taken to be wrong, 0 to 0.5."""
    gamma: float = 0.5
    """simpo: by how much the chosen answer's reward is to exceed the rejected one's."""


@dataclass
class RewardConfig(PairConfig):
    head = "classify"
    margin_field: Optional[str] = "margin"
    """Record field with the number by which the chosen answer's reward is to exceed the other's; rows without it: 0."""
    answers_field: Optional[str] = None
    """Of launch/evaluate.py: record field with a list of answers to the prompt, which are all scored, in place of a pair."""


@dataclass
class DataConfig:
    train: Sources = None
    """File, glob, directory, several of these with commas, `datasets` folder or hub id; `asset:NAME` ships with the
    project. A mixture of several: [{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}], each with split, config,
    epochs, max_rows and name where it needs them."""
    eval: Sources = None
    """As `train`; several sets with metrics of their own: {web: a.jsonl, law: b.jsonl}; a number such as 0.02: this share
    of the training rows is held out and never trained on; null: no evaluation."""
    eval_rows: Optional[int] = bounded(None, at_least=1, suggest=500)
    """Hold this many training rows out for evaluation, in place of `eval`."""
    max_rows: Optional[int] = bounded(None, at_least=1, suggest=1000)
    """Read only the first rows of each source, this many; null: all."""
    weight_by: WeightBy = WeightBy.auto
    """What the weights of a mixture are shares of: tokens, rows, or auto: what the task's loss counts."""
    split: str = "train"
    """Split that is read of a hub id or `datasets` folder for training."""
    eval_split: str = "validation"
    """Split that is read of a hub id or `datasets` folder for evaluation."""
    config: Optional[str] = None
    """Configuration of a hub id that has several (`datasets` calls it name)."""
    on_bad_row: OnBadRow = OnBadRow.error
    """error: stop at the first bad row; skip: count bad rows and go on."""
    max_bad_rows: int = bounded(100, at_least=0)
    """With on_bad_row=skip: stop all the same after this many bad rows."""
    encoding: str = "utf-8"
    """Encoding of text files that are not UTF-8, in Python's names: cp1252, utf-16, shift_jis, ..."""
    quotes: Quotes = Quotes.auto
    """Double quotes in csv and tsv files: enclose cells, are part of the text, or auto: enclose, and rows that a
    stray quote would swallow are found."""
    cache_dir: Optional[str] = None
    """Folder of the tokenised cache; null: ~/.cache/finetune-gptj."""
    preview: int = bounded(0, at_least=0)
    """Print this many decoded examples with the scored tokens marked, then go on."""

    @property
    def evaluates(self) -> bool:
        """Tell whether there are evaluation data, of their own or held out of training."""
        return bool(self.eval or self.eval_rows)


@dataclass
class AdapterConfig:
    """Base class of the adapter kinds, which say what is trained."""


@dataclass
class FullConfig(AdapterConfig):
    """Full fine-tuning: every weight is trained, and there is nothing to set."""


@dataclass
class PeftConfig(AdapterConfig):
    """Base class of the adapters that have files of their own."""

    start: Optional[str] = None
    """Adapter to train on from: an export, a run that has one, or a folder that plain peft wrote; null: a new one."""


@dataclass
class LoraConfig(PeftConfig):
    rank: int = bounded(16, at_least=1)
    """Rank of the update matrices."""
    alpha: float = bounded(32.0, above=0)
    """Scale: the update is multiplied by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: float = bounded(0.0, at_least=0, below=1)
    """Dropout on the adapter's input, 0 to 1."""
    targets: Any = "all-linear"
    """Modules that get an adapter: `all-linear`, a comma separated string or a list of GPT-J's module names."""
    layers: Any = None
    """Blocks that get an adapter, counted from 0: a list, or ranges such as 14-27; null: all."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained whole and saved with the adapter: wte, ln_f, and lm_head of a language model."""
    lr_ratio: float = bounded(1.0, above=0, suggest=16)
    """Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv:2402.12354, which takes 16)."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adaptation (arXiv:2402.09353)."""
    init: str = choice("default", ("default", "pissa", "olora"))
    """Begin without effect (default), or as the base's own components: its largest singular vectors (pissa,
    arXiv:2404.02948) or its QR decomposition (olora, arXiv:2406.01775). Exports then have twice the rank."""

    @property
    def scale(self) -> float:
        """Return the factor of the update B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass
class Ia3Config(PeftConfig):
    targets: Any = "k_proj,v_proj,fc_out"
    """Modules whose activations are rescaled: a comma separated string or a list."""


@dataclass
class PromptConfig(PeftConfig):
    virtual_tokens: int = bounded(20, at_least=1)
    """Trained embeddings placed before every sequence, in tokens."""


@dataclass
class PrefixConfig(PeftConfig):
    virtual_tokens: int = bounded(20, at_least=1)
    """Trained key/value pairs placed before every sequence in every layer, in tokens."""


@dataclass
class ZeroConfig:
    stage: Union[int, str] = choice("auto", ("auto", 0, 1, 2, 3))
    """0 to 3, or auto: the planner takes the fastest that fits."""
    offload_optimizer: Offload = Offload.none
    """Place of optimizer states and master weights: none is the device itself, else cpu or nvme."""
    offload_params: Offload = Offload.none
    """Place of the weights (stage 3): none is the device itself, else cpu or nvme."""
    nvme_path: Optional[str] = None
    """Folder on a fast local disk for nvme offload."""
    bucket_elements: int = bounded(50_000_000, at_least=1)
    """Size of reduce and all-gather buckets, in elements."""


SCHEDULES = ("linear", "cosine", "cosine_restarts", "inverse_sqrt", "wsd", "constant")


@dataclass
class OptimConfig:
    name: OptimName = OptimName.adamw
    """adamw; adamw8bit: its moments in 8 bits; adafactor: row and column means in their place (stage 0; knows no betas and
    eps, and multiplies lr by the size of each weight)."""
    lr: float = bounded(1e-4, above=0)
    """Peak learning rate."""
    schedule: str = choice("cosine", SCHEDULES)
    """After the warmup: linear, cosine, cosine_restarts, inverse_sqrt, wsd (constant, then a short decay) or constant."""
    warmup: float = bounded(0.0, at_least=0)
    """Warmup: a number of steps, or below 1 a share of all steps."""
    cycles: int = bounded(3, at_least=1)
    """Cosines of schedule=cosine_restarts."""
    decay: float = bounded(0.1, at_least=0)
    """Decay at the end of schedule=wsd: a number of steps, or below 1 a share of all steps."""
    min_lr: float = bounded(0.0, at_least=0, at_most=1)
    """Floor of the schedule as a share of the peak, 0 to 1."""
    weight_decay: float = bounded(0.0, at_least=0)
    """Decoupled weight decay; biases and norms are exempt."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's beta1 and beta2."""
    eps: float = bounded(1e-8, above=0)
    """Adam's epsilon."""
    grad_clip: float = bounded(1.0, at_least=0)
    """Largest global gradient norm; 0: no clipping."""


@dataclass
class TrainConfig:
    steps: Optional[int] = bounded(None, at_least=1, suggest=100)
    """Optimizer steps. With `epochs` given too, the one from the command line counts; both: whichever ends first."""
    epochs: Optional[float] = bounded(None, above=0, suggest=1)
    """Passes over the training data."""
    max_time: float = bounded(0.0, at_least=0)
    """Seconds from the start of the program after which the run stops as by a signal: it saves and ends with exit code
    75, and the same command goes on; 0: no limit."""
    micro_batch: Union[int, str] = bounded(1, at_least=1, besides=("auto",))
    """Sequences per rank and forward; auto: the largest that fits."""
    global_batch: int = bounded(8, at_least=1)
    """Sequences per optimizer step; accumulation = global_batch / (micro_batch x ranks)."""
    neftune_alpha: float = bounded(0.0, at_least=0, suggest=5)
    """Uniform noise on the embeddings in training, within this over sqrt(tokens of the document x width) (NEFTune,
    arXiv:2310.05914, which takes 5); 0: none."""
    packing: bool = True
    """Fill every row to task.max_length with whole or cut documents that do not attend to each other."""
    activation_checkpointing: Union[bool, str] = choice(
        False, (False, True, "selective", "offload")
    )
    """true: recompute each block in the backward pass instead of keeping its activations; selective: only the GELU;
    offload: as true, with the blocks' inputs in host memory."""
    eval_every: int = bounded(0, at_least=0)
    """Optimizer steps between evaluations; 0: only at the end."""
    eval_at_start: bool = False
    """Evaluate before the first step too: the base model's figures, as step 0."""
    eval_batch: int = bounded(8, at_least=1)
    """Sequences per rank and forward in evaluation."""
    log_every: int = bounded(1, at_least=0)
    """Optimizer steps between lines in metrics.jsonl."""
    early_stopping: int = bounded(0, at_least=0)
    """Stop after this many evaluations in a row without a better `metric`; 0: never."""
    metric: Optional[str] = None
    """Metric of the evaluations that decides which one is best, for early stopping, checkpoint.best and sweeps, also
    SET/METRIC of one set, or TASK/METRIC of eval.lm_eval; null: the task's own (loss; classify: accuracy, multi_label
    f1, regression mse; qa: f1)."""
    sample_every: int = bounded(0, at_least=0)
    """Optimizer steps between generated samples (task clm and instruct); 0: never."""
    sample_prompts: list[Text] = field(default_factory=lambda: ["The"])
    """Prompts of the samples."""
    sample_tokens: int = bounded(40, at_least=1)
    """Length of a sample in tokens."""
    threads: int = bounded(0, at_least=0)
    """CPU threads per rank; 0: this rank's share of the cores."""
    prefetch: int = bounded(2, at_least=0)
    """Optimizer steps whose batches are prepared ahead."""
    probe: bool = True
    """Try the longest batch of the data before step 1, so that memory runs out then or not at all; changes nothing."""
    max_skipped: int = bounded(5, at_least=0)
    """End the run after this many steps in a row whose gradient is not finite; 0: never."""
    hang_timeout: float = bounded(1800.0, at_least=0)
    """Seconds without a step, an evaluated batch or a save until every rank dumps its stacks and ends; 0: never."""


@dataclass
class EvalConfig:
    generate: int = bounded(0, at_least=0)
    """Prompts of each evaluation set that every evaluation answers greedily (task clm and instruct), for exact_match,
    rouge1, rouge2, rougeL, bleu and chrf against the reference answers; 0: none. Needs pip install -e '.[eval]'."""
    generate_tokens: int = bounded(64, at_least=1)
    """Longest answer in tokens; prompts have at most task.max_length without these."""
    lm_eval: list[str] = field(default_factory=list)
    """Tasks of EleutherAI's lm-eval that evaluations ask (models of texts), e.g. [lambada_openai,piqa]: figures named
    TASK/METRIC, such as piqa/acc. Needs pip install -e '.[eval]'."""
    lm_eval_every: int = bounded(1, at_least=1)
    """Evaluations from one that asks lm-eval's tasks to the next; the last step always does."""
    lm_eval_limit: Optional[float] = bounded(None, above=0, suggest=100)
    """Examples of each lm-eval task, or below 1 a share of them; null: all."""
    task_dir: Optional[str] = None
    """Folder with lm-eval task files (yaml) of one's own; their data may be local files."""


@dataclass
class CheckpointConfig:
    every: int = bounded(0, at_least=0)
    """Optimizer steps between checkpoints; 0: only at the end and when the run is stopped."""
    keep: int = bounded(2, at_least=2)
    """Newest checkpoints kept, at least 2."""
    best: bool = False
    """Save after the best evaluation by train.metric, keep that checkpoint beside the newest ones, and export it when
    the run is done."""
    background: Union[bool, str] = choice("auto", ("auto", True, False))
    """true: train on while a copy is written; false: wait; auto: where the optimizer states are on GPUs."""
    final: FinalCheckpoint = FinalCheckpoint.full
    """Kept when the run is done: full, to train on from it; weights, a third of the size, to evaluate and export
    again; none. A run that is stopped always keeps a full checkpoint."""


@dataclass
class TensorboardConfig:
    enabled: bool = False
    """Write event files to run_dir/tensorboard."""


@dataclass
class WandbConfig:
    enabled: bool = False
    """Log to Weights & Biases."""
    project: str = "finetune-gptj"
    """Project name."""
    entity: Optional[str] = None
    """Team or user; null: the account's default."""
    group: Optional[str] = None
    """Group of runs, e.g. one sweep."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    mode: str = choice("online", ("online", "offline", "disabled"))
    """online, offline or disabled; online without a key goes on offline."""
    artifact: bool = False
    """Upload the export as an artifact of type model when the run is done."""


@dataclass
class MlflowConfig:
    enabled: bool = False
    """Log to MLflow."""
    uri: Optional[str] = None
    """Tracking server or store; null: the environment's MLFLOW_TRACKING_URI, else run_dir/mlruns."""
    experiment: str = "finetune-gptj"
    """Experiment that the run belongs to."""


@dataclass
class TrackioConfig:
    enabled: bool = False
    """Log to trackio, whose database is on this machine (TRACKIO_DIR)."""
    project: str = "finetune-gptj"
    """Project name."""
    space: Optional[str] = None
    """Hugging Face Space, ORG/NAME, that gets the figures too; null: none."""


@dataclass
class CometConfig:
    enabled: bool = False
    """Log to Comet."""
    project: str = "finetune-gptj"
    """Project name."""
    workspace: Optional[str] = None
    """Team or user; null: the account's default."""
    offline: bool = False
    """Write files to upload later, as happens without a key (COMET_API_KEY) in any case."""


@dataclass
class TrackerConfig:
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)
    comet: CometConfig = field(default_factory=CometConfig)


@dataclass
class MachineConfig:
    gpus: Optional[int] = None
    """GPUs over all nodes; null: measured here."""
    gpu_gib: Optional[float] = None
    """Memory of one GPU in GiB; null: measured here."""
    host_gib: Optional[float] = None
    """Memory of one node's host in GiB; null: measured here."""
    disk_gib: Optional[float] = None
    """Free space for checkpoints and nvme offload in GiB; null: measured here."""
    gpus_per_node: Optional[int] = None
    """GPUs of one node; null: at most 8."""


@dataclass
class ExportConfig:
    enabled: bool = True
    """Export at the end of a run: the adapter, or the whole model of a full fine-tune."""
    verify: bool = True
    """Reopen the export with plain transformers and peft in a fresh process and compare logits."""
    max_shard_gib: float = bounded(5.0, above=0)
    """Largest safetensors file of an exported model, in GiB."""
    push_to_hub: Optional[str] = None
    """ORG/NAME: upload the verified export to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN."""
    hub_private: bool = True
    """Make a new hub repository private."""
    hub_base: Optional[str] = None
    """Hub id of the model that an uploaded adapter belongs to, where it lies in a folder here."""


@dataclass
class PlanConfig:
    format: str = choice("table", ("table", "json"))
    """launch/plan.py: table for people, json for programs."""
    picture: Optional[str] = None
    """launch/plan.py: write the picture of parts against the limit to this file."""


@dataclass
class SweepConfig:
    strategy: str = choice("grid", ("grid", "random", "optuna"))
    """grid: every combination; random: `trials` drawn from the seed; optuna: `trials` chosen from what came before."""
    space: dict[str, str] = field(default_factory=dict)
    """Settings that vary besides those of the command line: key -> values in Hydra's sweep grammar, e.g. optim.lr: "1e-5,3e-5"."""
    dir: Optional[str] = None
    """Folder of a sweep (-m); null: multirun/<YYYYmmdd-HHMMSS>. Given again, finished jobs are not repeated."""
    on_failure: str = choice("continue", ("continue", "stop"))
    """continue with the next job, or stop."""
    metric: str = "auto"
    """Figure that ranks jobs: a key of the last evaluation; auto: train.metric, or the training loss without evaluation."""
    direction: str = choice("auto", ("auto", "minimize", "maximize"))
    """minimize or maximize; auto: by the metric's name."""
    trials: int = bounded(20, at_least=1)
    """Jobs of a random or optuna sweep."""
    seed: int = 0
    """Seed of the draws; the jobs' own seed is `seed`."""
    pruner: str = choice("median", ("median", "halving", "none"))
    """optuna: stop a job whose metric is worse than others' at the same step: median, halving or none."""
    prune_after: int = bounded(2, at_least=0)
    """optuna: jobs that must be done before any is stopped early."""
    parallel: int = bounded(1, at_least=1)
    """Jobs at once, on GPUs or CPU cores that they do not share."""
    gpus_per_job: Optional[int] = bounded(None, at_least=1, suggest=1)
    """GPUs (on CPU: processes) of one job; null: all, shared evenly between the jobs at once."""
    num_gpus: Optional[int] = None
    """DeepSpeed's --num_gpus: GPUs of each node that the sweep may use."""
    num_nodes: Optional[int] = None
    """DeepSpeed's --num_nodes."""
    include: Optional[str] = None
    """DeepSpeed's --include: localhost:0,1 or worker-0@worker-1:0,2."""
    exclude: Optional[str] = None
    """DeepSpeed's --exclude."""
    hostfile: Optional[str] = None
    """DeepSpeed's --hostfile: a sweep over several nodes."""
    launcher: str = ""
    """Any other options of DeepSpeed's launcher, e.g. '--bind_cores_to_rank'."""


@dataclass
class Config:
    name: str = "custom"
    """Name of the recipe; part of the default run_dir."""
    run_dir: Optional[str] = None
    """Folder of the run; null: runs/<recipe>/<YYYYmmdd-HHMMSS>."""
    seed: int = 0
    """Everything random derives from it."""
    resume: str = "auto"
    """auto, never, or a run or checkpoint directory to continue from."""
    resume_changed: list[str] = field(default_factory=list)
    """Settings that may differ from the saved run's, by the name that the refusal prints, e.g. [data]."""
    verbose: bool = False
    """Let the libraries' own log lines through."""
    model: ModelConfig = MISSING
    task: TaskConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = MISSING
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


GENERATED = dict.fromkeys(("exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"), "max")
"""Metrics of generated answers, which only evaluations with eval.generate have."""
METRICS = {
    "clm": {"loss": "min", "perplexity": "min", **GENERATED},
    "instruct": {"loss": "min", "perplexity": "min", **GENERATED},
    "single_label": {"accuracy": "max", "f1": "max", "loss": "min"},
    "multi_label": {"f1": "max", "micro_f1": "max", "accuracy": "max", "loss": "min"},
    "regression": {"mse": "min", "pearson": "max", "loss": "min"},
    "qa": {"f1": "max", "exact_match": "max", "loss": "min"},
    "preference": {"loss": "min", "accuracy": "max", "margin": "max"},
    "reward": {"accuracy": "max", "loss": "min", "margin": "max"},
}
"""Task, or problem of a classification -> metrics that rank its evaluations, and the better end of each. The first
one counts where train.metric is null."""
DIRECTIONS = {name: better for metrics in METRICS.values() for name, better in metrics.items()}
"""Metric -> "min" or "max"."""
LM_EVAL_LOWER = ("word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""Metrics of lm-eval whose better end is the lower one, besides those of `DIRECTIONS`."""


def kind_of(section: Any) -> str:
    """Return the kind of a task or adapter section, a key of `KINDS`."""
    return type(section).__name__.removesuffix("Config").lower()


def metrics_of(task: TaskConfig) -> dict[str, str]:
    """Return metric -> "min" or "max", the task's own metric first; empty for no known problem."""
    return METRICS.get(getattr(task, "problem", kind_of(task)), {})


def direction_of(metric: str) -> str:
    """Return "min" or "max", the better end of METRIC, SET/METRIC or, of lm-eval, TASK/METRIC."""
    name = metric.rpartition("/")[2].partition(",")[0]
    return DIRECTIONS.get(name) or ("min" if name in LM_EVAL_LOWER else "max")


def asks_lm_eval(cfg: EvalConfig, metric: str | None) -> bool:
    """Tell whether a metric is TASK/METRIC of one of lm-eval's tasks."""
    return (metric or "").rpartition("/")[0] in cfg.lm_eval


def best_metric(task: TaskConfig, name: str | None) -> tuple[str, str]:
    """Return (metric, "min" or "max") by which the best evaluation is chosen.

    Args:
        name: train.metric: METRIC, SET/METRIC or TASK/METRIC; None: the task's own.
    """
    metrics = metrics_of(task)
    name = name or next(iter(metrics))
    return name, metrics.get(name.rpartition("/")[2]) or direction_of(name)


@dataclass(frozen=True)
class Head:
    """A head of GPT-J, and its names in transformers, peft and on the hub."""

    name: str
    module: str
    """Attribute of the model that holds the head's linear layer."""
    architecture: str
    """Class in transformers, as config.json names it."""
    auto_class: str
    peft_task: str
    pipeline: str
    """Task in the metadata of a model card."""
    task: str
    """Task that a model from elsewhere with this head is taken to have."""


HEADS = {
    head.name: head
    for head in (
        Head(
            name="lm",
            module="lm_head",
            architecture="GPTJForCausalLM",
            auto_class="AutoModelForCausalLM",
            peft_task="CAUSAL_LM",
            pipeline="text-generation",
            task="clm",
        ),
        Head(
            name="classify",
            module="score",
            architecture="GPTJForSequenceClassification",
            auto_class="AutoModelForSequenceClassification",
            peft_task="SEQ_CLS",
            pipeline="text-classification",
            task="classify",
        ),
        Head(
            name="qa",
            module="qa_outputs",
            architecture="GPTJForQuestionAnswering",
            auto_class="AutoModelForQuestionAnswering",
            peft_task="QUESTION_ANS",
            pipeline="question-answering",
            task="qa",
        ),
    )
}


def read_gptj_config(path: Path) -> dict[str, Any]:
    """Return the values of a GPT-J's config.json; `path` is the file or its folder.

    Raises:
        UserError: it is missing, broken, or another model's.
    """
    file = path / "config.json" if path.is_dir() else path
    values = read_settings(file)
    check_gptj_config(values, str(file))
    return values


def check_gptj_config(values: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError if the values of a config.json do not describe a GPT-J."""
    if values.get("model_type") != "gptj":
        raise UserError(
            f"model_type is {values.get('model_type')!r}, not 'gptj'",
            where,
            "Only GPT-J models can be trained here.",
        )
    if missing := {"n_embd", "n_layer", "n_head", "vocab_size"} - values.keys():
        raise UserError(
            f"the model's config lacks {', '.join(sorted(missing))}",
            where,
            "Download config.json again.",
        )


def config_head(values: dict[str, Any]) -> Head:
    """Return the head that a config.json names; that of language models where it names none."""
    named = (values.get("architectures") or [""])[0]
    return next((head for head in HEADS.values() if head.architecture == named), HEADS["lm"])


def adapter_head(values: dict[str, Any], where: str) -> Head:
    """Return the head of GPT-J that an adapter of plain peft was trained with.

    Args:
        values: of its adapter_config.json.

    Raises:
        UserError: a task that GPT-J has no head for.
    """
    saved, task = values.get("modules_to_save") or (), values.get("task_type")
    for head in HEADS.values():
        # A language model's head may be saved with an adapter of any task_type.
        if head.name != "lm" and head.module in saved:
            return head
    for head in HEADS.values():
        if task in (None, head.peft_task):
            return head
    raise UserError(
        f"the adapter's task_type is {task}",
        where,
        "Adapters of language models (CAUSAL_LM), classifiers (SEQ_CLS) and question answerers "
        "(QUESTION_ANS) can be used here.",
    )


# Conversion between a config and plain values, for config.yaml, exports and trackers. Texts are
# kept as they are.
#
# OmegaConf reads `${...}` in a text as a reference and `???` as a missing value, but a prompt or a
# label may contain either.
class Literals:
    """Holds texts that OmegaConf would misread, while it composes."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def aside(self, value: Any) -> Any:
        """Return `value` with a placeholder for every such text; dicts and lists are copied."""
        if isinstance(value, dict):
            return {key: self.aside(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.aside(item) for item in value]
        if not isinstance(value, str) or ("${" not in value and value != "???"):
            return value
        self._texts.append(value)
        return f"\ufdd0{len(self._texts) - 1}\ufdd0"

    def back(self, value: Any) -> Any:
        """Return the composed value with its texts restored; dataclasses are filled in place."""
        if is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                setattr(value, field.name, self.back(getattr(value, field.name)))
            return value
        if isinstance(value, dict):
            return {self.back(key): self.back(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.back(item) for item in value]
        if isinstance(value, str) and "\ufdd0" in value:
            return re.sub("\ufdd0(\\d+)\ufdd0", lambda found: self._texts[int(found[1])], value)
        return value


def plain_config(cfg: Config) -> dict[str, Any]:
    """Return the config as plain values; task and adapter name their kinds, so it can be read back.

    `check` has refused configs with secrets: nothing here is hidden or shortened.
    """
    values = plain_values(cfg)
    values["task"]["kind"] = kind_of(cfg.task)
    values["adapter"]["kind"] = kind_of(cfg.adapter)
    return values


def plain_values(cfg: Any) -> dict[str, Any]:
    """Convert any of the schema's dataclasses to dicts, lists, numbers and texts."""
    return _without_enums(asdict(cfg))


def typed(kind: type, values: dict[str, Any]) -> Any:
    """Build a dataclass of the schema from plain values.

    Keys that the schema no longer has are left out.
    """
    known, literals = {f.name for f in fields(kind)}, Literals()
    kept = literals.aside({key: value for key, value in values.items() if key in known})
    return literals.back(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), kept)))


def to_yaml(values: dict[str, Any]) -> str:
    """Return plain values as yaml that OmegaConf and `read_yaml` read alike."""
    return yaml.dump(
        values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )


def read_yaml(file: Path) -> Any:
    """Return the values of a yaml file, with `${...}` in texts kept literally.

    Raises:
        yaml.YAMLError: the file is not valid yaml.
    """
    return yaml.safe_load(file.read_text(encoding="utf-8"))


class _Dumper(yaml.SafeDumper):
    """Dumper that also quotes texts which only OmegaConf takes for a number.

    An example is 1e-3, which yaml itself reads as text.
    """


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_text)


def _without_enums(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_enums(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_enums(item) for item in value]
    return value.value if isinstance(value, Enum) else value


KINDS = {
    "task": {
        "clm": ClmConfig,
        "instruct": InstructConfig,
        "classify": ClassifyConfig,
        "qa": QaConfig,
        "preference": PreferenceConfig,
        "reward": RewardConfig,
    },
    "adapter": {
        "full": FullConfig,
        "lora": LoraConfig,
        "ia3": Ia3Config,
        "prompt": PromptConfig,
        "prefix": PrefixConfig,
    },
}
"""Groups whose options have keys of their own: group -> kind -> schema."""


def schema_keys(node: type, prefix: str = "") -> Iterator[tuple[str, type, Field]]:
    """Yield (dotted key, class that holds it, field) for every setting under a schema.

    The keys of all kinds of a group are included: those of lora, ia3, ... below `adapter.`.
    """
    for item in fields(node):
        # Annotations are text: look them up in the module that defines the schema.
        section = getattr(sys.modules[node.__module__], str(item.type), None)
        if isinstance(section, type) and is_dataclass(section):
            for kind in KINDS.get(item.name, {"": section}).values():
                yield from schema_keys(kind, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, node, item


def all_keys(node: type) -> set[str]:
    """Return the dotted keys of every setting under a schema."""
    return {key for key, _, _ in schema_keys(node)}
