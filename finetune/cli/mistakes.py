"""Translation of Hydra's and OmegaConf's errors to what is wrong and what was probably meant."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from finetune.cli.help import GROUPS, key_help, option_files
from finetune.cli.schemas import SCHEMAS
from finetune.compose import CompositionError, option_kind
from finetune.config import KINDS, all_keys
from finetune.errors import UserError, command, hydra_quoted, setting


def composition_mistake(error: CompositionError) -> UserError:
    """Return the likely mistake behind words that do not compose."""
    cause, program = error.__cause__, error.program
    if not isinstance(cause, Exception):
        return unknown_key(error.key, program)

    # An option that a group does not have.
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
        group, _, option = str(cause.missing_cfg_file).rpartition("/")
        options = [name for name in (cause.options or []) if not name.endswith("schema")]
        options = options or list(option_files(group))
        near = difflib.get_close_matches(option, options, 1, 0.5)
        meant = f"Did you mean {group}={near[0]}?  " if near else ""
        return UserError(
            f"there is no {group or 'config'} named '{option}'",
            f"{group}={option}",
            f"{meant}Known: {', '.join(sorted(options))}.",
        )

    # OmegaConf's errors name the key, some of them only in the exception that they wrap.
    chain: BaseException | None = cause
    while chain is not None:
        key = getattr(chain, "full_key", None)
        if isinstance(chain, OmegaConfBaseException) and key:
            text = str(chain).split("\n")[0]
            if "not in" in text and ("Key '" in text or "key '" in text):
                return unknown_key(str(key), program, text)
            doc = key_help(str(key), SCHEMAS[program])
            return UserError(
                text,
                str(key),
                f"{key}: {doc}" if doc else "See --help for the keys and their types.",
            )
        chain = chain.__cause__ or chain.__context__

    # A key that Hydra could not place, or a word without "=".
    text = re.split(r"\n(?:To append|Set the environment|See https)", str(cause))[0]
    for word in error.overrides:
        key = word.lstrip("+~").split("=")[0]
        if "Could not override" in text and f"'{key}'" in text:
            return unknown_key(key, program)
        if "=" not in word:
            for group in group_names(program):
                if word in option_files(group):
                    return UserError("a setting needs a key", word, f"Write {group}={word}.")
            key = [*nearest_keys(word, program), "key"][0]
            return UserError("a setting needs a value", word, f"Write {key}=VALUE; see --help.")

    # A comma outside of a sweep, or a value that breaks Hydra's grammar.
    if matched := re.match(r"Ambiguous value for argument '([^=]*)=", text):
        sweep = ""
        if program == "train":
            again = command(["python", "launch/train.py", "-m", *error.overrides])
            sweep = f"\n  Each value in a run of its own: {again}"
        return UserError(
            "several values, where one is needed", matched[1], f"Give one value.{sweep}"
        )
    for word in error.overrides:
        try:
            OverridesParser.create().parse_override(word)
        except HydraException:
            key, _, value = word.partition("=")
            quoted = command([f"{key}={hydra_quoted(value)}"])
            return UserError(
                "this value cannot be read",
                word,
                f"Quote it twice, for the shell and for Hydra: {quoted}",
            )
    return UserError(text, remedy="See --help for the keys and groups.")


def unknown_option(word: str, program: str) -> UserError:
    """Return the error for a word that only looks like an option, such as `--learning_rate`."""
    near = nearest_keys(word.lstrip("-").split("=")[0], program)
    meant = f"Did you mean {near[0]}=...?  " if near else ""
    return UserError(
        f"unknown option {word}", remedy=f"{meant}Settings are written key=value; see --help."
    )


def unknown_key(key: str, program: str, text: str = "there is no such key") -> UserError:
    """Return the error for a key that the schema does not have, with the key that was meant."""
    group, _, rest = key.partition(".")
    leaf = key.rpartition(".")[2]
    if program in ("train", "plan") and leaf in ABSENT:
        return UserError(text, key, ABSENT[leaf])

    # Options of the group that have this key: adapter=lora has adapter.rank. The plain kind comes
    # before its variants, lora before dora.
    kinds = [
        kind
        for kind, node in KINDS.get(group, {}).items()
        if rest in {item.name for item in fields(node)}
    ]
    having = [option for option in option_files(group) if option_kind(group, option) in kinds]
    if having:
        named = [f"{group}={option}" for option in sorted(having, key=lambda o: o not in kinds)]
        have = "has" if len(named) == 1 else "have"
        return UserError(text, key, f"{' and '.join(named)} {have} this key.")

    near = nearest_keys(key, program)
    if not near:
        return UserError(text, key, "See --help for the keys.")
    hint = f"  ({HINTS[leaf]})" if leaf in HINTS and near[0] == OTHERS.get(leaf) else ""
    return UserError(text, key, f"Did you mean {' or '.join(near)}?{hint}")


def nearest_keys(key: str, program: str) -> list[str]:
    """Return at most three keys or groups that `key` may stand for, the likeliest first."""
    leaf = key.rpartition(".")[2]
    if program in ("train", "plan") and leaf in OTHERS and OTHERS[leaf] != key:
        return [OTHERS[leaf]]

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    scores = {
        name: max(alike(key, name), 0.95 * alike(leaf, name.rpartition(".")[2]))
        for name in [*sorted(all_keys(SCHEMAS[program])), *group_names(program)]
    }
    best = max(scores.values())
    near = sorted(scores, key=lambda name: -scores[name])[:3]
    return [name for name in near if scores[name] > 0.7 and scores[name] > best - 0.1]


def group_names(program: str) -> list[str]:
    """Return the names of a program's config groups: recipe, adapter, ..."""
    return list(GROUPS) if program in ("train", "plan") else []


