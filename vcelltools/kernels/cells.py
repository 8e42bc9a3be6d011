"""Read single cells from compressed rows into dense rows, in the order of a gene list."""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, OK


@kernel()
def spread_cells(starts, stops, indices, data, position, factor, logarithm, out, to, first, last):
    """Write ``f(count × factor)`` of the cells ``first .. last - 1`` as dense rows; f is the identity or log1p.

    Parameters
    ----------
    starts, stops
        (c,) int64: the range of each cell's values in ``indices`` and ``data``.
    position
        (g,) int32: column in ``out`` of each stored gene, or -1.
    factor
        (c,) float64.
    out
        (n, w) float32. A row is cleared just before its values are added, while it is in the processor's cache.
    to
        (c,) int64: the row of ``out`` of each cell.

    Returns
    -------
    ``OK`` or ``BAD_INDEX``.
    """
    g = len(position)
    for i in range(first, last):
        f, row = factor[i], out[to[i]]
        row[:] = 0
        for j in range(starts[i], stops[i]):
            c = np.int64(indices[j])
            if c < 0 or c >= g:
                return BAD_INDEX
            at = position[c]
            if at >= 0:
                x = data[j] * f
                if logarithm:
                    x = math.log1p(x)
                row[at] += np.float32(x)
    return OK


@kernel()
def spread_dense(block, rows, position, factor, logarithm, out, to):
    """Write ``f(count × factor)`` of some rows of a dense block as rows of ``out``; f is the identity or log1p.

    Parameters
    ----------
    block
        (b, g) stored values.
    rows, to
        (c,) int64: the rows of ``block``, and those of ``out`` that they go to.
    position
        (g,) int32: column of ``out`` of each stored gene, -1 for none.
    factor
        (c,) float64.
    out
        (n, w) float32; columns that no stored gene goes to are 0.
    """
    for i in range(len(rows)):
        f, row = factor[i], out[to[i]]
        row[:] = 0
        for c in range(block.shape[1]):
            x = block[rows[i], c]
            at = position[c]
            if x != 0 and at >= 0:
                v = x * f
                row[at] = np.float32(math.log1p(v) if logarithm else v)
