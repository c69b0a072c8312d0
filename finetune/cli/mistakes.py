"""Translation of Hydra's and OmegaConf's errors to what is wrong and what was probably meant."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from finetune import config as schema
from finetune.cli import schemas
from finetune.cli.help import field_docs
from finetune.compose import CompositionError
from finetune.config import KINDS, all_keys, field_classes
from finetune.errors import UserError, command, hydra_quoted, setting


def composition_mistake(error: CompositionError, conf: Path) -> UserError:
    """Return the likely mistake behind words that do not compose.

    Args:
        conf: the folder of config groups.
    """
    if isinstance(error.__cause__, Exception):
        return user_error(error.__cause__, error.overrides, error.program, conf)
    return unknown_key(error.key, error.program, conf)


def user_error(error: Exception, overrides: list[str], name: str, conf: Path) -> UserError:
    """Return the user's error for a failure to compose `overrides` for program `name`.

    Args:
        conf: the folder of config groups.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error, conf)
    chain: BaseException | None = error
    while chain is not None:
        key = getattr(chain, "full_key", None)
        if isinstance(chain, OmegaConfBaseException) and key:
            return _key_error(str(key), chain, name, conf)
        chain = chain.__cause__ or chain.__context__
    text = (
        str(error).split("\nTo append")[0].split("\nSet the environment")[0].split("\nSee https")[0]
    )
    for word in overrides:
        key = word.lstrip("+~").split("=")[0]
        if "Could not override" in text and f"'{key}'" in text:
            return unknown_key(key, name, conf)
        if "=" not in word:
            return _no_value(word, name, conf)
    if found := re.match(r"Ambiguous value for argument '([^=]*)=", text):
        key, again = (
            found[1],
            command([f"python launch/{name}.py", "-m", *overrides]).replace("'", "", 2),
        )
        sweep = f"\n  Each value in a run of its own: {again}" if name == "train" else ""
        return UserError("several values, where one is needed", key, f"Give one value.{sweep}")
    for word in overrides:
        if not _parses(word):
            key, _, value = word.partition("=")
            return UserError(
                "this value cannot be read",
                word,
                f"Quote it twice, for the shell and for Hydra: {command([f'{key}={hydra_quoted(value)}'])}",
            )
    return UserError(text, remedy="See --help for the keys and groups.")


def unknown_option(word: str, name: str, conf: Path) -> UserError:
    """Return the error for a word that only looks like an option, such as `--learning_rate`."""
    key = word.lstrip("-").split("=")[0]
    near = nearest_keys(key, name, conf)
    remedy = f"Did you mean {near[0]}=...?  " if near else ""
    return UserError(
        f"unknown option {word}", remedy=f"{remedy}Settings are written key=value; see --help."
    )


def unknown_key(key: str, name: str, conf: Path, text: str = "") -> UserError:
    leaf = key.rpartition(".")[2]
    if name in ("train", "plan") and leaf in ABSENT:
        return UserError(text or "there is no such key", key, ABSENT[leaf])
    near = nearest_keys(key, name, conf)
    hint = f"  ({HINTS[leaf]})" if leaf in HINTS and near and near[0] == OTHERS.get(leaf) else ""
    remedy = f"Did you mean {' or '.join(near)}?{hint}" if near else "See --help for the keys."
    return UserError(text or "there is no such key", key, _of_another_kind(key, conf) or remedy)


def nearest_keys(key: str, name: str, conf: Path) -> list[str]:
    """Return at most three keys or groups that `key` may stand for, the likeliest first."""
    keys = sorted(set(all_keys(schemas.SCHEMAS.get(name, schema.Config)))) + _groups(name, conf)
    leaf = key.rpartition(".")[2]
    if name in ("train", "plan") and leaf in OTHERS and OTHERS[leaf] != key:
        return [OTHERS[leaf]]
    scored = [
        (max(_alike(key, known), 0.95 * _alike(leaf, known.rpartition(".")[2])), known)
        for known in keys
    ]
    best = max(scored)[0]
    return [
        known
        for score, known in sorted(scored, key=lambda s: -s[0])[:3]
        if score > 0.7 and score > best - 0.1
    ]


def _unknown_option(error: MissingConfigException, conf: Path) -> UserError:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = [o for o in (error.options or []) if not o.endswith("schema")]
    options = options or [path.stem for path in (conf / group).glob("*.yaml")]
    remedy = f"Known: {', '.join(sorted(options))}."
    near = difflib.get_close_matches(option, options, 1, 0.5)
    return UserError(
        f"there is no {group or 'config'} named '{option}'",
        f"{group}={option}",
        f"Did you mean {group}={near[0]}?  {remedy}" if near else remedy,
    )


