"""From `launch/train.py`'s argv to one run, or to a sweep of runs. Imports torch only for a run."""

from __future__ import annotations

import os
import sys

from finetune.app import PRINTS, Composed, main, settle
from finetune.display import silence_libraries
from finetune.errors import EXIT_PREEMPTED, Preempted, UserError
from finetune.signals import end_on_signals
from finetune.words import command


def train(argv: list[str]) -> int:
    """Exit code of `launch/train.py argv`; a run that failed ends the process here."""
    if any(word in ("-m", "--multirun") for word in argv) and not PRINTS & {word.split("=")[0] for word in argv}:
        from finetune.sweep import sweep

        return sweep(argv)
    end_on_signals()
    try:
        code = main(_train, "train", argv)
    except Preempted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        code = EXIT_PREEMPTED
    if code and "torch" in sys.modules:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End without Python's goodbyes: threads that wait for a rank that is gone would hold them up for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(composed: Composed) -> int:
    if composed.choices.get("sweep") != "grid":
        raise UserError("a sweep needs -m", f"sweep={composed.choices['sweep']}",
                        command(["python", "launch/train.py", "-m", *composed.overrides]))
    cfg = settle(composed)
    # Before DeepSpeed is imported: it logs while that happens.
    silence_libraries(cfg.verbose, int(os.environ.get("RANK", "0")))
    from finetune.run import run

    return run(cfg, composed.overrides)
