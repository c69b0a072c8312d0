"""Imports go along the arrows of one table, lazy ones too; no cycle; light programs stay light. Read from the source, not run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetune"

ARROWS = {
    # ground: no torch
    "errors": "",
    "process": "errors",
    "files": "errors",
    "config": "errors files",
    "assets": "errors",
    "data": "assets config errors files",
    "planning": "assets config errors",
    "compose": "config errors",
    "reporting": "config errors files",
    "reporting.page": "config errors files reporting",
    "check": "config data errors planning",
    # torch
    "dist": "errors process",
    "gptj": "assets config data errors files planning",
    "tasks": "check config data dist errors",
    # deepspeed
    "sharding": "config dist errors gptj planning",
    "checkpointing": "config dist errors files planning sharding",
    "training": "assets check checkpointing config data dist errors files gptj planning process reporting sharding tasks",
    # what people do with a run
    "export": "assets checkpointing config data dist errors files gptj process reporting sharding training",
    "inference": "assets config data dist errors export files gptj process tasks",
    "sweep": "check compose config errors files planning process reporting reporting.page",
    # top
    "run": "checkpointing compose config data dist export inference process reporting reporting.page sharding training",
    "cli": "assets check checkpointing compose config data dist errors export files gptj inference planning process reporting "
    "reporting.page run sharding sweep tasks training",
}
"""Folder, or module at the top -> what it may import, besides itself. A row names only rows above it."""

NO_TORCH = (
    "finetune.data.batches",
    "finetune.data.encode_clm",
    "finetune.data.collate",
    "finetune.planning.choose",
    "finetune.planning.show",
    "finetune.compose",
    "finetune.check",
    "finetune.reporting.terminal",
    "finetune.reporting.page.build",
    "finetune.sweep.sweep",
    "finetune.cli.plan",
    "finetune.cli.train",
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def folder_of(module: str) -> str:
    """`finetune.data.cache` -> data; `finetune.run` -> run."""
    path = modules()[module]
    inside = path.parent.relative_to(PACKAGE).parts
    return ".".join(inside) or path.stem


@cache
def imports() -> list[tuple[str, str, str]]:
    """(importing module, imported module, file:line), wherever in a file the import stands."""
    found = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{where}: write imports of the package from its root"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [
                    (module, name if name in modules() else str(node.module), where)
                    for name in names
                ]
            elif isinstance(node, ast.Import):
                found += [(module, alias.name, where) for alias in node.names]
    return [edge for edge in found if edge[1] in modules()]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module)] if isinstance(node, ast.ImportFrom) else []


def test_every_folder_has_a_row():
    assert {folder_of(module) for module in modules() if module != "finetune"} - {
        "__init__"
    } == set(ARROWS)


def test_rows_only_name_rows_above_them():
    rows = list(ARROWS)
    assert not [
        (row, name)
        for i, row in enumerate(rows)
        for name in ARROWS[row].split()
        if name not in rows[:i]
    ]


def test_imports_follow_the_arrows():
    wrong = [
        f"{where}: {folder_of(source)} may not import {target}"
        for source, target, where in imports()
        if source != "finetune"
        and target != "finetune"
        and folder_of(source) != folder_of(target)
        and folder_of(target) not in ARROWS[folder_of(source)].split()
    ]
    assert not wrong, "\n".join(wrong)


def test_arrows_are_used():
    """A row that allows more than there is would let a wrong import in unseen."""
    used = {
        (folder_of(source), folder_of(target))
        for source, target, _ in imports()
        if source != "finetune"
    }
    assert not [
        (row, name)
        for row, names in ARROWS.items()
        for name in names.split()
        if (row, name) not in used
    ]


def test_no_module_imports_itself_in_a_circle():
    graph: dict[str, set[str]] = {}
    for source, target, _ in imports():
        graph.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_folder_says_what_it_is_for():
    """A sentence, and nothing that an import of one of its modules would have to pay for."""
    for folder in {path.parent for path in modules().values()} - {PACKAGE}:
        body = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        assert (
            len(body) == 1
            and isinstance(body[0], ast.Expr)
            and ast.get_docstring(ast.Module(body, []))
        ), folder


def test_few_modules_stand_at_the_top():
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 8


def test_deepspeed_stays_where_it_is():
    users = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if "deepspeed" in {name.split(".")[0] for name in imported(node)}
    }
    assert {module for module in users if folder_of(module) != "sharding"} <= {
        "finetune.inference.deepspeed_inference"
    }


def test_light_modules_need_no_torch():
    code = f"import sys, {', '.join(NO_TORCH)}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("folder", ["bench", "docs", "launch", "tools"])
def test_scripts_import_what_there_is(folder: str):
    """They run seldom, and each is a command that someone else must be able to run again."""
    missing = []
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] in ("finetune", "tests", "tools")
            ):
                module = importlib.import_module(node.module)
                missing += [
                    f"{path.name}: {node.module}.{alias.name}"
                    for alias in node.names
                    if not hasattr(module, alias.name)
                    and not importlib.util.find_spec(f"{node.module}.{alias.name}")
                ]
    assert not missing
