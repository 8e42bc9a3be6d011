"""Correlate the predicted change of a cell with the directions to its neighbours."""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def correlate_steps(x_ng, delta_ng, neighbors_nk, start, stop, out_nk):
    """Fill rows ``start:stop`` with the Pearson correlation over genes of ``delta_i`` and ``x_j - x_i``.

    The correlation is 1 if one of them is constant.

    Parameters
    ----------
    x_ng, delta_ng
        (n, g) expression and its change.
    neighbors_nk
        (n, k) rows of the neighbours.
    """
    g = x_ng.shape[1]
    step = np.empty(g)
    for i in range(start, stop):
        d = delta_ng[i]
        mean_d = 0.0
        for v in range(g):
            mean_d += d[v]
        mean_d /= g
        square_d = 0.0
        for v in range(g):
            square_d += (d[v] - mean_d) ** 2
        for a in range(neighbors_nk.shape[1]):
            x = x_ng[neighbors_nk[i, a]]
            mean = 0.0
            for v in range(g):
                step[v] = x[v] - x_ng[i, v]
                mean += step[v]
            mean /= g
            square, both = 0.0, 0.0
            for v in range(g):
                s = step[v] - mean
                square += s * s
                both += s * (d[v] - mean_d)
            if square <= 0.0 or square_d <= 0.0:
                out_nk[i, a] = 1.0
            else:
                out_nk[i, a] = both / math.sqrt(square * square_d)
