"""Compose a typed config with Hydra: defaults, config groups, a recipe, the command line."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from finetune import config as schema
from finetune.config import KINDS, Literals, all_keys, schema_keys
from finetune.errors import BESIDE, UserError, command, hydra_quoted

ROOT = BESIDE
CONF, RECIPES = ROOT / "conf", ROOT / "recipes"

DATA_SUFFIXES = (".jsonl", ".json", ".zst", ".gz", ".csv", ".tsv", ".parquet", ".txt")
PREFERENCES = ("asset:data/preference/train.jsonl", "asset:data/preference/eval.jsonl")
SHIPPED_DATA = {
    schema.ClmConfig: (
        "asset:data/pile_sample/train.jsonl.zst",
        "asset:data/pile_sample/eval.jsonl.zst",
    ),
    schema.InstructConfig: ("asset:data/instruct/train.jsonl", "asset:data/instruct/eval.jsonl"),
    schema.ClassifyConfig: ("asset:data/classify/train.jsonl", "asset:data/classify/eval.jsonl"),
    schema.PreferenceConfig: PREFERENCES,
    schema.RewardConfig: PREFERENCES,
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


class CompositionError(UserError):
    """Raised when Hydra or the schema rejects the command line; the cause is Hydra's own error.

    Args:
        problem: Hydra's message.
        overrides: all words of the command line.
        program: the program that they were typed for.
        key: a key that was added as `+key=value` although the schema has no such key.
    """

    def __init__(self, problem: str, overrides: list[str], program: str, key: str = ""):
        super().__init__(problem, key, "See --help for the keys and groups.")
        self.overrides, self.program, self.key = overrides, program, key


def register(words: Iterable[str] = (), program: str = "train", node: type = schema.Config) -> None:
    """Register the schema and the recipes in Hydra's config store; idempotent.

    Args:
        program, node: a program and the schema of its own settings.
        words: the command line. If it selects another kind of adapter or task than a recipe does,
            the recipe's settings of its own kind are dropped: `recipe=classify_lora adapter=full`
            has no use for a rank.
    """
    _register_all(program, node)
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    for path in RECIPES.glob("**/*.yaml"):
        if path.stem != typed.get("recipe"):
            continue
        recipe = OmegaConf.load(path)
        own = chosen_options(recipe)
        for group in recipe.keys() & KINDS.keys():
            kind = option_kind(group, typed.get(group))
            if kind and option_kind(group, own.get(f"override /{group}")) not in (None, kind):
                shared = {item.name for item in fields(KINDS[group][kind].__base__)}  # type: ignore[arg-type]
                recipe[group] = {
                    key: value for key, value in recipe[group].items() if key in shared
                }
        ConfigStore.instance().store(
            group="recipe", name=path.stem, node=recipe, package="_global_"
        )


@cache
def _register_all(program: str, node: type) -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=schema.Config)
    store.store(name=f"{program}_schema", node=node)
    for group, kinds in KINDS.items():
        for name, kind in kinds.items():
            store.store(group=f"schema/{group}", name=name, node=kind)
    for path in RECIPES.glob("**/*.yaml"):
        store.store(group="recipe", name=path.stem, node=OmegaConf.load(path), package="_global_")


def chosen_options(config: Any) -> dict[str, str]:
    """Map the groups in a yaml's list of defaults to their options."""
    entries = [entry for entry in config.get("defaults", []) if not isinstance(entry, str)]
    return {str(group): option for entry in entries for group, option in entry.items()}


def option_kind(group: str, option: str | None) -> str | None:
    """Return the kind of a group's option: adapter=dora is of kind lora."""
    file = CONF / group / f"{option}.yaml"
    if not option or not file.is_file():
        return None
    return chosen_options(OmegaConf.load(file)).get(f"/schema/{group}@_here_")


