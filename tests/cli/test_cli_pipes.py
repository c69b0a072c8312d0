"""Programs whose output goes into a pipe that nobody reads to its end, as in `... | head -1`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from finetune.cli.app import EXIT_PIPE
from finetune.cli.schemas import SCHEMAS
from tests.conftest import ROOT


def start(*command: str) -> subprocess.Popen:
    """Start a command whose standard output has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    return process


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=300)[1]
    return process.returncode, said


def test_a_reader_that_leaves_ends_a_program_without_a_word():
    started = {name: start(f"launch/{name}.py", "--help") for name in SCHEMAS}
    assert {name: ended(process) for name, process in started.items()} == {
        name: (EXIT_PIPE, "") for name in SCHEMAS
    }
    assert EXIT_PIPE == 141  # as bash reports a program that SIGPIPE ended


def test_an_evaluation_without_a_reader_has_written_its_metrics(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "Once upon a time."}\n')
    words = ["model=asset:gptj_tiny", "task=clm", f"data.eval={tmp_path / 'rows.jsonl'}"]
    code, said = ended(start("launch/evaluate.py", *words, "dtype=fp32", f"out={tmp_path}"))
    assert code == EXIT_PIPE and "BrokenPipe" not in said and "Traceback" not in said
    assert json.loads((tmp_path / "eval.json").read_text())["loss"] > 0


def test_a_broken_pipe_to_something_else_is_not_hidden():
    """Only a reader of standard output that has left ends a program quietly."""
    code = (
        "import sys; from finetune.cli import app;"
        "app.run_program = lambda *words: (_ for _ in ()).throw(BrokenPipeError('a worker died'));"
        "sys.exit(app.main('plan', []))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "a worker died" in done.stderr


@pytest.mark.slow
def test_a_run_goes_on_without_a_reader(tmp_path):
    words = ["recipe=quickstart", "debug=tiny", "train.steps=2", "data.max_rows=6"]
    code, said = ended(start("launch/train.py", *words, f"run_dir={tmp_path}"))
    assert code == 0 and "BrokenPipe" not in said
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "done"


def test_lasting_output_drops_what_nobody_reads():
    code = (
        "import sys; from finetune.process import LastingOutput;"
        "sys.stdout = LastingOutput(sys.stdout);"
        "print('one', flush=True); print('two' * 100_000); print('three', flush=True);"
        "sys.stderr.write(f'went on, {sys.stdout.isatty()}')"
    )
    assert ended(start("-c", code)) == (0, "went on, False")
    assert ended(start("-u", "-c", code)) == (0, "went on, False")
