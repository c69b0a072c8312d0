"""Command line to typed config: every launch script goes through `main`.

argv -> drop the launcher's --local_rank -> texts in quotes (`words`) -> Hydra's compose -> dataclasses -> `run(config)`
-> exit code. Hydra's own main is used only for what it prints (`--info`, `--cfg hydra`): its error handling exits with 1
where a wrong config must exit with 2, and its output directories differ between ranks. Does not know what the programs do.
"""

from __future__ import annotations

import glob
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from finetune import config as schema
from finetune import programs
from finetune.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, UserError, problems_error
from finetune.helptext import help_text
from finetune.openmp import spin_briefly
from finetune.other_names import split_flags, without_hydra
from finetune.plain import Literals, plain_values, to_yaml
from finetune.programs import KINDS, all_keys
from finetune.redact import redact, redact_text
from finetune.suggest import unknown_key, unknown_option, user_error
from finetune.words import hydra_words, refuse_file_list, report_words, trained_task

ROOT = Path(__file__).resolve().parents[1]
CONF, RECIPES = ROOT / "conf", ROOT / "recipes"
T = TypeVar("T")

ALIASES = {"evaluate": {"model": "export_dir"}, "generate": {"model": "export_dir"}, "serve": {"model": "export_dir"},
           "export": {"export.push_to_hub": "push_to_hub", "export.hub_private": "hub_private",
                      "export.hub_base": "hub_base"}}
"""program -> key as users type it -> key in the schema: `model` alone would name the group of base models."""

PRINTS = {"-h", "--help", "-c", "--cfg", "-i", "--info", "--version", "--hydra-help", "-sc", "--shell-completion"}
"""Options that print something in place of running."""
MOST_PROBLEMS = 8
"""Wrong words of one command line that are told."""
DATA_SUFFIXES = (".jsonl", ".json", ".zst", ".gz", ".csv", ".tsv", ".parquet", ".txt")
SHIPPED_DATA = {
    schema.ClmConfig: ("asset:data/pile_sample/train.jsonl.zst", "asset:data/pile_sample/eval.jsonl.zst"),
    schema.InstructConfig: ("asset:data/instruct/train.jsonl", "asset:data/instruct/eval.jsonl"),
    schema.ClassifyConfig: ("asset:data/classify/train.jsonl", "asset:data/classify/eval.jsonl"),
    schema.QaConfig: ("asset:data/qa/train.json", "asset:data/qa/eval.json"),
}
"""task -> training and evaluation data that ship with the project, for debug runs."""


@dataclass
class Composed:
    config: Any
    """The typed config."""
    choices: dict[str, Any]
    """Group -> chosen option."""
    overrides: list[str]
    """The command line's k=v words."""


def register(words: Iterable[str] = ()) -> None:
    """Put the schema and the recipes into Hydra's store; idempotent.

    Args:
        words: the command line. Where it picks another kind of adapter or task than a recipe, the recipe's numbers
            for its own kind fall away: `recipe=classify_lora adapter=full` has no use for a rank.
    """
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    _register_schemas()
    for path in sorted(RECIPES.glob("**/*.yaml")):
        recipe = _fitting(deepcopy(_recipe(path)), typed)
        ConfigStore.instance().store(group="recipe", name=path.stem, node=recipe, package="_global_")


@cache
def _register_schemas() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=schema.Config)
    for name, node in programs.SCHEMAS.items():
        store.store(name=f"{name}_schema", node=node)
    for group, kinds in KINDS.items():
        for name, node in kinds.items():
            store.store(group=f"schema/{group}", name=name, node=node)


@cache
def _recipe(path: Path) -> Any:
    return OmegaConf.load(path)


def _fitting(recipe: Any, typed: dict[str, str]) -> Any:
    """The recipe without the keys that the typed kinds do not share with its own."""
    entries = recipe.get("defaults", [])
    own = {key.removeprefix("override /"): value for entry in entries for key, value in entry.items()}
    for group in KINDS:
        kind, recipe_kind = _kind(group, typed.get(group)), _kind(group, own.get(group))
        if kind and recipe_kind and kind != recipe_kind and group in recipe:
            shared = {f.name for f in fields(KINDS[group][kind].__base__)}  # type: ignore[arg-type]
            recipe[group] = {key: value for key, value in recipe[group].items() if key in shared}
    return recipe