def _key_error(key: str, error: BaseException, name: str, conf: Path) -> UserError:
    text = str(error).split("\n")[0]
    if "not in" in text and ("Key '" in text or "key '" in text):
        return unknown_key(key, name, conf, text)
    doc = _doc_of(key)
    return UserError(
        text, key, f"{key}: {doc}" if doc else "See --help for the keys and their types."
    )


def _no_value(word: str, name: str, conf: Path) -> UserError:
    for group in _groups(name, conf):
        folder = conf / group if group != "recipe" else conf.parent / "recipes"
        if (folder / f"{word}.yaml").is_file():
            return UserError("a setting needs a key", word, f"Write {group}={word}.")
    near = nearest_keys(word, name, conf)
    return UserError(
        "a setting needs a value", word, f"Write {near[0] if near else 'key'}=VALUE; see --help."
    )


def _of_another_kind(key: str, conf: Path) -> str:
    """Return a sentence on the options of the group that have this key; "" if none has.

    For example, adapter=lora has adapter.rank.
    """
    group, _, leaf = key.partition(".")
    kinds = [
        kind
        for kind, node in KINDS.get(group, {}).items()
        if leaf in {f.name for f in fields(node)}
    ]
    options = [
        path.stem for path in sorted((conf / group).glob("*.yaml")) if kind_of(path) in kinds
    ]
    # The plain kind before its variants: lora before dora.
    named = [
        f"{group}={option}" for option in sorted(options, key=lambda option: option not in kinds)
    ]
    return (
        f"{' and '.join(named)} {'has' if len(named) == 1 else 'have'} this key." if named else ""
    )


def kind_of(path: Path) -> str:
    """Return the kind in the schema that an option builds on."""
    found = re.search(r"/schema/\w+@_here_: (\w+)", path.read_text(encoding="utf-8"))
    return found[1] if found else path.stem


def _doc_of(key: str) -> str:
    section, _, leaf = key.rpartition(".")
    nodes: list[type] = [schema.Config]
    for part in section.split(".") if section else []:
        nodes = [
            kind
            for node in nodes
            for f in fields(node)
            if f.name == part
            for kind in field_classes(node, f)
        ]
    return next((docs[leaf] for node in nodes if leaf in (docs := field_docs(node))), "")


def _groups(name: str, conf: Path) -> list[str]:
    """Return the names of the config groups: recipe, adapter, ..."""
    return (
        ["recipe", *sorted(p.name for p in conf.iterdir() if p.is_dir())]
        if name in ("train", "plan")
        else []
    )


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


# Names of other programs for our keys, so that a user who types one gets a hint instead of "no such
# key". Does not import torch.
#
# docs/coming_from.md shows the same tables; a test checks both against the existing keys. Hydra's
# own options and settings (`--multirun`, `hydra.sweep.dir=...`) work as in Hydra or get a hint too:
# these programs are started by DeepSpeed's launcher, on many ranks, where Hydra's own directories
# and launchers do not apply.
TRAINER = {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "tokenizer_name": "model.tokenizer",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "output_dir": "run_dir",
    "max_seq_length": "task.max_length",
    "max_length": "task.max_length",
    "block_size": "task.max_length",
    "per_device_train_batch_size": "train.micro_batch",
    "batch_size": "train.micro_batch",
    "per_device_eval_batch_size": "train.eval_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.grad_clip",
    "gradient_checkpointing": "train.activation_checkpointing",
    "packing": "train.packing",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_dtype": "model.dtype",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.best",
    "save_only_model": "checkpoint.final",
    "report_to": "tracker",
    "resume_from_checkpoint": "resume",
    "deepspeed": "zero",
    "run_name": "run_dir",
    "attn_implementation": "model.attention",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "metric_for_best_model": "train.metric",
}
AXOLOTL = {
    "base_model": "model.path",
    "datasets": "data.train",
    "test_datasets": "data.eval",
    "sequence_len": "task.max_length",
    "sample_packing": "train.packing",
    "micro_batch_size": "train.micro_batch",
    "num_epochs": "train.epochs",
    "lr_scheduler": "optim.schedule",
    "adapter": "adapter",
    "lora_target_modules": "adapter.targets",
    "lora_target_linear": "adapter.targets",
    "peft_use_dora": "adapter.dora",
    "peft_use_rslora": "adapter.rslora",
    "eval_batch_size": "train.eval_batch",
    "evals_per_epoch": "train.eval_every",
    "saves_per_epoch": "checkpoint.every",
    "early_stopping_patience": "train.early_stopping",
    "dataset_prepared_path": "data.cache_dir",
    "wandb_project": "tracker.wandb.project",
    "wandb_entity": "tracker.wandb.entity",
    "chat_template": "task.template",
    "output_dir": "run_dir",
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
}
LLAMA_FACTORY = {
    "model_name_or_path": "model.path",
    "dataset": "data.train",
    "eval_dataset": "data.eval",
    "cutoff_len": "task.max_length",
    "stage": "task",
    "finetuning_type": "adapter",
    "template": "task.template",
    "lora_rank": "adapter.rank",
    "lora_target": "adapter.targets",
    "per_device_train_batch_size": "train.micro_batch",
    "learning_rate": "optim.lr",
    "num_train_epochs": "train.epochs",
    "output_dir": "run_dir",
}
OTHERS = TRAINER | AXOLOTL | LLAMA_FACTORY
"""Their name -> our key."""