# Names of other programs for our keys, so that a user who types one gets a hint instead of "no such
# key". Does not import torch.
#
# docs/coming_from.md shows the same tables; a test checks both against the existing keys. Hydra's
# own options and settings (`--multirun`, `hydra.sweep.dir=...`) work as in Hydra or get a hint too:
# these programs are started by DeepSpeed's launcher, on many ranks, where Hydra's own directories
# and launchers do not apply.
OTHERS = {
    # transformers' Trainer, peft and TRL.
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
    "layers_to_transform": "adapter.layers",
    "modules_to_save": "adapter.modules_to_save",
    "loraplus_lr_ratio": "adapter.lr_ratio",
    "init_lora_weights": "adapter.init",
    "neftune_noise_alpha": "train.neftune_alpha",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "metric_for_best_model": "train.metric",
    "beta": "task.beta",
    "pref_beta": "task.beta",
    "loss_type": "task.loss",
    "pref_loss": "task.loss",
    "label_smoothing": "task.label_smoothing",
    "simpo_gamma": "task.gamma",
    # Axolotl, besides names that it shares with those above.
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
    "eval_max_new_tokens": "eval.generate_tokens",
    "lm_eval_tasks": "eval.lm_eval",
    "dataset_prepared_path": "data.cache_dir",
    "wandb_project": "tracker.wandb.project",
    "wandb_entity": "tracker.wandb.entity",
    "chat_template": "task.template",
    # LLaMA-Factory, likewise.
    "predict_with_generate": "eval.generate",
    "dataset": "data.train",
    "eval_dataset": "data.eval",
    "cutoff_len": "task.max_length",
    "stage": "task",
    "finetuning_type": "adapter",
    "template": "task.template",
    "lora_rank": "adapter.rank",
    "lora_target": "adapter.targets",
}
"""Their name -> our key."""