def compose_words(
    overrides: list[str],
    program: str = "train",
    node: type = schema.Config,
    implied: Iterable[str] = (),
) -> Composed:
    """Compose the command line of one program and convert the result to dataclasses.

    Args:
        node: the schema of the program's settings.
        implied: further words that the user did not type.

    Raises:
        CompositionError: an unknown group, option or key, or a value of the wrong type.
    """
    register(overrides, program, node)
    GlobalHydra.instance().clear()

    # `+key=value` would add a key that nothing reads.
    known = {*all_keys(node), "recipe"}
    for word in overrides:
        key = word.lstrip("+").split("=")[0]
        added = word.startswith("+") and "@" not in key and key not in known
        if added and not (CONF / key).is_dir():
            raise CompositionError("there is no such key", overrides, program, key)

    literals = Literals()
    words = [*hydra_words(overrides, node, literals), *implied]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            values = compose(config_name=program, overrides=words, return_hydra_config=True)
        choices = OmegaConf.to_container(values.hydra.runtime.choices)
        with flag_override(values, ["struct", "readonly"], [False, False]):
            del values["hydra"]
        typed = literals.back(OmegaConf.to_object(values))
    except (HydraException, OmegaConfBaseException) as error:
        raise CompositionError(str(error).split("\n")[0], overrides, program) from error
    return Composed(typed, {k: v for k, v in choices.items() if "schema" not in k}, overrides)


def compose_train(overrides: list[str]) -> schema.Config:
    """Compose the training config and settle what depends on the whole command line."""
    return settle(compose_words(overrides))


@cache
def recipe_config(name: str) -> schema.Config | None:
    """Compose a recipe as it is now; None if it does not exist or no longer composes."""
    try:
        return compose_train([f"recipe={name}"] if name != "custom" else [])
    except Exception:
        # Config groups may have changed since the run in question; its page must not fail because
        # the recipe cannot be compared.
        return None


def settle(composed: Composed) -> schema.Config:
    """Settle what needs the whole command line: run name, steps or epochs, evaluation data."""
    cfg, typed = composed.config, {word.lstrip("+").split("=")[0] for word in composed.overrides}
    train, data = cfg.train, cfg.data
    if cfg.name == "custom" and composed.choices.get("recipe"):
        cfg.name = str(composed.choices["recipe"])

    # Of steps and epochs, the one that was typed counts: a recipe's other one could end the run early.
    if "train.steps" in typed and "train.epochs" not in typed and train.steps is not None:
        train.epochs = None
    if "train.epochs" in typed and "train.steps" not in typed and train.epochs is not None:
        train.steps = None

    # A debug run has shipped data in place of none, or of a recipe's file that is not on this machine.
    if composed.choices.get("debug"):
        absent = not data.train
        if isinstance(data.train, str) and not {"data", "data.train"} & typed:
            path, asset = Path(data.train).expanduser(), data.train.startswith("asset:")
            is_file = path.suffix in DATA_SUFFIXES and not asset and not glob.has_magic(data.train)
            absent = absent or (is_file and not path.exists())
        if absent:
            data.train, held_out = SHIPPED_DATA[type(cfg.task)]
            data.eval = data.eval if "data.eval" in typed else held_out

    # Rows to hold out that were typed replace a recipe's evaluation data.
    if data.eval_rows and "data.eval_rows" in typed and "data.eval" not in typed:
        data.eval = None
    return cfg


def strip_launcher_arguments(argv: list[str]) -> list[str]:
    """Drop `--local_rank=N`, which the deepspeed launcher appends and Hydra would refuse."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


# The words of a command line: settings as people type them, as Hydra must read them, and as
# commands to paste.
#
#     prompt=3.10                typed     -> `hydra_words` -> prompt='3.10'        Hydra reads text
#     run, "runs/lr=1 (a, b)"    a value   -> `setting`     -> run='runs/lr=1 (a, b)'
#     several such words         a command -> `command`     -> quoted for the shell too
#
# Hydra's grammar reads 3.10 as a number, null as None and a comma as a sweep. Settings that the
# schema types as text are therefore read here, character by character, and passed to Hydra in
# quotes:
#
#     Text, list[Text]   free text, taken literally: quotes, null and ${...} have no special meaning
#     str, list[str]     names and paths: quotes around the whole value are removed, null unsets an
#                        Optional one, and ${key} or ${oc.env:NAME} is interpolated as in Hydra
#     Sources            a path, read as str is, or in brackets lists and dicts of paths and numbers
#
# Everything else (numbers, choices of groups, Any) is left to Hydra.
TEXT_TYPE = re.compile(r"(Optional\[)?(list\[)?(str|Text|Sources)\]*")
SETTING = re.compile(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
"""`key=value`, with Hydra's + for keys that are to be added; not `~key`, `group@package=` and flags."""


