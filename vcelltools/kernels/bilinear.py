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
WIDE, GROUP = 128, 128  # cells per block, and terms, in a table that all targets share


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


@kernel(inline=True)
def _add_rows(table, rows, beta, total):
    """Add some rows of a table, times their coefficients; four at a time, so that the total is loaded less often."""
    n, m = total.shape[0], rows.shape[0] - rows.shape[0] % 4
    for k in range(0, m, 4):
        p, q, r, s = table[rows[k]], table[rows[k + 1]], table[rows[k + 2]], table[rows[k + 3]]
        bp, bq, br, bs = beta[k], beta[k + 1], beta[k + 2], beta[k + 3]
        for c in range(n):
            total[c] += bp * p[c] + bq * q[c] + br * r[c] + bs * s[c]
    for k in range(m, rows.shape[0]):
        p, bp = table[rows[k]], beta[k]
        for c in range(n):
            total[c] += bp * p[c]


@kernel()
def _sort_terms(kind, a, b, ligand, beta, scale, n_genes, constant, indptr, source, value):
    """Write the constant part of every derivative, and its terms: a row of the table of a block, and a factor.

    The terms of gene ``g`` lie between ``indptr[2 g]`` and ``indptr[2 g + 1]``; those up to ``indptr[2 g + 2]`` count
    only in cells that express the gene.
    """
    constant[:] = 0.0
    indptr[:] = 0
    for f in range(kind.shape[0]):
        if beta[f] != 0.0 and kind[f] == 0:
            constant[a[f]] += beta[f]
        elif beta[f] != 0.0:
            indptr[2 * a[f] + 1] += 1
            indptr[2 * b[f] + (kind[f] == 1) + 1] += 1
    for g in range(2 * n_genes):
        indptr[g + 1] += indptr[g]
    at = indptr[:-1].copy()
    for f in range(kind.shape[0]):
        if beta[f] == 0.0 or kind[f] == 0:
            continue
        p, q = 2 * a[f], 2 * b[f] + (kind[f] == 1)
        source[at[p]], value[at[p]] = b[f], beta[f] * scale
        at[p] += 1
        source[at[q]], value[at[q]] = n_genes + ligand[f], beta[f] * scale
        at[q] += 1


@kernel()
def _turn(values_nk, rows, table_kc, back):
    """Copy some rows into the columns of a table, or ``back``; eight at a time, so that the cache holds their lines.

    The last row fills the columns up to a multiple of eight.
    """
    last = rows.shape[0] - 1
    for c in range(0, rows.shape[0], 8):
        p, q = values_nk[rows[c]], values_nk[rows[min(c + 1, last)]]
        r, s = values_nk[rows[min(c + 2, last)]], values_nk[rows[min(c + 3, last)]]
        t, u = values_nk[rows[min(c + 4, last)]], values_nk[rows[min(c + 5, last)]]
        v, w = values_nk[rows[min(c + 6, last)]], values_nk[rows[min(c + 7, last)]]
        for g in range(table_kc.shape[0]):
            line = table_kc[g, c : c + 8]
            if back:
                p[g], q[g], r[g], s[g] = line[0], line[1], line[2], line[3]
                t[g], u[g], v[g], w[g] = line[4], line[5], line[6], line[7]
            else:
                line[0], line[1], line[2], line[3] = p[g], q[g], r[g], s[g]
                line[4], line[5], line[6], line[7] = t[g], u[g], v[g], w[g]


