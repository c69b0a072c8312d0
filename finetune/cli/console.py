"""`finetune-gptj PROGRAM [k=v ...]`: the programs of launch/ after `pip install .`, from any directory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from finetune.errors import BESIDE, EXIT_DONE, EXIT_USAGE

PROGRAMS = (
    *("train", "sweep", "plan", "evaluate", "export", "generate", "serve", "convert", "report"),
    "doctor",
)
OWN_OPTIONS = ("-h", "--help", "-c", "--cfg", "-m", "--multirun", "-i", "--info", "--version", "-p")
"""Options of the programs, which the launcher must not take for its own."""


def main() -> int:
    """Replace this process by the program that was named; return an exit code if there is none."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        from finetune.cli.help import USAGE  # half a second that the programs need not spend here

        purposes = {name: usage.purpose for name, usage in USAGE.items()}
        purposes["sweep"] = (
            "Train many runs: every comma, range or search of the settings is a job."
        )
        print("finetune-gptj PROGRAM [key=value ...]\n")
        print("\n".join(f"  {name:<9} {purposes[name]}" for name in PROGRAMS))
        print("\nDeepSpeed's own options stand first: finetune-gptj train --num_gpus 2 ...")
        print("finetune-gptj PROGRAM --help lists a program's settings.")
        return EXIT_DONE if words else EXIT_USAGE
    if words[0] not in PROGRAMS:
        print(
            f"error: there is no program {words[0]}\n  Choose from {', '.join(PROGRAMS)}.",
            file=sys.stderr,
        )
        return EXIT_USAGE
    command = command_of(words[0], words[1:])
    os.execv(command[0], command)
    return EXIT_USAGE  # not reached: execv does not return


def command_of(program: str, words: list[str]) -> list[str]:
    """Return the command of a checkout that is equivalent to a program and its words."""
    script = str(BESIDE / "launch" / f"{'train' if program == 'sweep' else program}.py")
    options, settings = split_launcher(words)
    if program == "sweep":
        return [sys.executable, script, "-m", *options, *settings]
    asks = any(word in OWN_OPTIONS for word in settings)
    if (program == "train" and not asks) or (program == "evaluate" and options):
        here = str(Path(sys.executable).parent)
        launcher = shutil.which("deepspeed", path=here) or shutil.which("deepspeed") or "deepspeed"
        return [sys.executable, "-u", launcher, *options, script, *settings]
    return [sys.executable, script, *options, *settings]


def split_launcher(words: list[str]) -> tuple[list[str], list[str]]:
    """Split off the launcher's options, which stand before the first setting, with their values."""
    options, rest = list[str](), list(words)
    while rest and rest[0].startswith("-") and rest[0] not in OWN_OPTIONS:
        options.append(rest.pop(0))
        if "=" not in options[-1] and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            options.append(rest.pop(0))
    return options, rest
