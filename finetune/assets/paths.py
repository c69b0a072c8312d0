"""Paths of the files that ship with the project: `finetune/assets/NAME`.

`resolve` turns `asset:NAME/...` in a config key into an absolute path, so that recipes work from
any directory. Nothing is read or downloaded.
"""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError

PREFIX = "asset:"
ASSETS = Path(__file__).resolve().parent


def asset(name: str) -> Path:
    """Return the directory of one asset.

    Raises:
        UserError: there is no such asset; the message lists the existing ones.
    """
    existing = _existing()
    if name not in existing:
        names = ", ".join(existing) or "none in this installation"
        raise UserError(
            f"there is no asset '{name}'",
            PREFIX + name,
            f"Assets that ship with the project: {names}.",
        )
    return ASSETS / name


def resolve(spec: str) -> str:
    """Return `asset:NAME/...` as an absolute path, and any other text unchanged."""
    if not spec.startswith(PREFIX):
        return spec
    name, _, rest = spec[len(PREFIX) :].partition("/")
    return str(asset(name) / rest) if rest else str(asset(name))


def _existing() -> list[str]:
    if not ASSETS.is_dir():
        return []
    return sorted(
        path.name
        for path in ASSETS.iterdir()
        if path.is_dir() and not path.name.startswith((".", "_"))
    )
