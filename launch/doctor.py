"""What of this machine is ready: `python launch/doctor.py [--json]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from finetune.doctor import main

    sys.exit(main())