HINTS = {
    "gradient_accumulation_steps": "accumulation is derived: global_batch = micro_batch x ranks x accumulation",
    "bf16": "write model.dtype=bf16",
    "fp16": "write model.dtype=fp16",
    "stage": "write task=clm or task=instruct",
    "report_to": "write tracker=[tensorboard,wandb]",
    "deepspeed": "write zero=stage2, or leave it to zero=auto",
    "lora_target_linear": "write adapter.targets=all-linear",
    "evals_per_epoch": "train.eval_every counts steps",
    "saves_per_epoch": "checkpoint.every counts steps",
    "finetuning_type": "write adapter=lora or adapter=full",
}
"""What the key alone does not say."""

ABSENT = {
    name: answer
    for names, answer in [
        (
            (
                "load_in_4bit",
                "load_in_8bit",
                "bnb_4bit_quant_type",
                "quantization_config",
                "quantization_bit",
                "qlora",
            ),
            "Quantised base weights are not there. To save memory: adapter=lora, zero=stage3, zero.offload_params=cpu or "
            "train.activation_checkpointing=true; launch/plan.py says what fits.",
        ),
        (
            ("max_train_samples", "max_eval_samples", "max_samples"),
            "A part of the data cannot be chosen: write the rows into a file of their own, e.g. "
            "head -n 1000 train.jsonl > part.jsonl, or train for fewer steps: train.steps=100.",
        ),
        (
            (
                "validation_split",
                "validation_split_percentage",
                "val_size",
                "val_set_size",
                "test_size",
            ),
            "Evaluation data are not split off: write the rows into a file of their own and give it as data.eval=FILE. "
            "data.eval_split names the split of a hub id or `datasets` folder.",
        ),
        (
            (
                "special_tokens",
                "additional_special_tokens",
                "added_tokens",
                "new_special_tokens",
                "add_tokens",
            ),
            "Tokens cannot be added: the vocabulary stays the checkpoint's. model.tokenizer=DIR reads a tokenizer whose ids "
            "fit into it.",
        ),
        (
            ("streaming", "dataset_streaming", "pretraining_dataset"),
            "There is nothing to switch on: files of any size are tokenised once, in little memory, and read from "
            "data.cache_dir.",
        ),
        (
            ("greater_is_better",),
            "A metric's better end is known: name it alone, train.metric=accuracy.",
        ),
    ]
    for name in names
}
"""Their settings that have no counterpart here -> what to do instead."""

HYDRA_FLAGS = {
    "--config-name": "Recipes take the place of primary configs: recipe=NAME; see --help for their names.",
    "--config-path": "Add a folder of your own configs with --config-dir DIR.",
    "--experimental-rerun": "Run the same command again: it continues from the newest checkpoint of its run_dir.",
}
"""Hydra's options that have no effect here -> what to do instead."""
HYDRA_SHORT = {
    "-c": "--cfg",
    "-p": "--package",
    "-cd": "--config-dir",
    "-cn": "--config-name",
    "-cp": "--config-path",
    "-i": "--info",
    "-m": "--multirun",
    "-r": "--run",
    "-sc": "--shell-completion",
}
HYDRA_VALUED = (
    "--cfg",
    "--package",
    "--config-dir",
    "--config-name",
    "--config-path",
    "--info",
    "--experimental-rerun",
)
HYDRA_SIMPLE = (
    "--multirun",
    "--run",
    "--resolve",
    "--version",
    "--hydra-help",
    "--shell-completion",
)
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

