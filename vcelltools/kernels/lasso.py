"""Sparse-group lasso by coordinate descent on a Gram matrix, until an optimality certificate is reached.

The problem is ``min_w 1/2 w'Gw - c'w + l1 |w|_1 + sum_g lambda_g |w_g|_2`` with ``G = X'X/n``, ``c = X'y/n``.

Method: Friedman, Hastie & Tibshirani 2010 (arXiv:1001.0736), on cached inner products. A group at zero moves along
the soft-thresholded gradient, with an exact line search; inside a group the one-dimensional problem is solved by a
Newton iteration that increases monotonically to its root.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

_STEPS = 60  # limit of Newton iterations; three to six are usual


@kernel()
def _find_root(a, b, lam, s):
    """Return the root u > 0 of ``a u + lam u / sqrt(u^2 + s^2) = b`` for b > 0, s > 0."""
    u = b / (a + lam / s)
    for _ in range(_STEPS):
        q = math.sqrt(u * u + s * s)
        h = a * u + lam * u / q - b
        if h >= -1e-15 * b:
            break
        new = u - h / (a + lam * s * s / (q * q * q))
        if new <= u:
            break
        u = new
    return u


@kernel()
def _measure(w, r, starts, l1, lam_g):
    """Return the largest violation of the optimality conditions, given the gradient ``r = c - Gw``."""
    worst = 0.0
    for g in range(lam_g.shape[0]):
        a, b = starts[g], starts[g + 1]
        norm = 0.0
        for j in range(a, b):
            norm += w[j] * w[j]
        norm = math.sqrt(norm)
        if norm == 0.0:
            z = 0.0
            for j in range(a, b):
                t = max(abs(r[j]) - l1, 0.0)
                z = z + t * t if lam_g[g] > 0.0 else max(z, t)
            v = max(math.sqrt(z) - lam_g[g], 0.0) if lam_g[g] > 0.0 else z
            worst = max(worst, v)
            continue
        for j in range(a, b):
            if w[j] == 0.0:
                v = max(abs(r[j]) - l1, 0.0)
            else:
                v = abs(r[j] - math.copysign(l1, w[j]) - lam_g[g] * w[j] / norm)
            worst = max(worst, v)
    return worst


@kernel()
def _leave_zero(gram, w, r, a, b, l1, lam):
    """Move a group off zero if zero is not its minimum; return whether it moved."""
    norm = 0.0
    for j in range(a, b):
        t = max(abs(r[j]) - l1, 0.0)
        norm += t * t
    norm = math.sqrt(norm)
    if norm <= lam * (1.0 + 1e-13):
        return False
    curve = 0.0
    for j in range(a, b):
        u = max(abs(r[j]) - l1, 0.0)
        if u > 0.0:
            u = math.copysign(u, r[j])
            row = gram[j]
            for k in range(a, b):
                v = max(abs(r[k]) - l1, 0.0)
                if v > 0.0:
                    curve += u * math.copysign(v, r[k]) * row[k]
    if curve <= 0.0:
        return False
    step = (norm * norm - lam * norm) / curve
    for j in range(a, b):
        u = max(abs(r[j]) - l1, 0.0)
        w[j] = math.copysign(step * u, r[j]) if u > 0.0 else 0.0
    return True


@kernel()
def _zero_is_best(gram, w, r, a, b, l1, lam):
    """Return whether zero is the minimum of the group, given the other groups."""
    total = 0.0
    for j in range(a, b):
        row = gram[j]
        z = r[j]
        for k in range(a, b):
            if w[k] != 0.0:
                z += row[k] * w[k]
        t = max(abs(z) - l1, 0.0)
        total += t * t
        if total > lam * lam:
            return False
    return True


@kernel()
def _set_gradient(gram, c, w, r):
    """Set ``r = c - Gw`` afresh."""
    m = c.shape[0]
    for j in range(m):
        r[j] = c[j]
    for k in range(m):
        if w[k] != 0.0:
            row = gram[k]
            wk = w[k]
            for j in range(m):
                r[j] -= wk * row[j]


@kernel()
def _visit(gram, w, r, j, square, l1, lam):
    """Minimise over one coordinate; ``square`` is the squared norm of its group. Return the new square."""
    row = gram[j]
    a, old = row[j], w[j]
    if a <= 0.0:
        return square
    rest = max(square - old * old, 0.0)
    b = r[j] + a * old
    size = abs(b) - l1
    if size <= 0.0:
        new = 0.0
    elif lam == 0.0:
        new = size / a
    elif rest > 1e-300:
        new = _find_root(a, size, lam, math.sqrt(rest))
    else:
        new = max(size - lam, 0.0) / a
    if new > 0.0:
        new = math.copysign(new, b)
    d = new - old
    if d != 0.0:
        w[j] = new
        for k in range(r.shape[0]):
            r[k] -= d * row[k]
    return rest + new * new


@kernel()
def solve_lasso(gram, c, starts, l1, lam_g, w, target, max_sweeps):
    """Run descent from the warm start ``w`` until the certificate is at most ``target``; return (certificate, sweeps).

    Parameters
    ----------
    gram, c
        (m, m) and (m,) float64: inner products of the columns, group by group, divided by the number of cells.
    starts
        (g + 1,) int64: the start of each group among the columns.
    l1, lam_g
        The penalty on coefficients, and (g,) the penalties on the norms of the groups.
    w
        (m,) float64: the start, overwritten with the solution.
    target
        Largest violation of the optimality conditions at which to stop.
    max_sweeps
        Maximum number of full sweeps; the certificate shows whether it was sufficient.
    """
    m = c.shape[0]
    r = np.empty(m)
    _set_gradient(gram, c, w, r)
    sweeps = 0
    certificate = _measure(w, r, starts, l1, lam_g)
    while certificate > target and sweeps < max_sweeps:
        sweeps += 1
        for g in range(lam_g.shape[0]):
            a, b = starts[g], starts[g + 1]
            lam = lam_g[g]
            square = 0.0
            for j in range(a, b):
                square += w[j] * w[j]
            if lam > 0.0:
                if square == 0.0:
                    if not _leave_zero(gram, w, r, a, b, l1, lam):
                        continue
                    _set_gradient(gram, c, w, r)
                elif _zero_is_best(gram, w, r, a, b, l1, lam):
                    for j in range(a, b):
                        w[j] = 0.0
                    _set_gradient(gram, c, w, r)
                    continue
                square = 0.0
                for j in range(a, b):
                    square += w[j] * w[j]
            for j in range(a, b):
                square = _visit(gram, w, r, j, square, l1, lam)
        for _ in range(3):  # sweep over the non-zero coefficients until they converge
            moved = 0.0
            for g in range(lam_g.shape[0]):
                a, b = starts[g], starts[g + 1]
                square = 0.0
                for j in range(a, b):
                    square += w[j] * w[j]
                if square == 0.0:
                    continue
                for j in range(a, b):
                    if w[j] != 0.0:
                        old = w[j]
                        square = _visit(gram, w, r, j, square, l1, lam_g[g])
                        moved = max(moved, abs(w[j] - old) * gram[j, j])
            if moved <= 0.1 * target:
                break
        _set_gradient(gram, c, w, r)
        certificate = _measure(w, r, starts, l1, lam_g)
    return certificate, sweeps
