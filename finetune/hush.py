"""What libraries print goes nowhere, while a live display goes on."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


class _Nowhere(io.StringIO):
    """rich looks for the terminal behind whatever stands in for stdout, under this name."""

    def __init__(self):
        super().__init__()
        self.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)


@contextmanager
def hushed() -> Iterator[None]:
    """Drop what is printed inside by `print`; DeepSpeed tells from every rank what it builds."""
    with redirect_stdout(_Nowhere()):
        yield
