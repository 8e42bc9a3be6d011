"""Bilinear models of expression and received ligands: derivatives, and propagation of changes.

The features of a model have three kinds: 0, a gene; 1, a received ligand times a receptor; 2, a received ligand times a
TF. ``a`` and ``b`` are the genes of a feature (``b`` is not used for kind 0), and ``ligand`` is its column of ``W``.

Cells that share coefficients are processed in blocks, transposed, so that every feature is a loop over cells that
vectorises; cells with individual coefficients are processed one by one.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

BLOCK = 64  # cells per block, so that three tables of a few hundred genes stay in the L2 cache


@kernel()
def splash_cells(kind, a, b, ligand, beta_rm, row_n, x_nk, w_nl, scale, tiny, cap, out_nk):
    """Fill (n, k) derivatives of one target by gene, summed over features and then clamped.

    Parameters
    ----------
    kind, a, b, ligand
        (m,) the features; genes are columns of ``x`` and ``out``.
    beta_rm, row_n
        (r, m) coefficients, and (n,) the row of each cell.
    x_nk, w_nl
        (n, k) expression and (n, l) received ligands.
    scale, tiny, cap
        Factor of the paired features; threshold up to which expression counts as 0; the clamp (infinity for none).
    """
    m = kind.shape[0]
    for i in range(x_nk.shape[0]):
        out, x, w, beta = out_nk[i], x_nk[i], w_nl[i], beta_rm[row_n[i]]
        out[:] = 0.0
        for f in range(m):
            v = beta[f]
            if v == 0.0:
                continue
            if kind[f] == 0:
                out[a[f]] += v
                continue
            v *= scale
            if kind[f] == 2 or x[b[f]] > tiny:
                out[b[f]] += v * w[ligand[f]]
            out[a[f]] += v * x[b[f]]
        if cap < np.inf:
            for g in range(out.shape[0]):
                out[g] = min(max(out[g], -cap), cap)


@kernel()
def _sort_terms(kind, a, b, ligand, beta, scale, n_genes, indptr, source, value, gated):
    """Write the terms of every derivative, gene by gene.

    ``source`` is a gene, ``n_genes`` + a received ligand, or -1 for a constant. ``gated`` terms count only in cells
    that express the gene.
    """
    indptr[:] = 0
    for f in range(kind.shape[0]):
        if beta[f] != 0.0:
            indptr[a[f] + 1] += 1
            if kind[f] != 0:
                indptr[b[f] + 1] += 1
    for g in range(n_genes):
        indptr[g + 1] += indptr[g]
    at = indptr[:-1].copy()
    for f in range(kind.shape[0]):
        if beta[f] == 0.0:
            continue
        e = at[a[f]]
        at[a[f]] += 1
        source[e], value[e], gated[e] = -1 if kind[f] == 0 else b[f], beta[f] * (1.0 if kind[f] == 0 else scale), 0
        if kind[f] != 0:
            e = at[b[f]]
            at[b[f]] += 1
            source[e], value[e], gated[e] = n_genes + ligand[f], beta[f] * scale, kind[f] == 1


@kernel()
def splash_rows(kind, a, b, ligand, beta_m, rows, x_nk, w_nl, scale, tiny, cap, out_nk):
    """Fill the derivatives of the cells ``rows``, which share the coefficients ``beta``; see :func:`splash_cells`.

    Every derivative is a sum of a few rows of a table of the block's expression and received ligands.
    """
    k, n_ligands, m = x_nk.shape[1], w_nl.shape[1], kind.shape[0]
    indptr = np.empty(k + 1, np.int64)
    source, value, gated = np.empty(2 * m, np.int64), np.empty(2 * m), np.empty(2 * m, np.bool_)
    _sort_terms(kind, a, b, ligand, beta_m, scale, k, indptr, source, value, gated)
    table, out = np.zeros((k + n_ligands, BLOCK + 8)), np.empty((k, BLOCK + 8))  # no power of two: lines of the cache
    total = np.empty(BLOCK)
    for at in range(0, rows.shape[0], BLOCK):
        size = min(BLOCK, rows.shape[0] - at)
        for c in range(size):
            r = rows[at + c]
            for g in range(k):
                table[g, c] = x_nk[r, g]
            for g in range(n_ligands):
                table[k + g, c] = w_nl[r, g]
        for g in range(k):
            total[:] = 0.0
            for e in range(indptr[g], indptr[g + 1]):
                v, i = value[e], source[e]
                if i < 0:
                    for c in range(BLOCK):
                        total[c] += v
                elif gated[e]:
                    for c in range(BLOCK):
                        total[c] += v * table[i, c] if table[g, c] > tiny else 0.0
                else:
                    for c in range(BLOCK):
                        total[c] += v * table[i, c]
            for c in range(BLOCK):
                out[g, c] = min(max(total[c], -cap), cap)
        for c in range(size):
            r = rows[at + c]
            for g in range(k):
                out_nk[r, g] = out[g, c]


@kernel()
def map_derivatives(
    kind, a, b, ligand, indptr, beta, start, stop, x_gn, w_ln, start_w_ln, delta_gn, seen_gn, live_g, scale, out_tn
):
    """Fill the changes of the targets in cells ``start:stop``, which share coefficients, to first order in ``delta``.

    Genes that have not changed cost nothing.

    Parameters
    ----------
    kind, a, b, ligand, beta
        (e,) the non-zero features of all targets, target by target.
    indptr
        (t + 1,) the start of the features of each target.
    start_w_ln
        Received ligands at the start, which features of kind 2 use.
    seen_gn, live_g
        ``delta`` where the gene is expressed and 0 elsewhere, and whether ``delta`` of a gene is non-zero in any cell.
    """
    for at in range(start, stop, BLOCK):
        end = min(at + BLOCK, stop)
        for t in range(indptr.shape[0] - 1):
            total = out_tn[t, at:end]
            total[:] = 0.0
            for e in range(indptr[t], indptr[t + 1]):
                v = beta[e]
                if kind[e] == 0:
                    if live_g[a[e]]:
                        left = delta_gn[a[e], at:end]
                        for c in range(end - at):
                            total[c] += v * left[c]
                    continue
                v *= scale
                if live_g[b[e]]:
                    received = w_ln[ligand[e], at:end] if kind[e] == 1 else start_w_ln[ligand[e], at:end]
                    change = seen_gn[b[e], at:end] if kind[e] == 1 else delta_gn[b[e], at:end]
                    for c in range(end - at):
                        total[c] += v * received[c] * change[c]
                if live_g[a[e]]:
                    left, second = delta_gn[a[e], at:end], x_gn[b[e], at:end]
                    for c in range(end - at):
                        total[c] += v * second[c] * left[c]


@kernel()
def map_differences(
    kind, a, b, ligand, indptr, beta, start, stop, x_gn, w_ln, start_x_gn, start_w_ln, live_g, scale, out_tn
):
    """Fill the differences of the models of the targets since the start, for the cells ``start:stop``."""
    for at in range(start, stop, BLOCK):
        end = min(at + BLOCK, stop)
        for t in range(indptr.shape[0] - 1):
            total = out_tn[t, at:end]
            total[:] = 0.0
            for e in range(indptr[t], indptr[t + 1]):
                v = beta[e]
                if kind[e] == 0:
                    if live_g[a[e]]:
                        left, left0 = x_gn[a[e], at:end], start_x_gn[a[e], at:end]
                        for c in range(end - at):
                            total[c] += v * (left[c] - left0[c])
                    continue
                if live_g[a[e]] or live_g[b[e]]:
                    v *= scale
                    second, second0 = x_gn[b[e], at:end], start_x_gn[b[e], at:end]
                    got, got0 = w_ln[ligand[e], at:end], start_w_ln[ligand[e], at:end]
                    for c in range(end - at):
                        total[c] += v * (got[c] * second[c] - got0[c] * second0[c])


@kernel()
def map_cells(
    kind, a, b, ligand, beta_rm, row_n, x_gn, w_ln, start_x_gn, start_w_ln, delta_gn, exact, scale, tiny, cap, out_n
):
    """Fill (n,) the changes of one target if every cell has its own row of ``beta``, or derivatives are clamped.

    With ``exact``, the change is the difference of the model since the start; otherwise it is to first order in
    ``delta``, with every derivative by gene clamped to ``cap``.
    """
    slope = np.zeros(x_gn.shape[0])
    for i in range(out_n.shape[0]):
        beta = beta_rm[row_n[i]]
        total = 0.0
        for f in range(kind.shape[0]):
            v, p, q = beta[f], a[f], b[f]
            if v == 0.0:
                continue
            if exact:
                if kind[f] == 0:
                    total += v * (x_gn[p, i] - start_x_gn[p, i])
                else:
                    old = start_w_ln[ligand[f], i] * start_x_gn[q, i]
                    total += v * scale * (w_ln[ligand[f], i] * x_gn[q, i] - old)
                continue
            if kind[f] == 0:
                slope[p] += v
                continue
            v *= scale
            if kind[f] == 2:
                slope[q] += v * start_w_ln[ligand[f], i]
            elif x_gn[q, i] > tiny:
                slope[q] += v * w_ln[ligand[f], i]
            slope[p] += v * x_gn[q, i]
        for f in range(0 if exact else kind.shape[0]):
            p, q = a[f], b[f]
            total += min(max(slope[p], -cap), cap) * delta_gn[p, i]
            slope[p] = 0.0
            if kind[f] != 0:
                total += min(max(slope[q], -cap), cap) * delta_gn[q, i]
                slope[q] = 0.0
        out_n[i] = total
