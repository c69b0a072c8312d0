"""A config as plain values, for config.yaml, trackers and exports."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from finetune.config import Config
from finetune.redact import redact


def plain_config(cfg: Config) -> dict[str, Any]:
    """The config without secrets; task and adapter name their kinds, so that the file can be read back."""
    values = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    values["task"]["kind"] = type(cfg.task).__name__.removesuffix("Config").lower()
    values["adapter"]["kind"] = type(cfg.adapter).__name__.removesuffix("Config").lower()
    return redact(values)
