"""Command line to typed config: every launch script goes through `main`.

argv -> drop the launcher's --local_rank -> compose.py -> typed config -> `run(config)` -> exit code

Hydra's own main is used only for what it prints (`--info`, `--cfg hydra`): its error handling exits
with 1 where a wrong config must exit with 2, and its output directories differ between ranks. This
module does not depend on what the programs do.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra

from finetune.assets.paths import resolve
from finetune.cli.help import help_text
from finetune.cli.mistakes import (
    OPTIONS,
    composition_mistake,
    split_flags,
    without_hydra,
)
from finetune.cli.schemas import ALIASES, SCHEMAS
from finetune.compose import (
    CONF,
    SETTING,
    Composed,
    CompositionError,
    compose_words,
    hydra_words,
    read_text,
    register,
    settle,
    strip_launcher_arguments,
    text_settings,
    unquoted,
)
from finetune.config import Literals, adapter_head, config_head, plain_values, read_yaml, to_yaml
from finetune.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    UserError,
    hydra_quoted,
    problems_error,
)
from finetune.files import read_json
from finetune.process import drop_output, reader_has_left, spin_briefly
from finetune.reporting.redact import redact, redact_text

PRINTS = {
    name
    for long, option in OPTIONS.items()
    for name in (long, option.short)
    if option.prints and name
}
"""Options that print something in place of running."""
EXIT_PIPE = 128 + signal.SIGPIPE
"""Exit code, in a shell, of a program that wrote to a pipe without a reader."""
MOST_PROBLEMS = 8
"""Largest number of wrong words of one command line that are reported."""


def main(program: str, argv: list[str] | None = None) -> int:
    """Run one program and return its exit code.

    The reader of its output may leave early, as in `launch/evaluate.py ... | head -1`: the program
    then ends without a word, with the exit code of other Unix tools.
    """
    logging.raiseExceptions = False  # loggers of libraries write there too, and print tracebacks
    try:
        code = run_program(program, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not reader_has_left():
            raise  # another pipe, for example to a process that died
        drop_output()
        return EXIT_PIPE


def run_program(program: str, argv: list[str]) -> int:
    """Do what a command line asks; a UserError is printed without a traceback.

    The module `finetune.cli.PROGRAM` is imported once the command line is known to be valid; its
    `run` takes the composed config and returns an exit code.
    """
    argv = strip_launcher_arguments(argv)
    try:
        if "-h" in argv or "--help" in argv:
            if is_first_rank():
                topics = [word for word in argv if not word.startswith("-") and "=" not in word]
                print(help_text(program, topics))
            return EXIT_DONE
        spin_briefly()
        words, flags = split_flags(argv, program)
        if "--multirun" in flags:
            raise UserError(
                "a sweep is started by launch/train.py alone, and prints no config",
                "-m",
                "Leave -m out, and give every setting one value.",
            )
        if PRINTS & set(flags):
            return print_asked(program, words, flags) if is_first_rank() else EXIT_DONE
        composed = compose_config(words, program)
        # Imported here, so that help and wrong words do without it; the libraries come after it.
        from finetune.reporting.terminal import silence_libraries

        verbose = getattr(composed.config, "verbose", False)
        silence_libraries(verbose, int(os.environ.get("RANK", "0")))
        return importlib.import_module(f"finetune.cli.{program}").run(composed)
    except UserError as error:
        report_error(explained(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def report_error(error: UserError) -> None:
    """Print the error on rank 0.

    The other ranks wait, so that the launcher does not kill rank 0 before it has printed.
    """
    if error.spoken:
        return
    if not is_first_rank():
        time.sleep(5)
        return
    sys.stdout.flush()
    print(f"error: {redact_text(error.render())}", file=sys.stderr, flush=True)


def print_asked(program: str, words: list[str], flags: dict[str, str]) -> int:
    """Print what `--cfg`, `--info` and similar options ask for.

    Raises:
        UserError: the settings do not compose.
    """
    import hydra

    import finetune

    if "--version" in flags:
        print(f"finetune-gptj {finetune.__version__}, hydra-core {hydra.__version__}")
        return EXIT_DONE
    composed = compose_config(words, program)
    if flags.get("--cfg") == "job":
        # Resolved as in a run: the recipe's name, one of steps and epochs, a debug run's data.
        config = settle(composed) if program in ("train", "plan") else composed.config
        values: Any = redact(plain_values(config))
        for part in filter(None, flags.get("--package", "").removeprefix("_global_").split(".")):
            if not isinstance(values, dict) or part not in values:
                raise UserError(
                    "there is no such section", f"--package {flags['--package']}", "See --cfg job."
                )
            values = values[part]
        print(to_yaml(values), end="")
        return EXIT_DONE
    register(words, program, SCHEMAS[program])
    GlobalHydra.instance().clear()
    options = [
        f"{flag}={value}" if value else flag
        for flag, value in flags.items()
        if flag not in ("--config-dir", "--run")
    ]
    settings = hydra_words(composed.overrides, SCHEMAS[program], Literals())
    sys.argv = [sys.argv[0], *options, *settings]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=program)(
            lambda cfg: None
        )()
    except SystemExit as error:
        return EXIT_USAGE if error.code else EXIT_DONE
    return EXIT_DONE


def compose_config(overrides: list[str], program: str = "train") -> Composed:
    """Compose the config and convert it to dataclasses.

    Raises:
        UserError: a group, option or key is unknown, or a value has the wrong type; the nearest
            name is suggested.
    """
    try:
        return _compose(schema_words(without_hydra(overrides, program), program), program)
    except CompositionError as error:
        raise explained(error) from None


def _compose(words: list[str], program: str) -> Composed:
    implied = trained_task(words) if program == "evaluate" else ()
    return compose_words(words, program, SCHEMAS[program], implied)


def explained(error: UserError) -> UserError:
    """Rephrase a composition error for a user who mistyped; return any other error unchanged.

    Hydra stops at the first wrong word. The others are found by composing without it, and all are
    reported at once.
    """
    if not isinstance(error, CompositionError):
        return error
    problems, words = [composition_mistake(error)], list(error.overrides)
    while len(problems) < MOST_PROBLEMS:
        where = problems[-1].where
        wrong = [word for word in words if where in (word, word.lstrip("+~").split("=")[0])]
        if not wrong:
            break
        words.remove(wrong[0])
        try:
            _compose(words, error.program)
            break
        except CompositionError as another:
            problems.append(composition_mistake(another))
    return problems[0] if len(problems) == 1 else problems_error("the command line", problems)


def schema_words(words: list[str], program: str) -> list[str]:
    """Translate the words of the command line to the schema's keys.

    For report, `run=A run=B` and `runs=A*` become `runs=['A','B']`: Hydra accepts each key only
    once, and lists only in brackets.
    """
    if program == "report":
        single = [unquoted(word[4:]) for word in words if word.startswith("run=")]
        bare = [word for word in words if word.startswith("runs=") and word[5:6] != "["]
        if len(single) < 2 and not bare:
            return words
        rest = [word for word in words if not word.startswith("run=") and word not in bare]
        folders = [hydra_quoted(path) for path in [*single, *(unquoted(w[5:]) for w in bare)]]
        return [*rest, f"runs=[{','.join(folders)}]"]
    translated = []
    for word in words:
        key, equals, value = word.partition("=")
        if program == "evaluate" and key == "tasks" and "[" not in value:
            value = f"[{value}]"  # lm-eval's users write tasks=a,b
        translated.append(ALIASES.get(program, {}).get(key, key) + equals + value)
    return translated


def trained_task(words: list[str]) -> list[str]:
    """Return e.g. `["task=qa"]` if evaluate's words name a run or an export but no task.

    The task is that of the run or export. Returns [] otherwise.
    """
    texts: dict[str, str] = {}
    for word in words:
        if word.startswith("task="):
            return []
        matched = SETTING.fullmatch(word)
        if matched and matched[2] in ("run", "export_dir"):
            reading = text_settings(SCHEMAS["evaluate"])[matched[2]]
            texts[matched[2]] = str(read_text(matched[2], matched[3], reading) or "")
    try:
        folder = Path(resolve(texts.get("run") or texts.get("export_dir", ""))).expanduser()
        if texts.get("run"):  # a run directory, or one of its checkpoints/step-N
            places = [place / "config.yaml" for place in (folder, *folder.parents[:2])]
            config = next(place for place in places if place.is_file())
            return [f"task={read_yaml(config)['task']['kind']}"]
        if (folder / "finetune.json").is_file():
            return [f"task={read_json(folder / 'finetune.json')['settings']['kind']}"]
        if (folder / "adapter_config.json").is_file():
            values = read_json(folder / "adapter_config.json")
            return [f"task={adapter_head(values, str(folder)).task}"]
        return [f"task={config_head(read_json(folder / 'config.json')).task}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, UserError):
        return []  # nothing there, or not ours: reported elsewhere
