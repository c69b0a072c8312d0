"""Early detection of trouble in a run: losses that jump and steps that never end.

`spike` judges the losses that the trainer passes to it; `HangWatch` is a thread with a clock.
Neither touches the model.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

SPIKE_WINDOW, SPIKE_LEAST = 32, 16
SPIKE_WIDTHS, SPIKE_FLOOR = 6.0, 0.02
POLL_SECONDS = 1.0
OTHERS_SECONDS = 5.0
"""Wait of a rank after its dump, so that the others, which began the step a little later, dump theirs."""
STUCK_SECONDS = 30.0
"""After the timeout, for a thread that never lets Python run: then the C-level timer dumps and ends."""


def spike(recent: list[float], loss: float) -> bool:
    """Tell whether `loss` is a spike compared with the recent losses, and append it to them.

    A spike is more than six widths above the median. The width is the median absolute deviation
    scaled to a standard deviation, and at least 2% of the median. The first 16 losses are never
    spikes.
    """
    out = False
    if len(recent) >= SPIKE_LEAST:
        middle = statistics.median(recent)
        width = 1.4826 * statistics.median(abs(value - middle) for value in recent)
        out = loss > middle + SPIKE_WIDTHS * max(width, SPIKE_FLOOR * abs(middle))
    recent.append(loss)
    del recent[:-SPIKE_WINDOW]
    return out


class HangWatch:
    """Watchdog that ends this process if `beat` is not called for `timeout` seconds; 0: never.

    Every rank has one, and ranks wait for each other, so all ranks dump their stacks. The dump goes
    to run_dir/stacks-rank-00000.txt (the file name has the rank's number) and to stderr.

    Args:
        on_hang: (text) -> None, called before the process ends with exit code 1.
    """

    def __init__(self, timeout: float, run_dir: Path, rank: int, on_hang: Callable[[str], None]):
        self.timeout, self.on_hang = timeout, on_hang
        self.file = run_dir / f"stacks-rank-{rank:05d}.txt"
        self._last = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> HangWatch:
        if self.timeout > 0:
            self._out = self.file.open("w", encoding="utf-8")
            self.beat()
            self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self.timeout > 0:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join(POLL_SECONDS)
            self._out.close()
            self.file.unlink(missing_ok=True)

    def beat(self) -> None:
        """Report progress: restart the countdown."""
        self._last = time.monotonic()
        if self.timeout > 0 and not self._closed.is_set():
            faulthandler.dump_traceback_later(
                self.timeout + STUCK_SECONDS, exit=True, file=self._out
            )

    def _watch(self) -> None:
        while time.monotonic() - self._last <= self.timeout:
            if self._closed.wait(min(POLL_SECONDS, self.timeout / 4)):
                return
        text = (
            f"no step for {self.timeout:g} seconds (train.hang_timeout); what every thread was "
            f"doing: {self.file}"
        )
        faulthandler.dump_traceback(self._out, all_threads=True)
        self._out.flush()
        stacks = self.file.read_text(encoding="utf-8", errors="replace")
        print(f"{text}\n{stacks}", file=sys.stderr, flush=True)
        time.sleep(OTHERS_SECONDS)
        try:
            self.on_hang(text)
        finally:
            os._exit(1)
