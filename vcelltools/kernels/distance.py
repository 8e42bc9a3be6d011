"""Distances between effect profiles."""

from __future__ import annotations

from vcelltools.kernels._jit import kernel


@kernel()
def effect_distances(a_pg, b_qg, skip_p, p0, p1, l1_pq, squared_pq):  # pragma: no cover  compiled
    """Sum of absolute and of squared differences between every row of ``a`` and of ``b``, in float64.

    Parameters
    ----------
    a_pg, b_qg
        Effects of one float type.
    skip_p
        (p,) the column left out for each row of ``a``, or -1.
    p0, p1
        The rows of ``a`` to do.
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
                d = float(a[g]) - float(b[g])
                l1 += abs(d)
                l2 += d * d
            for g in range(s + 1, n_genes):
                d = float(a[g]) - float(b[g])
                l1 += abs(d)
                l2 += d * d
            l1_pq[p, q] = l1
            squared_pq[p, q] = l2
