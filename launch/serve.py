"""Serve an export to OpenAI-compatible clients: `python launch/serve.py model=EXPORT [port=8000]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.cli.app import main

    sys.exit(main("serve"))
