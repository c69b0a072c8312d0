"""Tell whether a run fits: `python launch/plan.py recipe=R [k=v ...]`. No GPU, no weights, no torch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.cli.app import main

    sys.exit(main("plan"))
