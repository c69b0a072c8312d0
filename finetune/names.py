"""GPT-J's module names as users may type them. No torch."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError

MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")


def target_modules(targets: Any) -> list[str]:
    """`all-linear`, "q_proj,v_proj" or a list -> module names; a head is never among them.

    Raises:
        UserError: a name that GPT-J does not have.
    """
    names = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else [str(t) for t in targets]
    if names == ["all-linear"]:
        return list(MODULES)
    unknown = [name for name in names if name not in MODULES]
    if unknown or not names:
        raise UserError(f"GPT-J has no module '{', '.join(unknown)}'", "adapter.targets",
                        f"Choose from {', '.join(MODULES)}, or all-linear.")
    return names
