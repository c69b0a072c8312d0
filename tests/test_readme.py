"""The README's commands: the two it opens with, to the letter, and every other one down to its last key."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.app import compose_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line
]
LAUNCHES = [line for line in COMMANDS if "launch/" in line and "pip install" not in line]


def test_the_two_first_commands():
    assert COMMANDS[0] == "pip install -e . && deepspeed launch/train.py recipe=quickstart"
    assert COMMANDS[1] == "pip install -e '.[test]' && pytest"
    assert COMMANDS[1] in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_there_are_commands_for_every_program():
    programs = {re.search(r"launch/(\w+)\.py", line).group(1) for line in LAUNCHES}  # type: ignore[union-attr]
    assert programs == {p.stem for p in (ROOT / "launch").glob("*.py")}


@pytest.mark.parametrize("line", LAUNCHES)
def test_every_key_of_a_command_exists(line):
    words = shlex.split(line)
    name = re.search(r"launch/(\w+)\.py", line).group(1)  # type: ignore[union-attr]
    keys = [word for word in words if "=" in word]
    if name != "doctor" and "-m" not in words:
        assert compose_config(keys, name).overrides


@pytest.mark.parametrize("link", re.findall(r"\]\((docs/[^)]+)\)", README))
def test_linked_pages_exist(link):
    assert (ROOT / link).is_file()


def test_doctor_runs():
    done = subprocess.run(
        [sys.executable, "launch/doctor.py", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1) and done.stdout.strip()[0] in "[{"
