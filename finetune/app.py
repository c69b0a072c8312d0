"""Command line to typed config: every launch script goes through `main`.

argv -> drop the launcher's --local_rank -> Hydra's compose -> dataclasses -> `run(config)` -> exit code.
Hydra's own main is used only for what it prints (`--cfg`, `--info`, shell completion): its error handling exits
with 1 where a wrong config must exit with 2, and its output directories differ between ranks.
Does not know what the programs do.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from finetune import config as schema
from finetune import programs
from finetune.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, UserError
from finetune.helptext import help_text

ROOT = Path(__file__).resolve().parents[1]
CONF, RECIPES = ROOT / "conf", ROOT / "recipes"
T = TypeVar("T")

SCHEMAS = {
    "task": {
        "clm": schema.ClmConfig,
        "instruct": schema.InstructConfig,
        "classify": schema.ClassifyConfig,
        "qa": schema.QaConfig,
    },
    "adapter": {
        "full": schema.FullConfig,
        "lora": schema.LoraConfig,
        "ia3": schema.Ia3Config,
        "prompt": schema.PromptConfig,
        "prefix": schema.PrefixConfig,
    },
}

ALIASES = {"evaluate": {"model": "export_dir"}, "generate": {"model": "export_dir"}}
"""program -> key as users type it -> key in the schema: `model` alone would name the group of base models."""

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
        words: the command line. Where it picks another kind of adapter or task than a recipe, the recipe's numbers for
            its own kind fall away: `recipe=classify_lora adapter=full` has no use for a rank.
    """
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema.Config)
    for name, node in programs.SCHEMAS.items():
        store.store(name=f"{name}_schema", node=node)
    for group, kinds in SCHEMAS.items():
        for name, node in kinds.items():
            store.store(group=f"schema/{group}", name=name, node=node)
    for path in sorted(RECIPES.glob("**/*.yaml")):
        store.store(group="recipe", name=path.stem, node=_fitting(OmegaConf.load(path), typed), package="_global_")


def _fitting(recipe: Any, typed: dict[str, str]) -> Any:
    """The recipe without the keys that the typed kinds do not share with its own."""
    own = {key.removeprefix("override /"): value for entry in recipe.get("defaults", []) for key, value in entry.items()}
    for group in SCHEMAS:
        kind, recipe_kind = _kind(group, typed.get(group)), _kind(group, own.get(group))
        if kind and recipe_kind and kind != recipe_kind and group in recipe:
            shared = {f.name for f in fields(SCHEMAS[group][kind].__base__)}  # type: ignore[arg-type]
            recipe[group] = {key: value for key, value in recipe[group].items() if key in shared}
    return recipe


def _kind(group: str, option: str | None) -> str | None:
    """The schema of a group's option: adapter=dora is of kind lora."""
    file = CONF / group / f"{option}.yaml"
    if not option or not file.is_file():
        return None
    key = f"/schema/{group}@_here_"
    return next((entry[key] for entry in OmegaConf.load(file).defaults if not isinstance(entry, str) and key in entry), None)


def compose_config(overrides: list[str], name: str = "train") -> Composed:
    """Compose and convert to dataclasses.

    Raises:
        UserError: an unknown group, option or key, or a value of the wrong type; the nearest name is suggested.
    """
    register(overrides)
    GlobalHydra.instance().clear()
    overrides = _schema_words(overrides, name)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            node = compose(config_name=name, overrides=overrides, return_hydra_config=True)
        choices = OmegaConf.to_container(node.hydra.runtime.choices)
        with flag_override(node, ["struct", "readonly"], [False, False]):
            del node["hydra"]
        typed = OmegaConf.to_object(node)
    except (HydraException, OmegaConfBaseException) as error:
        raise _as_user_error(error, overrides, name) from None
    return Composed(typed, {k: v for k, v in choices.items() if "schema" not in k}, overrides)


def _schema_words(words: list[str], name: str) -> list[str]:
    """The command line's words with the schema's keys."""
    renamed = ALIASES.get(name, {})
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
    if composed.choices.get("debug") and not cfg.data.train:
        cfg.data.train, cfg.data.eval = SHIPPED_DATA[type(cfg.task)]
    return cfg


def _settle_length(train: schema.TrainConfig, overrides: list[str]) -> None:
    """Of steps and epochs the one typed by the user counts: a recipe's other one must not cut it short."""
    typed = {word.lstrip("+").split("=")[0] for word in overrides}
    if "train.steps" in typed and "train.epochs" not in typed and train.steps is not None:
        train.epochs = None
    if "train.epochs" in typed and "train.steps" not in typed and train.epochs is not None:
        train.steps = None


