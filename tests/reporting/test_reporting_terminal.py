"""The display: plain lines are complete, throttled and ours; nothing hides an error."""

from __future__ import annotations

import io
import json
import logging
import mmap
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from finetune.errors import clock, figure
from finetune.planning.machine import gpu_bytes, host_bytes, peak_host_bytes
from finetune.reporting import terminal as display_module
from finetune.reporting.callbacks import RunInfo
from finetune.reporting.terminal import NOISY, Display, summary_table
from finetune.reporting.terminal_text import plain_line
from finetune.sharding.ops import hushed

RECORD = {
    "kind": "train",
    "step": 12,
    "loss": 2.3456,
    "lr": 1e-4,
    "grad_norm": 1.234,
    "tokens": 5120,
    "tokens_per_second": 1234.4,
    "host_bytes": 2 * 2**30,
    "gpu_bytes": 0,
}


def plain() -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, force_terminal=False, highlight=False)), out


def run_info(tmp_path: Path, steps: int, **more) -> RunInfo:
    return RunInfo(tmp_path, "r", steps, **more)


def test_a_plain_line_holds_every_figure():
    assert plain_line(RECORD, 100, 12.2) == (
        "step  12/100  loss 2.3456  lr 1.0e-04  grad 1.23  1,234 tok/s  host 2.00 GiB  ETA 0:12"
    )


def test_figures_that_are_missing_are_left_out_but_nan_is_shown():
    bare = {
        "step": 1,
        "loss": float("nan"),
        "lr": 1e-4,
        "grad_norm": None,
        "tokens_per_second": None,
    }
    assert plain_line(bare, 9, None) == "step 1/9  loss nan  lr 1.0e-04  ETA -"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.19058, "7.1906"),
        (0.9312499, "0.9312"),
        (44.70118, "44.701"),
        (889.5663, "889.57"),
        (1602.31, "1,602.3"),
        (123456.7, "123,457"),
        (-2.5, "-2.5000"),
        (0.0, "0.0000"),
        (0.0001236, "1.236e-04"),
        (45041, "45,041"),
        (None, "-"),
        (float("nan"), "nan"),
    ],
)
def test_one_way_to_write_a_figure(value, text):
    assert figure(value) == text


def test_the_end_of_a_run_says_what_it_came_to_and_what_to_do_with_it(tmp_path: Path):
    display, out = plain()
    display.start(run_info(tmp_path, 3, config={"task": {"kind": "qa"}}))
    lines = [
        {**RECORD, "step": step, "loss": loss} for step, loss in ((1, 4.0), (2, 3.0), (3, 9.5))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    display.finish(
        {
            "status": "done",
            "step": 3,
            "loss": 9.5,
            "eval": {"loss": 1602.31, "f1": 0.5},
            "tokens": 300,
            "seconds": 3.0,
            "export": "export",
            "export_step": 2,
            "best": 0.75,
            "best_step": 2,
            "best_metric": "f1",
        }
    )
    assert out.getvalue().splitlines() == [
        "done at step 3  300 tokens in 0:03",
        "  training    loss 5.5000, last 3 steps averaged",
        "  evaluation  loss 1,602.3  f1 0.5000",
        "  best        f1 0.7500 at step 2, which is exported",
        f"  page        {tmp_path}/report.html",
        f"  export      {tmp_path}/export",
        f'  try it      python launch/generate.py model={tmp_path}/export question="..." context="..."',
    ]


def test_a_run_that_was_stopped_ends_with_the_command_to_go_on(tmp_path: Path):
    display, out = plain()
    display.start(run_info(tmp_path, 3, extra={"overrides": ["recipe=quickstart"]}))
    display.finish(
        {
            "status": "preempted",
            "stopped_by": "SIGINT",
            "step": 2,
            "loss": 9.5,
            "eval": {},
            "export": None,
        }
    )
    lines = out.getvalue().splitlines()
    assert lines[0] == "stopped by you (Ctrl-C) at step 2"
    assert lines[-1] == f"to go on: deepspeed launch/train.py recipe=quickstart run_dir={tmp_path}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (90000, "1d 01:00"), (None, "-")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_short_runs_print_every_step_and_long_ones_do_not(tmp_path: Path):
    for steps, expected in ((20, 20), (1000, 2)):
        display, out = plain()
        display.start(run_info(tmp_path, steps))
        for step in range(1, steps + 1):
            display.train_step({**RECORD, "step": step})
        lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
        assert len(lines) == expected
        assert lines[-1].startswith(f"step {steps}/{steps}")


def test_a_long_run_prints_again_after_a_while(tmp_path: Path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    display, out = plain()
    display.start(run_info(tmp_path, 1000))
    for step in range(1, 101):
        now[0] += 1.0
        display.train_step(
            {**RECORD, "step": step, "tokens": 100 * step, "tokens_per_second": 100.0}
        )
    lines = out.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[-1].endswith("ETA 15:04"), "904 steps are left at one second each"


def test_time_spent_evaluating_is_not_in_the_eta(tmp_path: Path):
    """It follows the lines' own rate, of which evaluations are no part, and any number of steps between lines."""
    display, out = plain()
    display.start(run_info(tmp_path, 20))
    for step in (6, 12):
        display.train_step(
            {**RECORD, "step": step, "tokens": 100 * step, "tokens_per_second": 100.0}
        )
        subsets = {"ArXiv": {"loss": 1.5, "tokens": 9}}
        display.evaluation({"kind": "eval", "step": step, "loss": 2.0, "subsets": subsets})
    text = out.getvalue()
    assert "ETA 0:08" in text
    assert "eval at step 12: loss 2.0000\n  ArXiv  loss 1.5000  9 tokens" in text


def test_a_terminal_gets_a_bar_and_messages_stay(tmp_path: Path):
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=100, highlight=False))
    with display.phase("tokenising", 3) as phase:
        phase.advance(3)
    display.start(run_info(tmp_path, 4, start_step=1, resumed=True))
    for step in (2, 3, 4):
        display.train_step({**RECORD, "step": step})
    display.message("something to say")
    display.finish({"status": "failed", "step": 4, "loss": None, "error": "out of [memory]"})
    display.close()
    text = out.getvalue()
    assert "resumed after step 1" in text and "tokenising: done" in text
    assert "something to say" in text and "failed at step 4" in text
    assert text.count("\x1b[?25h") >= 1, "the cursor must come back"


