"""From `launch/train.py`'s argv to one run, or to a sweep of runs. Imports torch only for a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune.cli.app import PRINTS, explained, is_first_rank, main, report_error
from finetune.cli.mistakes import split_flags, without_hydra
from finetune.compose import ROOT, Composed, settle, strip_launcher_arguments
from finetune.errors import EXIT_DONE, EXIT_PREEMPTED, Preempted, UserError, command
from finetune.process import LastingOutput
from finetune.reporting.terminal import silence_libraries
from finetune.training.stop_signals import end_on_signals

SCRIPT = ROOT / "launch" / "train.py"
LAUNCHER_OPTIONS = ("num_gpus", "num_nodes", "include", "exclude", "hostfile")
"""Options of the deepspeed launcher that a sweep has as settings."""


def train(argv: list[str]) -> int:
    """Return the exit code of `launch/train.py argv`; a run that failed ends the process here."""
    if PRINTS & {word.split("=")[0] for word in argv}:
        return main("train", argv)
    sys.stdout = LastingOutput(sys.stdout)  # type: ignore[assignment]  # a run needs no reader
    if "-m" in argv or "--multirun" in argv:
        return run_sweep(argv)
    end_on_signals()
    try:
        code = main("train", argv)
    except Preempted as stopped:
        if is_first_rank():
            print(stopped, file=sys.stderr)
        code = EXIT_PREEMPTED
    if code and "torch" in sys.modules:
        # End without Python's shutdown, which would wait forever for threads that themselves wait
        # for a rank that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(composed: Composed) -> int:
    """Train once."""
    if composed.choices.get("sweep") != "grid":
        raise UserError(
            "a sweep needs -m",
            f"sweep={composed.choices['sweep']}",
            command(["python", "launch/train.py", "-m", *composed.overrides]),
        )
    cfg = settle(composed)
    # Before DeepSpeed is imported: it logs while that happens.
    silence_libraries(cfg.verbose, int(os.environ.get("RANK", "0")))
    from finetune.run import run as train_once

    return train_once(cfg, composed.overrides)


def run_sweep(argv: list[str], script: Path = SCRIPT) -> int:
    """Run a sweep and return its exit code.

    The code is 0 when all jobs are done, 1 when one failed, 2 for a wrong command line, 75 when
    stopped.

    Args:
        script: the script that the launcher starts for each job.
    """
    from finetune.sweep.sweep import sweep

    if not is_first_rank():
        return EXIT_DONE  # under `deepspeed launch/train.py -m` the first rank is the parent of all jobs
    try:
        return sweep(sweep_words(argv), script)
    except UserError as error:
        report_error(explained(error))
        return error.exit_code


def sweep_words(argv: list[str]) -> list[str]:
    """Return the settings of a sweep; the launcher's options (--num_gpus 2) become `sweep.` settings."""
    words, launcher_settings, rest = list[str](), list[str](), strip_launcher_arguments(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in LAUNCHER_OPTIONS and (equals or rest):
            launcher_settings.append(f"sweep.{name}={value if equals else rest.pop(0)}")
        else:
            words.append(word)
    words, _ = split_flags(words)
    return without_hydra([*launcher_settings, *words], "train", multirun=True)