def _as_user_error(error: Exception, overrides: list[str], name: str) -> UserError:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error)
    chain: Exception | None = error
    while chain is not None:
        key = getattr(chain, "full_key", None)
        if isinstance(chain, OmegaConfBaseException) and key:
            return _key_error(str(key), chain, name)
        chain = chain.__cause__ or chain.__context__  # type: ignore[assignment]
    text = str(error)
    text = text.split("\nTo append")[0].split("\nSet the environment")[0]
    for word in overrides:
        group = word.lstrip("+~").split("=")[0]
        if "Could not override" in text and f"'{group}'" in text:
            return _unknown_key(group, name)
    return UserError(text, remedy="See --help for the keys and groups.")


def _unknown_option(error: MissingConfigException) -> UserError:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = [o for o in (error.options or []) if not o.endswith("schema")]
    remedy = f"Known: {', '.join(sorted(options))}."
    near = difflib.get_close_matches(option, options, 1, 0.5)
    return UserError(f"there is no {group or 'config'} named '{option}'", f"{group}={option}",
                     f"Did you mean {group}={near[0]}?  {remedy}" if near else remedy)


def _key_error(key: str, error: Exception, name: str) -> UserError:
    if "not in" in str(error) and ("Key '" in str(error) or "key '" in str(error)):
        return _unknown_key(key, name, str(error).split("\n")[0])
    return UserError(str(error).split("\n")[0], key, "See --help for the keys and their types.")


def _unknown_key(key: str, name: str, text: str = "") -> UserError:
    keys = sorted(set(_all_keys(programs.SCHEMAS.get(name, schema.Config))) - {key})
    near = difflib.get_close_matches(key, keys, 3, 0.6)
    if not near:
        leaf = key.rpartition(".")[2]
        near = [k for k in keys if difflib.SequenceMatcher(None, leaf, k.rpartition(".")[2]).ratio() > 0.75][:3]
    remedy = f"Did you mean {' or '.join(near)}?" if near else "See --help for the keys."
    return UserError(text or "there is no such key", key, remedy)


def _all_keys(node: type, prefix: str = "") -> Iterable[str]:
    for f in fields(node):
        kind = _field_class(f.name, f.type)
        for k in kind:
            yield from _all_keys(k, f"{prefix}{f.name}.")
        if not kind:
            yield prefix + f.name


def _field_class(name: str, annotation: Any) -> list[type]:
    if name in SCHEMAS and "Config" in str(annotation):
        return list(SCHEMAS[name].values())
    kind = getattr(schema, str(annotation), None) or getattr(programs, str(annotation), None)
    return [kind] if kind is not None and is_dataclass(kind) else []


def strip_launcher_arguments(argv: list[str]) -> list[str]:
    """Drop `--local_rank=N`, which the deepspeed launcher appends and Hydra would refuse."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


def main(run: Callable[[Composed], int | None], name: str, argv: list[str] | None = None) -> int:
    """Run one program; returns its exit code. Prints a UserError without a traceback.

    Args:
        run: the program; gets what was composed, returns an exit code or None for 0.
        name: primary config, e.g. "train".
    """
    argv = strip_launcher_arguments(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(name, CONF, RECIPES))
        return EXIT_DONE
    if any(word.startswith(("--cfg", "-c", "--info", "--hydra-help", "-sc", "--shell-completion")) for word in argv):
        return _hydra_prints(name, argv)
    try:
        words = [word for word in argv if word not in ("-m", "--multirun")]
        unknown = [word for word in words if word.startswith("-")]
        if unknown:
            raise UserError(f"unknown option {unknown[0]}", remedy="Settings are written key=value; see --help.")
        return run(compose_config(words, name)) or EXIT_DONE
    except UserError as error:
        report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def report_error(error: UserError) -> None:
    """Print on rank 0; other ranks wait so that the launcher does not kill rank 0 before it has spoken."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
        return
    sys.stdout.flush()
    print(f"error: {error.render()}", file=sys.stderr, flush=True)


def _hydra_prints(name: str, argv: list[str]) -> int:
    import hydra

    register(argv)
    GlobalHydra.instance().clear()
    sys.argv = [sys.argv[0], *_schema_words(argv, name)]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(lambda cfg: None)()
    except SystemExit as error:
        return EXIT_USAGE if error.code else EXIT_DONE
    return EXIT_DONE
