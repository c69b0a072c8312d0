"""Named points where a test can kill, stop or break this process.

Without an order a point costs one comparison.

    FINETUNE_FAULT="kill save.manifest rank=0 nth=2" deepspeed launch/train.py ...

An order is ACTION POINT [rank=R] [nth=N]; several are joined by `;`. Actions: kill (SIGKILL),
nospace (OSError ENOSPC), fail (RuntimeError), stop (never returns), term (SIGTERM to itself).
Points are the first arguments of `point` in the sources. Used by tests/faults and bench/soak.py; no
program arms anything by itself.
"""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "FINETUNE_FAULT"


class Order:
    """A fault to trigger at a named point.

    Args:
        text: ACTION POINT [rank=R] [nth=N].
    """

    def __init__(self, text: str):
        self.action, self.name, *rest = text.split()
        values = dict(word.split("=") for word in rest)
        self.rank, self.left = values.get("rank"), int(values.get("nth", 1))


_orders: list[Order] = []


def arm(text: str) -> None:
    """Replace all orders by those of `text`."""
    _orders[:] = [Order(part) for part in text.split(";") if part.strip()]


def point(name: str) -> None:
    """Mark a point in the code where a fault can be triggered."""
    for order in _orders:
        if name != order.name or order.rank not in (None, os.environ.get("RANK", "0")):
            continue
        order.left -= 1
        if order.left:
            continue
        match order.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "term":
                os.kill(os.getpid(), signal.SIGTERM)
            case "nospace":
                raise OSError(errno.ENOSPC, "No space left on device (injected)")
            case "stop":
                while True:
                    time.sleep(60)
            case _:
                raise RuntimeError(f"injected at {name}")


arm(os.environ.get(VARIABLE, ""))
