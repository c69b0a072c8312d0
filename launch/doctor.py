"""Check whether this machine is ready: `python launch/doctor.py [--json]`. Works before anything is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    words = ["json=true" if word == "--json" else word for word in sys.argv[1:]]
    try:
        from finetune.cli.app import main
    except ImportError:  # a missing package is among the findings
        from finetune.cli.doctor import main as examine

        sys.exit(examine(json_only="json=true" in words))
    sys.exit(main("doctor", words))
