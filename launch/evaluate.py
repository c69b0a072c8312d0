"""Evaluate a run or an export: `deepspeed launch/evaluate.py run=RUN` or `model=EXPORT data.eval=FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.cli.app import main

    sys.exit(main("evaluate"))
