"""Sort uint64 keys by some of their bits; shared by the kernels that rank.

Keys hold the value to sort by in their high bits and a payload in the low ones. All sorts are stable.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

DIGIT = 11
"""Maximum number of bits per pass."""
RADIX = 1 << DIGIT
"""Number of bins of the scratch array ``hist``."""
SHORT = 48
"""Runs of up to this many keys are sorted by insertion."""
ALL_BITS = np.uint64(0xFFFFFFFFFFFFFFFF)


@kernel(inline=True)
def insert_sort(keys, lo, hi, mask):
    """Sort ``keys[lo:hi]`` by the bits in ``mask``, by insertion."""
    for i in range(lo + 1, hi):
        x = keys[i]
        key = x & mask
        j = i - 1
        while j >= lo and (keys[j] & mask) > key:
            keys[j + 1] = keys[j]
            j -= 1
        keys[j + 1] = x


@kernel()
def radix_pass(src, lo, hi, shift, width, hist, dst):
    """Distribute ``src[lo:hi]`` over ``dst[lo:hi]`` by ``width`` bits from ``shift`` up, in order."""
    digit = np.uint64((1 << width) - 1)
    by = np.uint64(shift)
    hist[: 1 << width] = 0
    for i in range(lo, hi):
        hist[(src[np.uint64(i)] >> by) & digit] += 1
    total = lo
    for b in range(1 << width):
        c = hist[b]
        hist[b] = total
        total += c
    for i in range(lo, hi):
        x = src[np.uint64(i)]
        b = (x >> by) & digit
        to = hist[b]
        hist[b] = to + 1
        dst[np.uint64(to)] = x


@kernel()
def radix_sort(keys, lo, hi, low, top, hist, other):
    """Sort ``keys[lo:hi]`` by the bits ``low .. top - 1``; ``other`` is scratch of the same length."""
    moved = False
    while low < top:
        width = min(DIGIT, top - low)
        radix_pass(keys, lo, hi, low, width, hist, other)
        keys, other = other, keys
        moved = not moved
        low += width
    if moved:
        for j in range(lo, hi):
            other[j] = keys[j]
