"""How long a CPU thread without work spins before it sleeps; to be settled before torch is imported.

GNU's OpenMP spins for 300,000 rounds, about a millisecond. Where another program wants a core, the thread that all wait
for is the one that waits for a core, and those that spin keep it from getting one. 1000 rounds cost nothing on an idle
machine and nearly double the speed on a shared one (docs/performance.md).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

ROUNDS = "1000"


def spin_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Unless the environment says how threads are to wait."""
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", ROUNDS)
