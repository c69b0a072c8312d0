"""The sweep's parent over jobs that need no torch: python -m tests.sweep.parent -m k=v ..."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.cli.train import run_sweep
from finetune.sweep import pool


def one_process(self) -> list[str]:
    """No launcher: the script itself, as DeepSpeed's launcher would start its only rank."""
    return [sys.executable, "-u"]


if __name__ == "__main__":
    pool.Place.command = one_process
    sys.exit(run_sweep(sys.argv[1:], Path(__file__).with_name("job_script.py")))
