"""From `launch/train.py`'s argv to one run, or to a sweep of runs. Imports torch only for a run."""

from __future__ import annotations

import os

from finetune.app import Composed, main, settle
from finetune.display import silence_libraries
from finetune.errors import UserError


def train(argv: list[str]) -> int:
    """Exit code of `launch/train.py argv`."""
    if any(word in ("-m", "--multirun") for word in argv):
        from finetune.sweep import sweep

        return sweep(argv)
    return main(_train, "train", argv)


def _train(composed: Composed) -> int:
    if composed.choices.get("sweep") != "grid":
        raise UserError("a sweep needs -m", f"sweep={composed.choices['sweep']}",
                        f"python launch/train.py -m {' '.join(composed.overrides)}")
    cfg = settle(composed)
    # Before DeepSpeed is imported: it logs while that happens.
    silence_libraries(cfg.verbose, int(os.environ.get("RANK", "0")))
    from finetune.run import run

    return run(cfg, composed.overrides)
