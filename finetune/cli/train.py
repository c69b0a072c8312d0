"""From `launch/train.py`'s argv to one run, or to a sweep of runs. Imports torch only for a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune.cli.app import PRINTS, explained, main, report_error
from finetune.cli.mistakes import split_flags, unknown_option, without_hydra
from finetune.compose import CONF, ROOT, Composed, settle, strip_launcher_arguments
from finetune.errors import EXIT_DONE, EXIT_PREEMPTED, Preempted, UserError, command
from finetune.reporting.terminal import silence_libraries
from finetune.training.stop_signals import end_on_signals

SCRIPT = ROOT / "launch" / "train.py"


def train(argv: list[str]) -> int:
    """Exit code of `launch/train.py argv`; a run that failed ends the process here."""
    if any(word in ("-m", "--multirun") for word in argv) and not PRINTS & {
        word.split("=")[0] for word in argv
    }:
        return run_sweep(argv)
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


def run_sweep(argv: list[str], script: Path = SCRIPT) -> int:
    """Exit code of a sweep: 0 when all jobs are done, 1 when one failed, 2 for a wrong command line, 75 when stopped.

    Args:
        script: what the launcher starts for each job.
    """
    from finetune.sweep.sweep import sweep

    if int(os.environ.get("RANK", "0")) != 0:
        return EXIT_DONE  # under `deepspeed launch/train.py -m` the first rank is the parent, the others have no part
    try:
        return sweep(sweep_words(argv), script)
    except UserError as error:
        report_error(explained(error))
        return error.exit_code


def _leave(code: int) -> None:
    """End without Python's goodbyes: threads that wait for a rank that is gone would hold them up for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(composed: Composed) -> int:
    if composed.choices.get("sweep") != "grid":
        raise UserError(
            "a sweep needs -m",
            f"sweep={composed.choices['sweep']}",
            command(["python", "launch/train.py", "-m", *composed.overrides]),
        )
    cfg = settle(composed)
    # Before DeepSpeed is imported: it logs while that happens.
    silence_libraries(cfg.verbose, int(os.environ.get("RANK", "0")))
    from finetune.run import run

    return run(cfg, composed.overrides)


LAUNCHER_OPTIONS = ("num_gpus", "num_nodes", "include", "exclude", "hostfile")


def sweep_words(argv: list[str]) -> list[str]:
    """k=v words; the launcher's own options (--num_gpus 2) become `sweep.` settings."""
    words, own, argv = list[str](), list[str](), strip_launcher_arguments(argv)
    while argv:
        word = argv.pop(0)
        name, separator, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in LAUNCHER_OPTIONS and (separator or argv):
            own.append(f"sweep.{name}={value if separator else argv.pop(0)}")
        else:
            words.append(word)
    words, _ = split_flags(words)
    unknown = [word for word in words if word.startswith("-")]
    if unknown:
        raise unknown_option(unknown[0], "train", CONF)
    return without_hydra([*own, *words], "train", multirun=True)