def test_a_phase_whose_total_is_known_later_shows_its_share(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    display, out = plain()
    with display.phase("tokenising x") as phase:
        phase.total = 200
        for done in (10, 50, 200):
            now[0] += 4
            phase.update(done)
    assert out.getvalue().splitlines() == [
        "tokenising x ...",
        "tokenising x: 25%  ETA 0:15",
        "tokenising x: done in 0:12",
    ]


def test_a_phase_that_fails_says_so():
    display, out = plain()
    with pytest.raises(ValueError), display.phase("loading"):
        raise ValueError
    assert out.getvalue().splitlines()[0] == "loading ..."
    assert out.getvalue().splitlines()[-1].startswith("loading: failed")


def test_a_plain_table_is_aligned():
    out = io.StringIO()
    summary_table(
        "Run", [("a", "1"), ("longer", "[b]2[/b]")], Console(file=out, force_terminal=False)
    )
    assert out.getvalue() == "Run\n  a       1\n  longer  [b]2[/b]\n"


def test_libraries_are_silenced_but_never_their_errors():
    code = """
import logging, warnings
from finetune.reporting.terminal import silence_libraries
silence_libraries(False, 0)
for name in ("DeepSpeed", "transformers.modeling_utils"):
    logger = logging.getLogger(name)
    logger.warning("QUIET %s", name); logger.error("LOUD %s", name)
late = logging.getLogger("DeepSpeed"); late.setLevel(logging.INFO); late.info("QUIET again")
warnings.warn_explicit("QUIET", UserWarning, "x.py", 1, module="torch.nn")
warnings.warn_explicit("LOUD mine", UserWarning, "x.py", 1, module="finetune.run")
silence_libraries(False, 1)
warnings.warn_explicit("QUIET on rank 1", UserWarning, "y.py", 1, module="finetune.run")
logging.getLogger("finetune").error("LOUD project")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "QUIET" not in said
    assert all(
        f"LOUD {who}" in said
        for who in ("DeepSpeed", "transformers.modeling_utils", "mine", "project")
    )


def test_verbose_changes_nothing():
    before = [logging.getLogger(name).level for name in NOISY], list(warnings.filters)
    display_module.silence_libraries(True, 3)
    assert ([logging.getLogger(name).level for name in NOISY], list(warnings.filters)) == before


def test_memory_of_this_process():
    # Mapped, so that no memory freed before is reused; touched, because pages that were only reserved are not resident.
    before = host_bytes()
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * len(block))
        assert host_bytes() - before > 48 << 20
        assert peak_host_bytes() >= host_bytes() - (1 << 20)
    assert gpu_bytes() >= 0


def test_a_live_display_goes_on_while_libraries_are_hushed(monkeypatch):
    """As while DeepSpeed compiles: its prints go nowhere, the spinner stays."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console = Console(force_terminal=True, highlight=False)
    with Display(console).phase("compiling an op") as phase:
        shown = len(out.getvalue())
        with hushed():
            print("[2/3] c++ -O3")
            phase.bar.refresh()
        assert len(out.getvalue()) > shown
    assert "c++" not in out.getvalue() and "compiling an op: done" in out.getvalue()
    print("heard again", file=sys.stdout)
    assert out.getvalue().endswith("heard again\n")
