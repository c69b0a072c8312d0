"""`pip install .`: one command with the same programs, from any directory, without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from finetune.cli.console import PROGRAMS, command_of, split_launcher
from finetune.process import free_port
from tests.conftest import ROOT

LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*cache",
    "__pycache__",
    "runs",
    "multirun",
    "build",
    "*.egg-info",
    "bench",
    "tests",
    "docs",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that a wheel of this tree was installed into, apart from its dependencies."""
    root = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, root / "tree", ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", root, root / "tree"], check=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", root / "site", wheel], check=True)
    shutil.rmtree(root / "tree")
    return root / "site"


def call(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The console command, in another directory, with the installed package in front of the checkout's."""
    command = [sys.executable, str(installed / "bin" / "finetune-gptj"), *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_quickstart_from_a_wheel(installed, tmp_path):
    done = call(
        installed,
        tmp_path,
        "train",
        "--num_gpus",
        "1",
        "--master_port",
        str(free_port()),
        "recipe=quickstart",
        "debug=tiny",
        "data.max_rows=12",
        "run_dir=run 1",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = json.loads((tmp_path / "run 1" / "result.json").read_text())
    assert result["status"] == "done" and result["export"] == "export"
    assert "finetune-gptj generate" in done.stdout and "python launch/" not in done.stdout
    plan = call(
        installed, tmp_path, "plan", "recipe=clm_pile_lora", "machine=h100_80", "plan.format=json"
    )
    assert json.loads(plan.stdout)["fits"] is True and plan.returncode == 0
    wrong = call(installed, tmp_path, "train", "recipe=quikstart")
    assert (
        wrong.returncode == 2 and "quickstart" in wrong.stderr and "Traceback" not in wrong.stderr
    )
    asked = call(
        installed,
        tmp_path,
        "generate",
        "model=run 1/export",
        "prompt=The patients",
        "max_new_tokens=4",
    )
    assert asked.returncode == 0 and asked.stdout.strip()


def test_every_folder_of_the_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "finetune").rglob("*.py")
    }
    assert {name for name in listed if "beside" not in name} == folders


def test_every_program_has_a_script():
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert set(PROGRAMS) == scripts | {"sweep"}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["recipe=a"], []),
        (["--num_gpus", "2", "recipe=a"], ["--num_gpus", "2"]),
        (["--num_gpus=2", "--no_ssh", "recipe=a"], ["--num_gpus=2", "--no_ssh"]),
        (["--help"], []),
        (["--cfg", "job", "recipe=a"], []),
    ],
)
def test_launcher_options_stand_first(words, options):
    assert split_launcher(words) == (options, words[len(options) :])


def test_which_programs_start_the_launcher():
    assert any(word.endswith("deepspeed") for word in command_of("train", ["recipe=a"]))
    for program, words in (
        ("train", ["--help"]),
        ("plan", []),
        ("sweep", ["a=1,2"]),
        ("evaluate", ["run=a"]),
    ):
        assert not any(word.endswith("deepspeed") for word in command_of(program, words)), program
    assert command_of("sweep", ["a=1,2"])[2:] == ["-m", "a=1,2"]
