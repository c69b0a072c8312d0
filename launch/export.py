"""Write a verified export: `python launch/export.py run=RUN kind=adapter|merged|full|phi|phi_adapter|gguf`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.cli.app import main

    sys.exit(main("export"))
