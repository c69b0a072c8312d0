"""Hydra's and OmegaConf's errors in the words of a person who mistyped: what is wrong, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from finetune import config as schema
from finetune import programs
from finetune.errors import UserError
from finetune.helptext import field_docs
from finetune.other_names import ABSENT, HINTS, OTHERS
from finetune.programs import KINDS, all_keys, field_classes
from finetune.words import command, hydra_quoted


def user_error(error: Exception, overrides: list[str], name: str, conf: Path) -> UserError:
    """What composing `overrides` for program `name` failed at.

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
    text = str(error).split("\nTo append")[0].split("\nSet the environment")[0].split("\nSee https")[0]
    for word in overrides:
        key = word.lstrip("+~").split("=")[0]
        if "Could not override" in text and f"'{key}'" in text:
            return unknown_key(key, name, conf)
        if "=" not in word:
            return _no_value(word, name, conf)
    if found := re.match(r"Ambiguous value for argument '([^=]*)=", text):
        key, again = found[1], command([f"python launch/{name}.py", "-m", *overrides]).replace("'", "", 2)
        sweep = f"\n  Each value in a run of its own: {again}" if name == "train" else ""
        return UserError("several values, where one is needed", key, f"Give one value.{sweep}")
    for word in overrides:
        if not _parses(word):
            key, _, value = word.partition("=")
            return UserError("this value cannot be read", word,
                             f"Quote it twice, for the shell and for Hydra: {command([f'{key}={hydra_quoted(value)}'])}")
    return UserError(text, remedy="See --help for the keys and groups.")


def unknown_option(word: str, name: str, conf: Path) -> UserError:
    """`--learning_rate`: the error for a word that only looks like an option."""
    key = word.lstrip("-").split("=")[0]
    near = nearest_keys(key, name, conf)
    remedy = f"Did you mean {near[0]}=...?  " if near else ""
    return UserError(f"unknown option {word}", remedy=f"{remedy}Settings are written key=value; see --help.")


def unknown_key(key: str, name: str, conf: Path, text: str = "") -> UserError:
    leaf = key.rpartition(".")[2]
    if name in ("train", "plan") and leaf in ABSENT:
        return UserError(text or "there is no such key", key, ABSENT[leaf])
    near = nearest_keys(key, name, conf)
    hint = f"  ({HINTS[leaf]})" if leaf in HINTS and near and near[0] == OTHERS.get(leaf) else ""
    remedy = f"Did you mean {' or '.join(near)}?{hint}" if near else "See --help for the keys."
    return UserError(text or "there is no such key", key, _of_another_kind(key, conf) or remedy)


def nearest_keys(key: str, name: str, conf: Path) -> list[str]:
    """At most three keys or groups that `key` may stand for, the likeliest first."""
    keys = sorted(set(all_keys(programs.SCHEMAS.get(name, schema.Config)))) + _groups(name, conf)
    leaf = key.rpartition(".")[2]
    if name in ("train", "plan") and leaf in OTHERS and OTHERS[leaf] != key:
        return [OTHERS[leaf]]
    scored = [(max(_alike(key, known), 0.95 * _alike(leaf, known.rpartition(".")[2])), known) for known in keys]
    best = max(scored)[0]
    return [known for score, known in sorted(scored, key=lambda s: -s[0])[:3] if score > 0.7 and score > best - 0.1]


def _unknown_option(error: MissingConfigException, conf: Path) -> UserError:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = [o for o in (error.options or []) if not o.endswith("schema")]
    options = options or [path.stem for path in (conf / group).glob("*.yaml")]
    remedy = f"Known: {', '.join(sorted(options))}."
    near = difflib.get_close_matches(option, options, 1, 0.5)
    return UserError(f"there is no {group or 'config'} named '{option}'", f"{group}={option}",
                     f"Did you mean {group}={near[0]}?  {remedy}" if near else remedy)


def _key_error(key: str, error: BaseException, name: str, conf: Path) -> UserError:
    text = str(error).split("\n")[0]
    if "not in" in text and ("Key '" in text or "key '" in text):
        return unknown_key(key, name, conf, text)
    doc = _doc_of(key)
    return UserError(text, key, f"{key}: {doc}" if doc else "See --help for the keys and their types.")


def _no_value(word: str, name: str, conf: Path) -> UserError:
    for group in _groups(name, conf):
        folder = conf / group if group != "recipe" else conf.parent / "recipes"
        if (folder / f"{word}.yaml").is_file():
            return UserError("a setting needs a key", word, f"Write {group}={word}.")
    near = nearest_keys(word, name, conf)
    return UserError("a setting needs a value", word, f"Write {near[0] if near else 'key'}=VALUE; see --help.")


def _of_another_kind(key: str, conf: Path) -> str:
    """Which options of the group have this key, e.g. adapter=lora has adapter.rank; "" when none has."""
    group, _, leaf = key.partition(".")
    kinds = [kind for kind, node in KINDS.get(group, {}).items() if leaf in {f.name for f in fields(node)}]
    options = [path.stem for path in sorted((conf / group).glob("*.yaml")) if kind_of(path) in kinds]
    # The plain kind before its variants: lora before dora.
    named = [f"{group}={option}" for option in sorted(options, key=lambda option: option not in kinds)]
    return f"{' and '.join(named)} {'has' if len(named) == 1 else 'have'} this key." if named else ""


def kind_of(path: Path) -> str:
    """The schema's kind that an option builds on."""
    found = re.search(r"/schema/\w+@_here_: (\w+)", path.read_text(encoding="utf-8"))
    return found[1] if found else path.stem


def _doc_of(key: str) -> str:
    section, _, leaf = key.rpartition(".")
    nodes: list[type] = [schema.Config]
    for part in section.split(".") if section else []:
        found = [f for node in nodes for f in fields(node) if f.name == part]
        nodes = [kind for f in found for kind in field_classes(f.name, f.type)]
    return next((docs[leaf] for node in nodes if leaf in (docs := field_docs(node))), "")


def _groups(name: str, conf: Path) -> list[str]:
    """Config groups as words: recipe, adapter, ..."""
    return ["recipe", *sorted(p.name for p in conf.iterdir() if p.is_dir())] if name in ("train", "plan") else []


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