HYDRA_ESCAPE = re.compile(r"\\([\\()\[\]{}:=, \t])")
QUOTED = re.compile(r"\s*(?:'((?:\\.|[^'\\])*)'|\"((?:\\.|[^\"\\])*)\")\s*(?=,|\Z)", re.DOTALL)
"""A quoted item of a list, up to the comma behind it."""
NESTED = re.compile(r"\s*(\[.*\]\s*|\{.*|\[\s*\{.*)", re.DOTALL)
"""A list or dict of sources, also one whose brackets do not come out even; `[ab]*.jsonl` is a pattern."""
REFERENCE = re.compile(r"\$\{([\w.]+)(:|\})")


@dataclass(frozen=True)
class Reading:
    """Rules for reading the text of one setting."""

    prose: bool
    """Typed as Text: nothing in it has a meaning."""
    many: bool
    """A list of texts."""
    optional: bool
    """null unsets it."""
    nested: bool = False
    """Typed as Sources: a value in brackets is a list or a dict."""


@cache
def text_settings(node: type) -> dict[str, Reading]:
    """Map the dotted key of every text setting in a program's schema to its reading rules."""
    return {
        key: Reading(
            matched[3] == "Text",
            bool(matched[2]),
            bool(matched[1]) or matched[3] == "Sources",
            matched[3] == "Sources",
        )
        for key, _, item in schema_keys(node)
        if (matched := TEXT_TYPE.fullmatch(str(item.type)))
    }


def hydra_words(words: list[str], node: type, literals: Literals) -> list[str]:
    """Quote text settings so that Hydra reads exactly what was typed; leave other words unchanged.

    Args:
        node: the schema of the program that they are for.
        literals: keeps the texts that OmegaConf would change; apply it to the composed config to
            restore them.

    Raises:
        UserError: a list of texts without brackets, or one that cannot be read.
    """
    readings, keys, read = text_settings(node), set(all_keys(node)), []
    for word in words:
        setting_ = SETTING.fullmatch(word)
        if setting_ is None or setting_[2] not in readings:
            read.append(word)
            continue
        sign, key, value = setting_.groups()
        if readings[key].nested and NESTED.fullmatch(value):
            read.append(f"{sign}{key}={_nested_for_hydra(_read_nested(key, value))}")
            continue
        text = read_text(key, value, readings[key])
        if text is None:
            shown = "null"
        elif isinstance(text, list):
            shown = (
                f"[{','.join(_for_hydra(item, readings[key], keys, literals) for item in text)}]"
            )
        else:
            shown = _for_hydra(text, readings[key], keys, literals)
        read.append(f"{sign}{key}={shown}")
    return read


def _for_hydra(text: str, reading: Reading, keys: set[str], literals: Literals) -> str:
    """Quote one text; in names and paths, `${...}` that refers to something stays unquoted."""
    refers = not reading.prose and (
        "\\${" in text
        or any(
            key in keys if end == "}" else key == "now" or OmegaConf.has_resolver(key)
            for key, end in REFERENCE.findall(text)
        )
    )
    return hydra_quoted(text if refers else literals.aside(text))


