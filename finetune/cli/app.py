"""Command line to typed config: every launch script goes through `main`.

argv -> drop the launcher's --local_rank -> compose.py -> typed config -> `run(config)` -> exit code

Hydra's own main is used only for what it prints (`--info`, `--cfg hydra`): its error handling exits
with 1 where a wrong config must exit with 2, and its output directories differ between ranks. This
module does not depend on what the programs do.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.global_hydra import GlobalHydra

from finetune.assets.paths import resolve
from finetune.cli.help import help_text
from finetune.cli.mistakes import composition_mistake, split_flags, unknown_option, without_hydra
from finetune.cli.schemas import SCHEMAS
from finetune.compose import (
    CONF,
    RECIPES,
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
from finetune.process import spin_briefly
from finetune.reporting.redact import redact, redact_text

T = TypeVar("T")

ALIASES = {
    "evaluate": {"model": "export_dir"},
    "generate": {"model": "export_dir"},
    "serve": {"model": "export_dir"},
    "export": {
        "export.push_to_hub": "push_to_hub",
        "export.hub_private": "hub_private",
        "export.hub_base": "hub_base",
    },
}
"""program -> key as users type it -> key in the schema: `model` alone would name the group of base models."""

PRINTS = {
    "-h",
    "--help",
    "-c",
    "--cfg",
    "-i",
    "--info",
    "--version",
    "--hydra-help",
    "-sc",
    "--shell-completion",
}
"""Options that print something in place of running."""
MOST_PROBLEMS = 8
"""Wrong words of one command line that are told."""


def compose_config(overrides: list[str], name: str = "train") -> Composed:
    """Compose the config and convert it to dataclasses.

    Raises:
        UserError: a group, option or key is unknown, or a value has the wrong type; the nearest
            name is suggested.
    """
    overrides = _schema_words(without_hydra(overrides, name), name)
    try:
        return _compose(overrides, name)
    except CompositionError as error:
        raise explained(error) from None


def _compose(words: list[str], name: str) -> Composed:
    return compose_words(
        words, name, SCHEMAS[name], trained_task(words) if name == "evaluate" else ()
    )


def explained(error: UserError) -> UserError:
    """Rephrase a composition error for a user who mistyped; return any other error unchanged.

    Hydra stops at the first wrong word. The others are found by composing without it, and all are
    reported at once.
    """
    if not isinstance(error, CompositionError):
        return error
    name = error.program
    problems, words = [composition_mistake(error, CONF)], list(error.overrides)
    while len(problems) < MOST_PROBLEMS:
        where = problems[-1].where
        wrong = next(
            (word for word in words if where in (word, word.lstrip("+~").split("=")[0])), None
        )
        if wrong is None:
            break
        words.remove(wrong)
        try:
            _compose(words, name)
            break
        except CompositionError as another:
            problems.append(composition_mistake(another, CONF))
    return problems[0] if len(problems) == 1 else problems_error("the command line", problems)


def _schema_words(words: list[str], name: str) -> list[str]:
    """Translate the words of the command line to the schema's keys."""
    if name == "report":
        return report_words(words)
    renamed = ALIASES.get(name, {})
    if name == "evaluate":  # lm-eval's users write tasks=a,b
        words = [
            f"tasks=[{word[6:]}]" if word.startswith("tasks=") and "[" not in word else word
            for word in words
        ]
    return [
        f"{renamed[word.split('=')[0]]}={word.partition('=')[2]}"
        if word.split("=")[0] in renamed
        else word
        for word in words
    ]


Program = Callable[[Composed], int | None]


