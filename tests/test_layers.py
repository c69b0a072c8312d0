"""Imports only point down, parts stay small, and light programs stay light: read from the source, not run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetune"

LAYERS = [
    ["errors", "config", "programs", "names", "schedule", "check", "check_task", "assets_path", "assets", "redact", "other_names",
     "helptext", "suggest", "app", "dist_environment", "plain", "ds_config", "grouping", "heap", "openmp", "faults", "run_lock",
     "signals", "durable", "words", "hush"],
    ["shape"],
    ["plan"],
    ["data"],
    ["dist", "last_words", "trouble", "memory_watch", "peak", "callbacks", "metrics_log", "display", "display_text",
     "environment", "doctor"],
    ["gptj", "adapter", "prompts", "merge", "sample", "shards", "overflow", "length"],
    ["hf_layout", "card", "hub"],
    ["tasks", "preview", "trackers", "report"],
    ["nvme", "partitions", "engine", "checkpoint_files", "train_state", "checkpoint", "saved"],
    ["at_hand", "inputs", "fit", "probe", "lm_eval_suite", "evaluate", "trainer", "summary", "run_files"],
    ["export", "verify", "verify_tensors", "reference"],
    ["export_trained"],
    ["answer", "ds_inference"],
    ["run", "evaluate_program", "export_program", "generate", "sweep", "launcher"],
    ["serve", "convert"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LAZY_UPWARD = {("app", "plan")}


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports when it is itself imported."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "finetune":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_benchmarks_import_what_there_is():
    """They run seldom, and each is a command that someone else must be able to run again."""
    missing = []
    for path in sorted((ROOT / "bench").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("finetune", "tests"):
                module = importlib.import_module(node.module)
                missing += [f"{path.name}: {node.module}.{alias.name}" for alias in node.names
                            if not hasattr(module, alias.name) and not importlib.util.find_spec(f"{node.module}.{alias.name}")]
    assert not missing


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def test_every_part_has_a_layer():
    assert {top(p) for p in files()} == set(LEVEL)


def test_imports_point_down():
    upward = []
    for path in files():
        here = top(path)
        upward += [f"{path.relative_to(ROOT)} imports {name}" for name in imports(path)
                   if LEVEL[name] > LEVEL[here] and path.name != "program.py"]
    assert not upward, upward


def test_no_cycles():
    graph: dict[str, set[str]] = {}
    for path in files():
        graph.setdefault(top(path), set()).update(imports(path) - {top(path)})
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_data_needs_no_torch():
    code = "import sys, finetune.data.batches, finetune.data.text, finetune.data.collate; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_deepspeed_stays_in_its_layer():
    users = [top(p) for p in files() if "import deepspeed" in p.read_text(encoding="utf-8")]
    assert set(users) <= {"engine", "ds_inference"}


def test_files_stay_readable():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files()}
    # The schema is a list: it may be as long as there are keys.
    assert not {name: n for name, n in lengths.items() if n > 400 and name != "finetune/config.py"}