HINTS = {
    "gradient_accumulation_steps": "accumulation is derived: global_batch = micro_batch x ranks x "
    "accumulation",
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
"""Their name -> a remark on how our key differs."""

ABSENT = {
    name: answer
    for names, answer in {
        "load_in_4bit load_in_8bit bnb_4bit_quant_type quantization_config quantization_bit "
        "qlora": (
            "Frozen weights in 8 or 4 bits: model.quantize=int8 or model.quantize=nf4, with an "
            "adapter, e.g. adapter=lora; launch/plan.py says what fits."
        ),
        "max_train_samples max_eval_samples max_samples": (
            "data.max_rows=1000 reads only the first rows of the training and the evaluation data."
        ),
        "validation_split validation_split_percentage val_size val_set_size test_size": (
            "data.eval=0.02 holds out a share of the training rows, data.eval_rows=500 a number"
            " of them. data.eval_split names the split of a hub id or `datasets` folder."
        ),
        "special_tokens additional_special_tokens added_tokens new_special_tokens add_tokens": (
            "Tokens cannot be added: the vocabulary stays the checkpoint's. model.tokenizer=DIR"
            " reads a tokenizer whose ids fit into it."
        ),
        "streaming dataset_streaming pretraining_dataset": (
            "There is nothing to switch on: files of any size are tokenised once, in little "
            "memory, and read from data.cache_dir."
        ),
        "greater_is_better": (
            "A metric's better end is known: name it alone, train.metric=accuracy."
        ),
    }.items()
    for name in names.split()
}
"""Their settings that have no counterpart here -> what to do instead."""


@dataclass(frozen=True)
class Option:
    """An option of Hydra's, or `--help`."""

    short: str = ""
    valued: bool = False
    prints: bool = False
    """Prints something in place of running."""
    instead: str = ""
    """Remedy for an option that has no effect here; empty for one that works."""


OPTIONS = {
    "--help": Option("-h", prints=True),
    "--cfg": Option("-c", valued=True, prints=True),
    "--package": Option("-p", valued=True),
    "--info": Option("-i", valued=True, prints=True),
    "--version": Option(prints=True),
    "--hydra-help": Option(prints=True),
    "--shell-completion": Option("-sc", prints=True),
    "--resolve": Option(),
    "--run": Option("-r"),
    "--multirun": Option("-m"),
    "--config-dir": Option("-cd", valued=True),
    "--config-name": Option(
        "-cn",
        valued=True,
        instead="Recipes take the place of primary configs: recipe=NAME; see --help for their "
        "names.",
    ),
    "--config-path": Option(
        "-cp",
        valued=True,
        instead="Add a folder of your own configs with --config-dir DIR.",
    ),
    "--experimental-rerun": Option(
        valued=True,
        instead="Run the same command again: it continues from the newest checkpoint of its "
        "run_dir.",
    ),
}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""Values of --info, which may also stand alone."""

HYDRA_SETTINGS = {
    "hydra.launcher": "Jobs of a sweep are started by DeepSpeed's launcher: sweep.parallel=K runs "
    "K at once, and sweep.launcher='...' gives its options.",
    "hydra.sweeper": "Write sweep=grid, sweep=random or sweep=optuna; their settings are "
    "sweep.trials, sweep.metric, sweep.direction and sweep.space (--help sweep).",
    "hydra.sweep.subdir": "A job's folder is its number below sweep.dir.",
    "hydra.job": "A run is named by name=NAME, and lives where run_dir=DIR says.",
    "hydra.job.chdir": "A run never changes its working directory; what it writes goes to "
    "run_dir=DIR.",
    "hydra.job.env_set": "Set variables in the shell: NAME=VALUE deepspeed launch/train.py ...",
    "hydra.mode": "A sweep is started by -m.",
    "hydra.job_logging": "A run prints what it does; verbose=true lets the libraries' own log "
    "lines through.",
    "hydra.hydra_logging": "verbose=true lets the libraries' own log lines through.",
    "hydra.output": "There is no .hydra folder: run_dir/config.yaml holds the config.",
    "hydra": "run_dir=DIR, sweep.dir=DIR and verbose=true are the settings that take their place; "
    "see --help.",
}
"""Hydra's own settings and groups (with a dot for the slash), by their first letters -> what to do
instead; the longest that fits counts."""


def split_flags(argv: list[str], program: str = "train") -> tuple[list[str], dict[str, str]]:
    """Split argv into settings and Hydra's options.

    Returns:
        (settings, Hydra's options by their long names).

    Raises:
        UserError: an option is unknown, has no effect here, or lacks its value.
    """
    words, flags, rest = list[str](), dict[str, str](), list(argv)
    long_names = {option.short: name for name, option in OPTIONS.items() if option.short}
    while rest:
        word = rest.pop(0)
        name, separator, value = word.partition("=")
        name = long_names.get(name, name)
        option = OPTIONS.get(name)
        if option is None and word.startswith("-"):
            raise unknown_option(word, program)
        if option is None:
            words.append(word)
        elif separator or not option.valued:
            flags[name] = value
        elif name == "--info":
            flags[name] = rest.pop(0) if rest and rest[0] in INFO else "all"
        elif rest:
            flags[name] = rest.pop(0)
        else:
            raise UserError(f"{word} needs a value", remedy=f"Write {word} VALUE.")
        if option and option.instead:
            raise UserError(f"{name} has no effect here", remedy=option.instead)
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


def without_hydra(words: list[str], program: str, multirun: bool = False) -> list[str]:
    """Replace Hydra's own settings by the equivalent settings of this program.

    Args:
        multirun: whether the words start a sweep.

    Raises:
        UserError: a setting has no effect here; the message says what to type instead.
    """
    translated, trains = [], program in ("train", "plan")
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if not key.startswith(("hydra.", "hydra/")) or key == "hydra.searchpath":
            translated.append(word)
        elif key == "hydra.run.dir" and trains and not multirun:
            translated.append(f"run_dir={value}")
        elif key == "hydra.sweep.dir" and trains and multirun:
            translated.append(f"sweep.dir={value}")
        elif key == "hydra.verbose" and value.lower() in ("true", "false"):
            translated.append(f"verbose={value.lower()}")
        elif key != "hydra.output_subdir" or value.lower() != "null":
            dotted = key.replace("/", ".")
            remedy = HYDRA_SETTINGS[max(filter(dotted.startswith, HYDRA_SETTINGS), key=len)]
            if key == "hydra.run.dir":
                remedy = "This program writes nothing there."
                if multirun:
                    remedy = f"The jobs of a sweep live below {command([f'sweep.dir={value}'])}."
                elif program in ("evaluate", "export", "generate", "report"):
                    remedy = "Results go where out=PATH says."
            elif key == "hydra.sweep.dir":
                remedy = "Only launch/train.py -m starts a sweep."
                if trains:
                    run = command([f"run_dir={value}"])
                    remedy = (
                        f"It is the folder of a sweep, which -m starts; one run lives in {run}."
                    )
            raise UserError("this setting of Hydra's has no effect here", word, remedy)
    return translated