def main(run: Program | str, name: str, argv: list[str] | None = None) -> int:
    """Run one program and return its exit code; a UserError is printed without a traceback.

    Args:
        run: the program; takes the composed config and returns an exit code, or None for 0. A
            string names the module whose `run` is called; it is imported once the command line is
            known to be valid.
        name: primary config, e.g. "train".
    """
    argv = strip_launcher_arguments(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in argv):
        return _print_help(
            name, [word for word in argv if not word.startswith("-") and "=" not in word]
        )
    try:
        spin_briefly()
        words, flags = split_flags(argv)
        unknown = [word for word in words if word.startswith("-")]
        if unknown:
            raise unknown_option(unknown[0], name, CONF)
        if "--multirun" in flags:
            raise UserError(
                "a sweep is started by launch/train.py alone, and prints no config",
                "-m",
                "Leave -m out, and give every setting one value.",
            )
        if PRINTS & set(flags):
            return _print(name, words, flags)
        composed = compose_config(words, name)
        return _program(run)(composed) or EXIT_DONE
    except UserError as error:
        report_error(explained(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def _program(run: Program | str) -> Program:
    return importlib.import_module(run).run if isinstance(run, str) else run


def _print_help(name: str, topics: list[str]) -> int:
    """Print help on rank 0 only; return exit code 2 for a topic that does not exist."""
    if os.environ.get("RANK", "0") != "0":
        return EXIT_DONE
    try:
        print(help_text(name, CONF, RECIPES, topics))
    except UserError as error:
        report_error(error)
        return error.exit_code
    return EXIT_DONE


def report_error(error: UserError) -> None:
    """Print the error on rank 0.

    The other ranks wait, so that the launcher does not kill rank 0 before it has printed.
    """
    if error.spoken:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
        return
    sys.stdout.flush()
    print(f"error: {redact_text(error.render())}", file=sys.stderr, flush=True)


def _print(name: str, words: list[str], flags: dict[str, str]) -> int:
    """Print what `--cfg`, `--info` and similar options ask for, on rank 0 only.

    Raises:
        UserError: the settings do not compose.
    """
    import hydra

    import finetune

    if os.environ.get("RANK", "0") != "0":
        return EXIT_DONE
    if "--version" in flags:
        print(f"finetune-gptj {finetune.__version__}, hydra-core {hydra.__version__}")
        return EXIT_DONE
    composed = compose_config(words, name)
    if flags.get("--cfg") == "job":
        # Resolved as in a run: the recipe's name, one of steps and epochs, a debug run's data.
        values: Any = redact(
            plain_values(settle(composed) if name in ("train", "plan") else composed.config)
        )
        for part in filter(None, flags.get("--package", "").removeprefix("_global_").split(".")):
            if not isinstance(values, dict) or part not in values:
                raise UserError(
                    "there is no such section", f"--package {flags['--package']}", "See --cfg job."
                )
            values = values[part]
        print(to_yaml(values), end="")
        return EXIT_DONE
    register(words, name, SCHEMAS[name])
    GlobalHydra.instance().clear()
    asked = [
        f"{flag}={value}" if value else flag
        for flag, value in flags.items()
        if flag not in ("--config-dir", "--run")
    ]
    sys.argv = [sys.argv[0], *asked, *hydra_words(composed.overrides, SCHEMAS[name], Literals())]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(lambda cfg: None)()
    except SystemExit as error:
        return EXIT_USAGE if error.code else EXIT_DONE
    return EXIT_DONE


def typed_text(words: Iterable[str], key: str, program: str) -> str | None:
    """Return the text that the last word for `key` assigns to it; None if there is no such word."""
    values = [found[3] for word in words if (found := SETTING.fullmatch(word)) and found[2] == key]
    text = read_text(key, values[-1], text_settings(SCHEMAS[program])[key]) if values else None
    return text if isinstance(text, str) else None


def report_words(words: list[str]) -> list[str]:
    """Convert `run=A run=B` and `runs=A*` to `runs=['A','B']`.

    Hydra accepts each key only once, and lists only in brackets.
    """
    single = [unquoted(word[4:]) for word in words if word.startswith("run=")]
    several = [
        unquoted(word[5:])
        for word in words
        if word.startswith("runs=") and not word.startswith("runs=[")
    ]
    if len(single) < 2 and not several:
        return words
    rest = [
        word
        for word in words
        if word.split("=")[0] not in ("run", "runs") or word.startswith("runs=[")
    ]
    return [*rest, f"runs=[{','.join(hydra_quoted(path) for path in [*single, *several])}]"]


def trained_task(words: list[str]) -> list[str]:
    """Return e.g. `["task=qa"]` if evaluate's words name a run or an export but no task.

    The task is that of the run or export. Returns [] otherwise.
    """
    run, export = (typed_text(words, key, "evaluate") for key in ("run", "export_dir"))
    if any(word.startswith("task=") for word in words):
        return []
    try:
        kind = (
            _task_of_run(Path(resolve(run or "")).expanduser())
            if run
            else _task_of_export(Path(resolve(export or "")).expanduser())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, UserError):
        return []  # nothing there, or not ours: reported elsewhere
    return [f"task={kind}"]


def _task_of_run(folder: Path) -> str:
    """Return the task of a run directory, or of one of its checkpoints/step-N."""
    place = next(
        place for place in (folder, *folder.parents[:2]) if (place / "config.yaml").is_file()
    )
    return str(read_yaml(place / "config.yaml")["task"]["kind"])


def _task_of_export(folder: Path) -> str:
    if (folder / "finetune.json").is_file():
        return read_json(folder / "finetune.json")["settings"]["kind"]
    if (folder / "adapter_config.json").is_file():
        return adapter_head(read_json(folder / "adapter_config.json"), str(folder)).task
    return config_head(read_json(folder / "config.json")).task
