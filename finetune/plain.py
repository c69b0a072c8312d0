"""A config as plain values, for config.yaml and exports, which are read back, and for trackers."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from finetune.config import Config


def plain_config(cfg: Config) -> dict[str, Any]:
    """Return the config as it is; task and adapter name their kinds, so that it can be read back.

    `check` has refused secrets in it: nothing here is hidden or shortened.
    """
    values = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    values["task"]["kind"] = type(cfg.task).__name__.removesuffix("Config").lower()
    values["adapter"]["kind"] = type(cfg.adapter).__name__.removesuffix("Config").lower()
    return values
