"""Layout of a quantised linear weight in bytes, for the loader and the planner.

One frozen parameter holds all that a weight (rows, columns) needs, one section after another:

    int8   codes, one byte a value | scales, fp32, one a row
    nf4    codes, two values a byte | scales, fp32, one for each 64 values
    nf4, scales quantised too:
           codes | scales, one byte each | scales of 256 scales, fp32 | their offset, fp32
"""

from __future__ import annotations

from math import ceil

from finetune.config import Quantize

BLOCK = 64
"""Values of an nf4 weight that share a scale (bitsandbytes' default)."""
SCALE_BLOCK = 256
"""Scales that share one, if they are quantised too (fixed in bitsandbytes)."""
ALIGNMENT = 4
"""Every section begins at a multiple of this many bytes, which fp32 numbers need."""

Section = tuple[str, int, int]
"""Name, first byte, bytes."""


def sections(quantize: Quantize, double: bool, rows: int, columns: int) -> list[Section]:
    """Return the sections of a weight (rows, columns).

    Args:
        quantize: int8 or nf4.
        double: quantise the scales of nf4 too.
    """
    values = rows * columns
    scales = ceil(values / BLOCK)
    if quantize is Quantize.int8:
        sizes = {"codes": values, "scales": 4 * rows}
    elif double:
        outer = ceil(scales / SCALE_BLOCK)
        sizes = {"codes": ceil(values / 2), "scales": scales, "outer": 4 * outer, "offset": 4}
    else:
        sizes = {"codes": ceil(values / 2), "scales": 4 * scales}
    layout, start = [], 0
    for name, size in sizes.items():
        layout.append((name, start, size))
        start += ceil(size / ALIGNMENT) * ALIGNMENT
    return layout


def packed_bytes(quantize: Quantize, double: bool, rows: int, columns: int) -> int:
    """Return the bytes of the parameter, a multiple of `ALIGNMENT`."""
    _, start, size = sections(quantize, double, rows, columns)[-1]
    return start + ceil(size / ALIGNMENT) * ALIGNMENT
