"""`finetune-gptj PROGRAM [k=v ...]`: the programs of launch/ after `pip install .`, from any directory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from finetune.errors import BESIDE, EXIT_DONE, EXIT_USAGE

PROGRAMS = {
    "train": "train a model; options of the deepspeed launcher may stand first (--num_gpus 2)",
    "sweep": "train many: every comma, range or search of the settings is a job",
    "plan": "tell whether a run fits, without GPU or weights",
    "evaluate": "metrics of a run or an export; the deepspeed launcher's options may stand first",
    "export": "write an adapter or a whole model of a run, and prove it",
    "generate": "text, labels or answers from an export",
    "serve": "an export behind OpenAI's completions interface, on this machine",
    "convert": "a checkpoint in another form",
    "report": "a run's page, or a comparison of several",
    "doctor": "what of this machine is ready",
}
OWN_OPTIONS = ("-h", "--help", "-c", "--cfg", "-m", "--multirun", "-i", "--info", "--version", "-p")
"""Options of the programs, which the launcher must not take for its own."""


def main() -> int:
    """Replace this process by the program that was named; an exit code where none was."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print("finetune-gptj PROGRAM [key=value ...]\n")
        print("\n".join(f"  {name:<9} {purpose}" for name, purpose in PROGRAMS.items()))
        print("\nfinetune-gptj PROGRAM --help lists a program's settings.")
        return EXIT_DONE if words else EXIT_USAGE
    if words[0] not in PROGRAMS:
        print(
            f"error: there is no program {words[0]}\n  Choose from {', '.join(PROGRAMS)}.",
            file=sys.stderr,
        )
        return EXIT_USAGE
    command = command_of(words[0], words[1:])
    os.execv(command[0], command)
    return EXIT_USAGE  # never: the process is another by now


def command_of(program: str, words: list[str]) -> list[str]:
    """The command of a checkout that a program and its words stand for."""
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
    """The launcher's options that stand before the first setting, with their values; and the rest."""
    options: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in OWN_OPTIONS:
        options.append(rest.pop(0))
        value = (
            rest and "=" not in options[-1] and not rest[0].startswith("-") and "=" not in rest[0]
        )
        if value:
            options.append(rest.pop(0))
    return options, rest
