"""Figures of the source tree: how many rooms, statements, functions, cycles.

    python bench/house.py [--root DIR] [--json]

Cycles count lazy imports too; which imports point up is for tests/test_layers.py to say. Formatting does not change statements
and functions, and comments and docstrings count nowhere but in the folders' sentences.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

Functions = (ast.FunctionDef, ast.AsyncFunctionDef)
WIDTH = 100


def is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def statements(trees: list[ast.Module]) -> int:
    return sum(
        isinstance(node, ast.stmt) and not is_docstring(node)
        for tree in trees
        for node in ast.walk(tree)
    )


def functions(trees: list[ast.Module]) -> list[str]:
    return [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, Functions)]


def used_once(trees: list[ast.Module]) -> int:
    """Private functions and methods whose name is read at exactly one place of their file."""
    found = 0
    for tree in trees:
        uses = Counter(
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(tree)
            if isinstance(node, (ast.Name, ast.Attribute))
        )
        found += sum(
            name.startswith("_") and not name.startswith("__") and uses[name] == 1
            for name in functions([tree])
        )
    return found


def code_lines(text: str) -> list[str]:
    """Lines without blank lines, comments and docstrings."""
    tree, lines = ast.parse(text), text.splitlines()
    prose = {
        line
        for node in ast.walk(tree)
        if is_docstring(node)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type
        not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        )
        for line in range(token.start[0], token.end[0] + 1)
    }
    return [lines[line - 1] for line in sorted(code - prose)]


def module_graph(root: Path, package: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, lazy imports included."""
    paths = {
        ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p
        for p in package.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {t if t in paths else node.module for t in targets}
        graph[name] &= set(paths) - {name}
    return graph


def parts(graph: dict[str, set[str]], package: Path) -> dict[str, set[str]]:
    """The same between the folders (and the modules beside them) right below the package."""

    def part(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    found: dict[str, set[str]] = {}
    for module, targets in graph.items():
        found.setdefault(part(module), set()).update(part(target) for target in targets)
    return {name: targets - {name, ""} for name, targets in found.items() if name}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, open_ = set[str](), [start]
        while open_:
            for target in graph.get(open_.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    open_.append(target)
        reach[start] = seen
    groups = {
        tuple(sorted({a} | {b for b in reach[a] if a in reach.get(b, ())}))
        for a in graph
        if a in reach[a]
    }
    return [list(group) for group in sorted(groups)]


def formatted(path: Path) -> str:
    """The file as `ruff format` writes it, so that the number of lines does not depend on how it was typed."""
    command = ["ruff", "format", "--line-length", str(WIDTH), "--stdin-filename", path.name, "-"]
    done = subprocess.run(
        command, input=path.read_text(encoding="utf-8"), capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else path.read_text(encoding="utf-8")


def measure(root: Path) -> dict[str, Any]:
    package = root / "finetune"
    paths = sorted(package.rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    trees = [ast.parse(text) for text in texts]
    folders = [p for p in package.iterdir() if (p / "__init__.py").is_file()]
    sentences = [
        p
        for p in folders
        if re.search(r"\w", ast.get_docstring(ast.parse((p / "__init__.py").read_text())) or "")
    ]
    lines = [line for text in texts for line in code_lines(text)]
    graph = module_graph(root, package)
    run = formatted(package / "run.py")
    return {
        "modules at the top": len([p for p in package.glob("*.py") if p.name != "__init__.py"]),
        "folders": len(folders),
        "folders with a sentence": len(sentences),
        "files": len(paths),
        "code lines": len(lines),
        "statements": statements(trees),
        "functions": len(functions(trees)),
        "private functions used once": used_once(trees),
        "import cycles of modules": len(cycles(graph)),
        "import cycles of folders": len(cycles(parts(graph, package))),
        "run.py: lines": len((package / "run.py").read_text(encoding="utf-8").splitlines()),
        f"run.py: lines, formatted at {WIDTH} columns": len(run.splitlines()),
        "run.py: imports": sum(
            isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(ast.parse(run))
        ),
        f"code lines over {WIDTH} characters, percent": round(
            100 * sum(len(x) > WIDTH for x in lines) / len(lines), 1
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.root)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(f"{name:<42}{value:>10,}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
