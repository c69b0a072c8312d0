"""Python modules as processes that need not import torch: forked from the server of the ranks.

As fresh as a process of its own: the server has imported the libraries and done nothing else.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

from tests.distributed.ranks import SERVER


def run_forked(command: list[str], *, env: dict[str, str], **_) -> CompletedProcess:
    """Run `python -m MODULE ...` as `subprocess.run` does."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(target=module_main, args=(command[2:], env, files))
        process.start()
        process.join()
        return CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def module_main(words: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """Become the process of a module."""
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
