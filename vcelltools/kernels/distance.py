"""Distances between effect profiles."""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def effect_distances(a_pg, b_qg, skip_p, p0, p1, l1_pq, squared_pq):
    """Compute sums of absolute and squared differences between all rows of ``a`` and ``b``, in float64.

    Parameters
    ----------
    a_pg, b_qg
        Effects of one float type.
    skip_p
        (p,) the column to exclude for each row of ``a``, or -1.
    p0, p1
        The range of rows of ``a`` to process.
    l1_pq, squared_pq
        Outputs.
    """
    n_genes = a_pg.shape[1]
    for p in range(p0, p1):
        a = a_pg[p]
        for q in range(b_qg.shape[0]):
            b = b_qg[q]
            s = skip_p[p] if skip_p[p] >= 0 else n_genes
            l1 = 0.0
            l2 = 0.0
            for g in range(s):
                d = np.float64(a[g]) - np.float64(b[g])
                l1 += abs(d)
                l2 += d * d
            for g in range(s + 1, n_genes):
                d = np.float64(a[g]) - np.float64(b[g])
                l1 += abs(d)
                l2 += d * d
            l1_pq[p, q] = l1
            squared_pq[p, q] = l2


@kernel()
def add_columns(indices, data, sum_g):
    """Add the values of a CSR matrix, whose indices were checked, to the float64 sums of their columns."""
    for j in range(len(indices)):
        sum_g[np.uint64(indices[j])] += np.float64(data[j])


@kernel()
def csr_fill_rows(indptr, indices, data, rows, centre_g, out):
    """Write ``rows`` of a CSR matrix minus ``centre_g`` to ``out`` (len(rows), g); duplicate entries are summed."""
    for i in range(len(rows)):
        row = out[i]
        for g in range(len(row)):
            row[g] = -centre_g[g]
        for j in range(indptr[rows[i]], indptr[rows[i] + 1]):
            row[np.uint64(indices[np.uint64(j)])] += data[np.uint64(j)]


@kernel()
def sum_distances(dot, a2, b2, own, near, out_a):
    """Sum the Euclidean distances of each row from products and squared lengths; return the number of close pairs.

    Parameters
    ----------
    dot
        (a, b) products a·b.
    a2, b2
        float64 squared lengths.
    own
        If both are the same rows, the position in b of the first row of a, because the distance of a row to itself is
        0; otherwise -1.
    near
        A pair is close if |a − b|² < near · (|a|² + |b|²), so that the subtraction loses precision.
    out_a
        (a,) output.
    """
    close = 0
    for i in range(dot.shape[0]):
        t0, t1, t2, t3 = 0.0, 0.0, 0.0, 0.0
        row, m = dot[i], dot.shape[1]
        for j in range(0, m - 3, 4):
            s0, s1, s2, s3 = a2[i] + b2[j], a2[i] + b2[j + 1], a2[i] + b2[j + 2], a2[i] + b2[j + 3]
            d0 = s0 - 2.0 * row[j]
            d1 = s1 - 2.0 * row[j + 1]
            d2 = s2 - 2.0 * row[j + 2]
            d3 = s3 - 2.0 * row[j + 3]
            close += (d0 < near * s0) + (d1 < near * s1) + (d2 < near * s2) + (d3 < near * s3)
            t0 += math.sqrt(max(d0, 0.0))
            t1 += math.sqrt(max(d1, 0.0))
            t2 += math.sqrt(max(d2, 0.0))
            t3 += math.sqrt(max(d3, 0.0))
        for j in range(m // 4 * 4, m):
            d = a2[i] + b2[j] - 2.0 * row[j]
            close += d < near * (a2[i] + b2[j])
            t0 += math.sqrt(max(d, 0.0))
        if own >= 0:
            d = a2[i] + b2[own + i] - 2.0 * row[own + i]
            close -= d < near * (a2[i] + b2[own + i])
            t0 -= math.sqrt(max(d, 0.0))
        out_a[i] = (t0 + t1) + (t2 + t3)
    return close
