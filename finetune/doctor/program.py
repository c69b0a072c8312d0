"""`launch/doctor.py` as a program of k=v words."""

from __future__ import annotations

from finetune.app import Composed
from finetune.doctor.run import main


def run(composed: Composed) -> int:
    """Look at everything; exit code 1 when something must be mended first."""
    return main(json_only=composed.config.json)
