"""Write the page of a run, or one that compares runs: `python launch/report.py run=A [run=B ...] [out=FILE]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.cli.app import main

    sys.exit(main("report"))
