"""Convert counts to tokens by binning."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import NEGATIVE, NOT_WHOLE, OK, TOO_LARGE


@kernel()
def count_edges(counts, edges, most, out, where):
    """Write the number of ``edges`` at or below each count; return ``OK``, or the fault at ``where[0]``.

    Parameters
    ----------
    counts
        (n,) numbers of any type.
    edges
        (k,) int64, sorted.
    most
        Largest count with a token, or -1 for no limit; larger counts are a fault.
    out
        (n,) int32 output.
    where
        (1,) int64 output.
    """
    k = len(edges)
    for i in range(len(counts)):
        x = counts[i]
        if not x >= 0:
            where[0] = i
            return NEGATIVE
        v = np.int64(x)
        if v != x:
            where[0] = i
            return NOT_WHOLE
        if most >= 0 and v > most:
            where[0] = i
            return TOO_LARGE
        low = 0
        high = k
        while low < high:
            middle = (low + high) // 2
            if edges[middle] <= v:
                low = middle + 1
            else:
                high = middle
        out[i] = low
    return OK


@kernel()
def encode_loglinear(counts, out, where):
    """Write the token of each count: itself below 16, otherwise 16 + 4 (e − 4) + the two bits after its leading one.

    e is ⌊log2⌋ of the count; counts beyond 65,535 have token 63.
    """
    for i in range(len(counts)):
        x = counts[i]
        if not x >= 0:
            where[0] = i
            return NEGATIVE
        if x > 65535:
            out[i] = 63
            continue
        v = np.int64(x)
        if v != x:
            where[0] = i
            return NOT_WHOLE
        if v < 16:
            out[i] = v
            continue
        e = 4
        while v >> (e + 1):
            e += 1
        out[i] = 16 + 4 * (e - 4) + ((v >> (e - 2)) & 3)
    return OK
