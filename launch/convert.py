"""Convert a checkpoint: `python launch/convert.py source=DIR target=DIR [dtype=bf16] [to=hf|jax]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.cli.app import main

    sys.exit(main("convert"))