def _kind(group: str, option: str | None) -> str | None:
    """The schema of a group's option: adapter=dora is of kind lora."""
    file = CONF / group / f"{option}.yaml"
    if not option or not file.is_file():
        return None
    key = f"/schema/{group}@_here_"
    entries = [entry for entry in OmegaConf.load(file).defaults if not isinstance(entry, str)]
    return next((entry[key] for entry in entries if key in entry), None)


def compose_config(overrides: list[str], name: str = "train") -> Composed:
    """Compose and convert to dataclasses.

    Raises:
        UserError: an unknown group, option or key, or a value of the wrong type; the nearest name is suggested.
    """
    overrides = _schema_words(without_hydra(overrides, name), name)
    try:
        return _compose(overrides, name)
    except UserError as error:
        raise _with_others(error, overrides, name) from None


def _compose(overrides: list[str], name: str) -> Composed:
    register(overrides)
    GlobalHydra.instance().clear()
    _refuse_additions(overrides, name)
    literals = Literals()
    words = hydra_words(overrides, name, literals)
    words += trained_task(overrides) if name == "evaluate" else []
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            node = compose(config_name=name, overrides=words, return_hydra_config=True)
        choices = OmegaConf.to_container(node.hydra.runtime.choices)
        with flag_override(node, ["struct", "readonly"], [False, False]):
            del node["hydra"]
        typed = literals.back(OmegaConf.to_object(node))
    except (HydraException, OmegaConfBaseException) as error:
        raise user_error(error, overrides, name, CONF) from None
    return Composed(typed, {k: v for k, v in choices.items() if "schema" not in k}, overrides)


def _with_others(error: UserError, overrides: list[str], name: str) -> UserError:
    """Hydra stops at the first word that is wrong: the others are found by composing without it, and told at once."""
    problems, words = [error], list(overrides)
    while len(problems) < MOST_PROBLEMS:
        where = problems[-1].where
        wrong = next((word for word in words if where in (word, word.lstrip("+~").split("=")[0])), None)
        if wrong is None:
            break
        words.remove(wrong)
        try:
            _compose(words, name)
            break
        except UserError as another:
            problems.append(another)
    return error if len(problems) == 1 else problems_error("the command line", problems)


def _schema_words(words: list[str], name: str) -> list[str]:
    """The command line's words with the schema's keys."""
    if name == "report":
        return report_words(words)
    renamed = ALIASES.get(name, {})
    if name == "evaluate":  # lm-eval's users write tasks=a,b
        words = [f"tasks=[{word[6:]}]" if word.startswith("tasks=") and "[" not in word else word for word in words]
    return [f"{renamed[word.split('=')[0]]}={word.partition('=')[2]}" if word.split("=")[0] in renamed else word
            for word in words]


def compose_train(overrides: list[str]) -> schema.Config:
    """The training config, composed and settled."""
    return settle(compose_config(overrides, "train"))


def settle(composed: Composed) -> schema.Config:
    """What only the whole command line can tell: the run's name, steps against epochs, a debug run's data."""
    cfg = composed.config
    if cfg.name == "custom" and composed.choices.get("recipe"):
        cfg.name = str(composed.choices["recipe"])
    _settle_length(cfg.train, composed.overrides)
    for key in ("train", "eval"):
        refuse_file_list(f"data.{key}", getattr(cfg.data, key))
    if composed.choices.get("debug") and not _has_own_data(cfg, composed.overrides):
        train, held_out = SHIPPED_DATA[type(cfg.task)]
        cfg.data.train = train
        if not any(word.split("=")[0] == "data.eval" for word in composed.overrides):
            cfg.data.eval = held_out
    return cfg


def _has_own_data(cfg: schema.Config, overrides: list[str]) -> bool:
    """Whether there are training data: typed by the user, or those of the recipe where they are at hand."""
    typed = any(word.lstrip("+").split("=")[0] in ("data", "data.train") for word in overrides)
    if typed or not cfg.data.train:
        return bool(cfg.data.train)
    path = Path(cfg.data.train).expanduser()
    is_file = path.suffix in DATA_SUFFIXES and not glob.has_magic(cfg.data.train) and not cfg.data.train.startswith("asset:")
    return path.exists() or not is_file