@kernel()
def splash_rows(kind, a, b, ligand, beta_m, rows, x_nk, w_nl, scale, tiny, cap, out_nk):
    """Fill the derivatives of the cells ``rows``, which share the coefficients ``beta``; see :func:`splash_cells`.

    Every derivative is a sum of a few rows of a table of the block's expression and received ligands.
    """
    k, n_ligands, m = x_nk.shape[1], w_nl.shape[1], kind.shape[0]
    constant, indptr = np.empty(k), np.empty(2 * k + 1, np.int64)
    source, value = np.empty(2 * m, np.int64), np.empty(2 * m)
    _sort_terms(kind, a, b, ligand, beta_m, scale, k, constant, indptr, source, value)
    table, out = np.zeros((k + n_ligands, BLOCK + 8)), np.empty((k, BLOCK + 8))  # no power of two: lines of the cache
    total, gated = np.empty(BLOCK), np.empty(BLOCK)
    for at in range(0, rows.shape[0], BLOCK):
        _turn(x_nk, rows[at : at + BLOCK], table[:k], False)
        _turn(w_nl, rows[at : at + BLOCK], table[k:], False)
        for g in range(k):
            first, middle, last = indptr[2 * g], indptr[2 * g + 1], indptr[2 * g + 2]
            total[:] = constant[g]
            _add_rows(table, source[first:middle], value[first:middle], total)
            if last > middle:
                gated[:] = 0.0
                _add_rows(table, source[middle:last], value[middle:last], gated)
                x = table[g]
                for c in range(BLOCK):
                    total[c] += gated[c] if x[c] > tiny else 0.0
            row = out[g]
            for c in range(BLOCK):
                row[c] = min(max(total[c], -cap), cap)
        _turn(out_nk, rows[at : at + BLOCK], out, True)


