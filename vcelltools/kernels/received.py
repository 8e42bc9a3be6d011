"""Gaussian sums over cells: the weights of the exact sum, and the spreading and gathering of the gridded one.

The exact sum is ``W[i, l] = sum_j exp(-d_ij^2 / 2 r^2) x[j, l]``. The gridded one spreads every sender with a narrow
Gaussian on a mesh, convolves the mesh with a Gaussian (the caller's FFT), and gathers with the same narrow Gaussian.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

LOWEST = -700.0  # exp of this is 1e-304; smaller values count as 0


@kernel(inline=True)
def _exp(x):
    """Return exp(x) for ``LOWEST <= x <= 0``, accurate to 2 units in the last place, in a form that vectorises.

    Cody-Waite reduction by multiples of log 2 and the Taylor polynomial of degree 13 on ±log(2)/2.
    """
    k = math.floor(x * 1.4426950408889634 + 0.5)
    r = x - k * 6.93147180369123816490e-01
    r = r - k * 1.90821492927058770002e-10
    p = 1 / 6227020800.0
    p = p * r + 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    bits = np.int64((np.int64(k) + np.int64(1023)) << np.int64(52))
    return p * np.int64(bits).view(np.float64)


@kernel()
def fill_weights(at_db, from_dm, radius, out_bm):
    """Fill ``out[i, j] = exp(-|at_i - from_j|^2 / 2 radius^2)``, at 1.5 ns per pair.

    Parameters
    ----------
    at_db, from_dm
        (d, b) and (d, m) float64 coordinates of receivers and senders; d is 2 or 3.
    radius
        Above 0.
    out_bm
        (b, m) float64, filled.
    """
    c = -0.5 / (radius * radius)
    m = from_dm.shape[1]
    solid = at_db.shape[0] == 3
    x, y = from_dm[0], from_dm[1]
    z = from_dm[at_db.shape[0] - 1]
    for i in range(at_db.shape[1]):
        px, py = at_db[0, i], at_db[1, i]
        row = out_bm[i]
        if solid:
            pz = at_db[2, i]
            for j in range(m):
                dx, dy, dz = x[j] - px, y[j] - py, z[j] - pz
                row[j] = max(c * (dx * dx + dy * dy + dz * dz), LOWEST)
        else:
            for j in range(m):
                dx, dy = x[j] - px, y[j] - py
                row[j] = max(c * (dx * dx + dy * dy), LOWEST)
        for j in range(m):
            v = row[j]
            row[j] = _exp(v) if v > LOWEST else 0.0


@kernel()
def fill_windows(at_n, origin, step, width, first_n, weights_nk):
    """Fill the window of every cell on one axis of the mesh: its first node, and a Gaussian at its ``k`` nearest nodes.

    ``first[i]`` is the first node, and ``weights[i, t] = exp(-(x_i - node_t)^2 / 2 width^2)``.
    """
    k = weights_nk.shape[1]
    for i in range(at_n.shape[0]):
        u = (at_n[i] - origin) / step
        low = np.int64(math.floor(u)) - (k // 2 - 1)
        first_n[i] = low
        for t in range(k):
            d = (u - low - t) * step / width
            weights_nk[i, t] = math.exp(-0.5 * d * d)


@kernel()
def spread(first_y_n, first_x_n, weights_y_nk, weights_x_nk, values_n, grid_yx):
    """Add the value of every cell to the mesh: ``grid[y, x] += wy * wx * value``. The mesh is not cleared.

    Cells with a value of 0 cost nothing. The caller pads the mesh so that every window lies inside it.
    """
    k = weights_y_nk.shape[1]
    for i in range(values_n.shape[0]):
        v = values_n[i]
        if v == 0.0:
            continue
        y0, x0 = first_y_n[i], first_x_n[i]
        wx = weights_x_nk[i]
        for a in range(k):
            row = grid_yx[y0 + a, x0 : x0 + k]
            w = v * weights_y_nk[i, a]
            for b in range(k):
                row[b] += w * wx[b]


@kernel()
def gather(first_y_n, first_x_n, weights_y_nk, weights_x_nk, grid_yx, out_n):
    """Read the mesh at every cell: ``out = sum wy * wx * grid[y, x]``."""
    k = weights_y_nk.shape[1]
    sums = np.empty(k)
    for i in range(out_n.shape[0]):
        y0, x0 = first_y_n[i], first_x_n[i]
        sums[:] = 0.0
        for a in range(k):
            row = grid_yx[y0 + a, x0 : x0 + k]
            w = weights_y_nk[i, a]
            for b in range(k):
                sums[b] += w * row[b]
        total = 0.0
        for b in range(k):
            total += sums[b] * weights_x_nk[i, b]
        out_n[i] = total