def _settle_length(train: schema.TrainConfig, overrides: list[str]) -> None:
    """Of steps and epochs the one typed by the user counts: a recipe's other one must not cut it short."""
    typed = {word.lstrip("+").split("=")[0] for word in overrides}
    if "train.steps" in typed and "train.epochs" not in typed and train.steps is not None:
        train.epochs = None
    if "train.epochs" in typed and "train.steps" not in typed and train.epochs is not None:
        train.steps = None


def _refuse_additions(overrides: list[str], name: str) -> None:
    """`+key=value` would add a key that nothing reads; and secrets are never settings."""
    known = {*all_keys(programs.SCHEMAS.get(name, schema.Config)), "recipe"}
    for word in overrides:
        key = word.lstrip("+").split("=")[0]
        if word.startswith("+") and "@" not in key and key not in known and not (CONF / key).is_dir():
            raise unknown_key(key, name, CONF)


def strip_launcher_arguments(argv: list[str]) -> list[str]:
    """Drop `--local_rank=N`, which the deepspeed launcher appends and Hydra would refuse."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


Program = Callable[[Composed], int | None]


def main(run: Program | str, name: str, argv: list[str] | None = None) -> int:
    """Run one program; returns its exit code. Prints a UserError without a traceback.

    Args:
        run: the program; gets what was composed, returns an exit code or None for 0. As text: the module whose `run`
            it is, imported once the command line is known to be right.
        name: primary config, e.g. "train".
    """
    argv = strip_launcher_arguments(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in argv):
        return _print_help(name, [word for word in argv if not word.startswith("-") and "=" not in word])
    try:
        spin_briefly()
        words, flags = split_flags(argv)
        unknown = [word for word in words if word.startswith("-")]
        if unknown:
            raise unknown_option(unknown[0], name, CONF)
        if "--multirun" in flags:
            raise UserError("a sweep is started by launch/train.py alone, and prints no config", "-m",
                            "Leave -m out, and give every setting one value.")
        if PRINTS & set(flags):
            return _print(name, words, flags)
        composed = compose_config(words, name)
        return _program(run)(composed) or EXIT_DONE
    except UserError as error:
        report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def _program(run: Program | str) -> Program:
    return importlib.import_module(run).run if isinstance(run, str) else run


def _print_help(name: str, topics: list[str]) -> int:
    """On rank 0 alone; exit code 2 for a topic that does not exist."""
    if os.environ.get("RANK", "0") != "0":
        return EXIT_DONE
    try:
        print(help_text(name, CONF, RECIPES, topics))
    except UserError as error:
        report_error(error)
        return error.exit_code
    return EXIT_DONE


def report_error(error: UserError) -> None:
    """Print on rank 0; other ranks wait so that the launcher does not kill rank 0 before it has spoken."""
    if error.spoken:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
        return
    sys.stdout.flush()
    print(f"error: {redact_text(error.render())}", file=sys.stderr, flush=True)


def _print(name: str, words: list[str], flags: dict[str, str]) -> int:
    """What `--cfg`, `--info` and their like ask for; on rank 0 alone.

    Raises:
        UserError: the settings do not compose.
    """
    import hydra

    import finetune

    if os.environ.get("RANK", "0") != "0":
        return EXIT_DONE
    if "--version" in flags:
        print(f"finetune-gptj {finetune.__version__}, hydra-core {hydra.__version__}")
        return EXIT_DONE
    composed = compose_config(words, name)
    if flags.get("--cfg") == "job":
        # Settled as a run would find it: the recipe's name, one of steps and epochs, a debug run's data.
        values: Any = redact(plain_values(settle(composed) if name in ("train", "plan") else composed.config))
        for part in filter(None, flags.get("--package", "").removeprefix("_global_").split(".")):
            if not isinstance(values, dict) or part not in values:
                raise UserError("there is no such section", f"--package {flags['--package']}", "See --cfg job.")
            values = values[part]
        print(to_yaml(values), end="")
        return EXIT_DONE
    register(words)
    GlobalHydra.instance().clear()
    asked = [f"{flag}={value}" if value else flag for flag, value in flags.items() if flag not in ("--config-dir", "--run")]
    sys.argv = [sys.argv[0], *asked, *hydra_words(composed.overrides, name, Literals())]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(lambda cfg: None)()
    except SystemExit as error:
        return EXIT_USAGE if error.code else EXIT_DONE
    return EXIT_DONE
