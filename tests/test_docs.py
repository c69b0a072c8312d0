"""docs/: every command composes, every link leads somewhere, tables of keys name keys that exist."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import schemas
from finetune.cli.app import compose_config
from finetune.cli.help import GROUPS
from finetune.cli.mistakes import OTHERS
from finetune.compose import RECIPES
from finetune.config import all_keys
from finetune.sweep.space import grid, read_space, settings_words

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
KEYS = set(all_keys(schemas.SCHEMAS["train"])) | set(GROUPS)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every launch in a bash block; continuation lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                (page.name, line) for line in lines if "launch/" in line and "#!" not in block
            ]
    return found


def test_there_are_commands_on_most_pages():
    assert len(commands()) > 30 and len({page for page, _ in commands()}) >= 6


@pytest.mark.parametrize("page,line", commands())
def test_every_command_composes(page, line):
    name, after = re.split(r"launch/(\w+)\.py", line)[1:3]
    words = shlex.split(after, comments=True)
    assert (ROOT / "launch" / f"{name}.py").is_file()
    if name == "doctor" or "..." in line or re.search(r"\b(recipe|run|model)=[A-Z]\b", line):
        return
    keys = [word for word in words if re.match(r"[\w.]+=", word)]
    if "-m" not in words:
        compose_config(keys, name)
        return
    own, jobs = settings_words(keys)
    settings = compose_config([*own, *(w for w in jobs if w.startswith("recipe="))]).config.sweep
    space = read_space(jobs, settings.space)
    for chosen in grid(space) if settings.strategy == "grid" else []:
        compose_config(space.words(chosen))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_recipes_exist(page):
    known = {path.stem for path in RECIPES.glob("*.yaml")}
    assert set(re.findall(r"recipe=([a-z]\w+)", page.read_text(encoding="utf-8"))) <= known


def test_keys_of_other_programs_are_as_the_error_messages_say():
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    named = set()
    for theirs, ours in rows:
        names, keys = re.findall(r"`([\w.]+)`", theirs), re.findall(r"`([\w.]+)`", ours)
        assert set(keys) <= KEYS, keys
        for name in names:
            if name != "output_dir/checkpoint":
                assert OTHERS.get(name) in keys, name
        named |= set(names)
    assert len(named) > 60


def test_the_worked_example_has_its_file(tmp_path):
    files = [str(tmp_path / name) for name in ("train.csv", "eval.csv")]
    subprocess.run([sys.executable, "docs/make_csv.py", *files], cwd=ROOT, check=True)
    for file in files:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        assert len(rows) > 10 and all(row["question"] and row["answer"] for row in rows)