HYDRA_SETTINGS = {
    "hydra/launcher": "Jobs of a sweep are started by DeepSpeed's launcher: sweep.parallel=K runs K at once, and "
    "sweep.launcher='...' gives its options.",
    "hydra.launcher": "Jobs of a sweep are started by DeepSpeed's launcher: sweep.parallel=K runs K at once, and "
    "sweep.launcher='...' gives its options.",
    "hydra/sweeper": "Write sweep=grid, sweep=random or sweep=optuna.",
    "hydra.sweeper": "Write sweep=grid, sweep=random or sweep=optuna; their settings are sweep.trials, sweep.metric, "
    "sweep.direction and sweep.space (--help sweep).",
    "hydra.sweep.subdir": "A job's folder is its number below sweep.dir.",
    "hydra.job.name": "A run is named by name=NAME, and lives where run_dir=DIR says.",
    "hydra.job.chdir": "A run never changes its working directory; what it writes goes to run_dir=DIR.",
    "hydra.job.env_set": "Set variables in the shell: NAME=VALUE deepspeed launch/train.py ...",
    "hydra.job": "A run is named by name=NAME, and lives where run_dir=DIR says.",
    "hydra.mode": "A sweep is started by -m.",
    "hydra/job_logging": "A run prints what it does; verbose=true lets the libraries' own log lines through.",
    "hydra.job_logging": "A run prints what it does; verbose=true lets the libraries' own log lines through.",
    "hydra/hydra_logging": "verbose=true lets the libraries' own log lines through.",
    "hydra.hydra_logging": "verbose=true lets the libraries' own log lines through.",
    "hydra.output_subdir": "There is no .hydra folder: run_dir/config.yaml holds the config.",
    "hydra/output": "There is no .hydra folder: run_dir/config.yaml holds the config.",
    "hydra": "run_dir=DIR, sweep.dir=DIR and verbose=true are the settings that take their place; see --help.",
}
"""Hydra's own settings, by their first letters -> what to do instead; the longest that fits counts."""


def split_flags(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split argv into settings and Hydra's options.

    Returns:
        (settings and unknown options, Hydra's options by their long names).

    Raises:
        UserError: an option of Hydra's has no effect here, or lacks its value.
    """
    words, flags, rest = list[str](), dict[str, str](), list(argv)
    while rest:
        word = rest.pop(0)
        name, separator, value = word.partition("=")
        name = HYDRA_SHORT.get(name, name)
        if name in HYDRA_SIMPLE:
            flags[name] = value
        elif name not in HYDRA_VALUED:
            words.append(word)
        elif separator:
            flags[name] = value
        elif name == "--info":
            flags[name] = rest.pop(0) if rest and rest[0] in INFO else "all"
        elif rest:
            flags[name] = rest.pop(0)
        else:
            raise UserError(f"{word} needs a value", remedy=f"Write {word} VALUE.")
    for name, answer in HYDRA_FLAGS.items():
        if name in flags:
            raise UserError(f"{name} has no effect here", remedy=answer)
    if "--config-dir" in flags:
        folder = Path(flags["--config-dir"]).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(
                "there is no such directory",
                f"--config-dir {flags['--config-dir']}",
                "Check the path.",
            )
        words.append(f"hydra.searchpath=[{setting('', f'file://{folder}')[1:]}]")
    return words, flags


def without_hydra(words: list[str], name: str, multirun: bool = False) -> list[str]:
    """Replace Hydra's own settings by the equivalent settings of this program.

    Args:
        name: the program.
        multirun: whether the words start a sweep.

    Raises:
        UserError: a setting has no effect here; the message says what to type instead.
    """
    return [own for word in words for own in _own(word, name, multirun)]


def _own(word: str, name: str, multirun: bool) -> list[str]:
    key, _, value = word.lstrip("+~").partition("=")
    trains = name in ("train", "plan")
    if not key.startswith(("hydra.", "hydra/")) or key == "hydra.searchpath":
        return [word]
    if key == "hydra.run.dir" and trains and not multirun:
        return [f"run_dir={value}"]
    if key == "hydra.sweep.dir" and trains and multirun:
        return [f"sweep.dir={value}"]
    if key == "hydra.verbose" and value.lower() in ("true", "false"):
        return [f"verbose={value.lower()}"]
    if key == "hydra.output_subdir" and value.lower() == "null":
        return []
    if key == "hydra.run.dir":
        answer = (
            f"The jobs of a sweep live below {command([f'sweep.dir={value}'])}."
            if multirun
            else (
                "Results go where out=PATH says."
                if name in ("evaluate", "export", "generate", "report")
                else "This program writes nothing there."
            )
        )
    elif key == "hydra.sweep.dir":
        answer = (
            f"It is the folder of a sweep, which -m starts; one run lives in {command([f'run_dir={value}'])}."
            if trains
            else "Only launch/train.py -m starts a sweep."
        )
    else:
        answer = HYDRA_SETTINGS[
            max((known for known in HYDRA_SETTINGS if key.startswith(known)), key=len)
        ]
    raise UserError("this setting of Hydra's has no effect here", word, answer)