@kernel()
def _sort_live(kind, a, b, live_g, indptr, column, beta, keep, ends, row_e, beta_e):
    """List the terms that can have changed, and the entries that use them, by group of ``GROUP`` terms and target.

    ``keep`` gets the live terms; ``row_e`` and ``beta_e`` get the position in the group and the coefficient of every
    entry, between the ``ends`` of each group and target. Returns the number of live terms.
    """
    n_live, place = 0, np.empty(kind.shape[0], np.int64)
    for j in range(kind.shape[0]):
        place[j] = -1
        if live_g[a[j]] or (kind[j] != 0 and live_g[b[j]]):
            place[j] = n_live
            keep[n_live] = j
            n_live += 1
    n_targets = indptr.shape[0] - 1
    for t in range(n_targets):
        for e in range(indptr[t], indptr[t + 1]):
            if place[column[e]] >= 0:
                ends[place[column[e]] // GROUP * n_targets + t + 1] += 1
    for k in range(ends.shape[0] - 1):
        ends[k + 1] += ends[k]
    first = ends[:-1].copy()
    for t in range(n_targets):
        for e in range(indptr[t], indptr[t + 1]):
            at = place[column[e]]
            if at >= 0:
                k = at // GROUP * n_targets + t
                row_e[first[k]], beta_e[first[k]] = at % GROUP, beta[e]
                first[k] += 1
    return n_live


@kernel(inline=True)
def _get_row(whole, part, slot, i):
    """Return row ``i``: of ``part`` if it has a slot there, otherwise of ``whole``."""
    return part[slot[i]] if slot[i] >= 0 else whole[i]


@kernel(inline=True)
def _fill_derivatives(
    kind, a, b, ligand, x0_gn, w0_ln, slot_g, w_slot_l, x_cn, w_kn, delta_cn, live_g, at, end, tiny, row
):  # fmt: skip
    """Fill the change of one term in the cells ``at:end``, to first order in ``delta``."""
    row[:] = 0.0
    if live_g[a]:
        left = delta_cn[slot_g[a], at:end]
        if kind == 0:
            row[: end - at] = left
            return
        second = _get_row(x0_gn, x_cn, slot_g, b)[at:end]
        for c in range(end - at):
            row[c] = second[c] * left[c]
    if live_g[b]:
        change = delta_cn[slot_g[b], at:end]
        if kind == 1:
            received, now = _get_row(w0_ln, w_kn, w_slot_l, ligand)[at:end], x_cn[slot_g[b], at:end]
            for c in range(end - at):
                row[c] += received[c] * change[c] if now[c] > tiny else 0.0
        else:
            received = w0_ln[ligand, at:end]
            for c in range(end - at):
                row[c] += received[c] * change[c]


@kernel(inline=True)
def _fill_differences(kind, a, b, ligand, x0_gn, w0_ln, slot_g, w_slot_l, x_cn, w_kn, at, end, row):
    """Fill the difference of one term from its value at the start, in the cells ``at:end``."""
    left0 = x0_gn[a, at:end] if kind == 0 else w0_ln[ligand, at:end]
    if kind == 0:
        left = x_cn[slot_g[a], at:end]
        for c in range(end - at):
            row[c] = left[c] - left0[c]
        return
    left, second0 = _get_row(w0_ln, w_kn, w_slot_l, ligand)[at:end], x0_gn[b, at:end]
    second = _get_row(x0_gn, x_cn, slot_g, b)[at:end]
    for c in range(end - at):
        row[c] = left[c] * second[c] - left0[c] * second0[c]


@kernel()
def map_changes(
    kind, a, b, ligand, indptr, column, beta,
    start, stop, x0_gn, w0_ln, slot_g, w_slot_l, x_cn, w_kn, delta_cn, live_g, exact, tiny, out_tn,
):  # fmt: skip
    """Fill the changes of the targets in the cells ``start:stop``, which share coefficients.

    Every term is computed once for all targets, and those of genes that have not changed cost nothing.

    Parameters
    ----------
    kind, a, b, ligand
        (u,) the terms of all targets, each once.
    indptr, column, beta
        The non-zero coefficients of all targets, target by target, with the position of the term of each.
    x0_gn, w0_ln
        Expression and received ligands at the start.
    slot_g, w_slot_l
        Row of each gene in ``x`` and ``delta``, and of each ligand in ``w``; -1 if it cannot change.
    x_cn, w_kn
        Expression and received ligands now, of genes and ligands that can change.
    delta_cn, live_g
        Changes to propagate, and whether that of a gene is not 0 in some cell.
    exact
        Whether to take the differences of the models since the start, instead of changes to first order in ``delta``,
        in which genes that are not expressed do not act as receptors and TFs receive the ligands of the start.
    tiny
        Threshold up to which expression counts as 0.
    """
    n_terms, n_targets = kind.shape[0], indptr.shape[0] - 1
    keep, row_e, beta_e = np.empty(n_terms, np.int64), np.empty(beta.shape[0], np.int64), np.empty(beta.shape[0])
    ends = np.zeros((n_terms // GROUP + 1) * n_targets + 1, np.int64)
    n_live = _sort_live(kind, a, b, live_g, indptr, column, beta, keep, ends, row_e, beta_e)
    table, total = np.zeros((GROUP, WIDE)), np.empty((n_targets, WIDE))
    for at in range(start, stop, WIDE):
        end = min(at + WIDE, stop)
        total[:] = 0.0
        for first in range(0, n_live, GROUP):
            for j in range(first, min(first + GROUP, n_live)):
                u = keep[j]
                if exact:
                    _fill_differences(
                        kind[u], a[u], b[u], ligand[u], x0_gn, w0_ln, slot_g, w_slot_l, x_cn, w_kn, at, end,
                        table[j - first],
                    )  # fmt: skip
                else:
                    _fill_derivatives(
                        kind[u], a[u], b[u], ligand[u], x0_gn, w0_ln, slot_g, w_slot_l, x_cn, w_kn, delta_cn,
                        live_g, at, end, tiny, table[j - first],
                    )  # fmt: skip
            for t in range(n_targets):
                k = first // GROUP * n_targets + t
                _add_rows(table, row_e[ends[k] : ends[k + 1]], beta_e[ends[k] : ends[k + 1]], total[t])
        for t in range(n_targets):
            out_tn[t, at:end] = total[t, : end - at]


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