def _read_nested(key: str, value: str) -> Any:
    """Parse a list or dict in Hydra's grammar, or else as yaml, which takes paths with any characters.

    Raises:
        UserError: it is neither.
    """
    try:
        return OverridesParser.create().parse_override(f"{key}={value}").value()
    except HydraException:
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = str(error).replace("\n", " ")
            raise UserError(
                f"the brackets of {value} do not come out even, or it is no list or dict "
                f"({reason})",
                key,
                f"Try {key}='[{{path: a.jsonl, weight: 2}}, {{path: b.jsonl, weight: 1}}]'",
            ) from None


def _nested_for_hydra(value: Any) -> str:
    """Write a parsed list or dict in Hydra's grammar, with every text in quotes."""
    if isinstance(value, dict):
        keys = [re.sub(r"([^\w.-])", r"\\\1", str(key)) for key in value]
        items = map(_nested_for_hydra, value.values())
        return f"{{{','.join(map(':'.join, zip(keys, items, strict=True)))}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_nested_for_hydra, value))}]"
    return hydra_quoted(value) if isinstance(value, str) else json.dumps(value)


def read_text(key: str, value: str, reading: Reading) -> str | list[str] | None:
    """Parse the value of `key=` into a text or a list of texts.

    Raises:
        UserError: several texts without brackets, or an empty item in a list.
    """
    if reading.optional and value.lower() == "null" and (reading.many or not reading.prose):
        return None
    if reading.many:
        return _read_list(key, value, reading)
    if reading.prose:
        return value
    return unquoted(value)


def _read_list(key: str, value: str, reading: Reading) -> list[str]:
    inner = value.strip()
    if inner.startswith("[") and inner.endswith("]"):
        return list(_items(key, inner[1:-1]))
    if reading.prose:
        return [value] if value else []
    parts = split_values(value)
    if len(parts) > 1:
        both = command([f"{key}=[{value}]"]), command([f"{key}=[{_json_quoted(value)}]"])
        raise UserError(
            "several texts are a list, which is written in brackets",
            key,
            f"Write {both[0]}; for one text with a comma in it {both[1]}",
        )
    return [unquoted(value)] if value else []


def _items(key: str, inner: str) -> Iterator[str]:
    """Yield the items of a bracketed list; double-quoted ones are JSON, so "\\n" is a newline."""
    start = 0
    while inner[start:].strip():
        quoted = QUOTED.match(inner, start)
        if quoted:
            yield _unescaped(quoted[1], "'") if quoted[1] is not None else _json_text(quoted[2])
            end = quoted.end()
        else:
            end = inner.find(",", start) if "," in inner[start:] else len(inner)
            item = inner[start:end].strip()
            if not item:
                raise UserError(
                    "an item of the list is empty",
                    key,
                    'Leave it out, or write "" for an empty text.',
                )
            yield item
        start = end + 1


def split_values(value: str) -> list[str]:
    """Split a sweep's values at the commas that are in neither quotes nor brackets."""
    parts, depth, start, at = list[str](), 0, 0, 0
    while at < len(value):
        quoted = QUOTED.match(value, at) if at == start else None
        if quoted:
            at = quoted.end()
            continue
        if value[at] == "," and depth <= 0:
            parts.append(value[start:at].strip())
            start = at + 1
        depth += (value[at] in "([{") - (value[at] in ")]}")
        at += 1
    return [*parts, value[start:].strip()] if parts else [value]


def unquoted(value: str) -> str:
    """Strip Hydra's quotes around a whole name or path, or else its escapes."""
    quoted = QUOTED.fullmatch(value)
    if quoted and value == value.strip():
        return _unescaped(quoted[1], "'") if quoted[1] is not None else _unescaped(quoted[2], '"')
    return HYDRA_ESCAPE.sub(r"\1", value)


def _unescaped(text: str, quote: str) -> str:
    """Undo Hydra's escapes: a backslash escapes a quote, or a backslash before a quote."""
    return re.sub(rf"(\\+)({quote}|\Z)", lambda found: "\\" * (len(found[1]) // 2) + found[2], text)


def _json_text(text: str) -> str:
    try:
        return json.loads(f'"{text}"', strict=False)
    except ValueError:
        return _unescaped(text, '"')


def _json_quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
