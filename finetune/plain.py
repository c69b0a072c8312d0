"""A config as plain values, for config.yaml, exports and trackers, and back again: every text as it is.

OmegaConf reads `${...}` in a text as a reference and `???` as a missing value. A prompt or a label may hold either.
"""

from __future__ import annotations

import re
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from finetune.config import Config


class Literals:
    """Texts that OmegaConf would read as something else, kept aside while it composes."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def aside(self, value: Any) -> Any:
        """`value` with a stand-in for every such text; dicts and lists are copied."""
        if isinstance(value, dict):
            return {key: self.aside(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.aside(item) for item in value]
        if not isinstance(value, str) or ("${" not in value and value != "???"):
            return value
        self._texts.append(value)
        return f"\ufdd0{len(self._texts) - 1}\ufdd0"

    def back(self, value: Any) -> Any:
        """The composed value with its texts again; dataclasses are filled in place."""
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
    """Return the config as it is; task and adapter name their kinds, so that it can be read back.

    `check` has refused secrets in it: nothing here is hidden or shortened.
    """
    values = plain_values(cfg)
    values["task"]["kind"] = type(cfg.task).__name__.removesuffix("Config").lower()
    values["adapter"]["kind"] = type(cfg.adapter).__name__.removesuffix("Config").lower()
    return values


def plain_values(cfg: Any) -> dict[str, Any]:
    """Any of the schema's dataclasses as dicts, lists, numbers and texts."""
    return _without_enums(asdict(cfg))


def typed(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass of the schema from plain values; keys that the schema no longer has are left out."""
    known, literals = {f.name for f in fields(kind)}, Literals()
    kept = literals.aside({key: value for key, value in values.items() if key in known})
    return literals.back(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), kept)))


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as yaml that OmegaConf and `read_yaml` read alike."""
    return yaml.dump(values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def read_yaml(file: Path) -> Any:
    """The values of a yaml file, `${...}` in texts left as it stands.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.safe_load(file.read_text(encoding="utf-8"))


class _Dumper(yaml.SafeDumper):
    """Quotes also texts that only OmegaConf, not yaml itself, takes for a number: 1e-3."""


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
