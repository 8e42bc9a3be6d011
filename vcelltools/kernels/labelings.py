"""Everything that 2026 scoring needs of a gene, for several labelings of the same cells at once.

A *labeling* gives each cell a group, or −1 to leave it out, and each group its controls. The full data is one
labeling; the two halves of a random split, each with its own controls, are another. A gene's non-zero values are
sorted once, and one sweep per labeling then gives every rank sum: five splits cost five sweeps and no further sort.

The matrix is held by gene (CSC, in cell order). Nothing is densified: zeros enter analytically. The kernels get their
scratch from outside: one that allocates needs numba's array functions where it is loaded, 30 ms at every start.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

N_TERMS = 15
"""Powers of the library-size shift that the series keeps; with shifts up to 0.05 the rest is below 1e-17."""
SERIES_LIMIT = 0.05
"""Cells that hold more than this share of what the other cells of their group hold are summed one by one."""

STRIP = 512
"""Values whose logarithms are taken at a time: they stay in the first cache."""

OK, BAD_INDEX, NOT_FINITE, NEGATIVE, FRACTIONAL = 0, 1, 2, 3, 4


@kernel()
def csr_count(indptr, indices, data, n_genes, col_start, slack, slot_b, lib_b, nnz_sg, seen_g, fault):
    """Check the rows of a chunk and count what :func:`csr_scatter` will store.

    Parameters
    ----------
    indptr, indices, data
        The chunk's rows; ``indices`` are relative to ``col_start``.
    slack
        How far from a whole number a value may be.
    slot_b
        (b,) the part of the data that each row belongs to, −1 to leave the row out (it is checked all the same).
    lib_b
        (b,) float64, library sizes are added to it.
    nnz_sg
        (slots, n_genes) int64, stored values are added to it.
    seen_g
        (n_genes,) int64 scratch, −1 on entry.
    fault
        (4,) int64: status, row, gene, number of duplicates. Explicit zeros are not counted.
    """
    for i in range(len(indptr) - 1):
        total = 0.0
        s = slot_b[i]
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[np.uint64(j)] + col_start
            if g < 0 or g >= n_genes:
                fault[0], fault[1], fault[2] = 1, i, g
                return
            v = np.float64(data[np.uint64(j)])
            if not np.isfinite(v):
                fault[0], fault[1], fault[2] = 2, i, g
                return
            if v < 0.0:
                fault[0], fault[1], fault[2] = 3, i, g
                return
            if v != np.floor(v) and not abs(v - np.rint(v)) <= slack:
                fault[0], fault[1], fault[2] = 4, i, g
                return
            if v == 0.0:
                continue
            total += v
            if seen_g[g] == i:
                fault[3] += 1
            seen_g[g] = i
            if s >= 0:
                nnz_sg[s, g] += 1
        lib_b[i] += total
    for g in range(n_genes):
        seen_g[g] = -1


@kernel()
def csr_scatter(indptr, indices, data, col_start, cell_b, new_gene, cursor_g, stop_g, cells, values):
    """Append the rows of a checked chunk to a CSC matrix; False where it is not what was checked and counted.

    ``cell_b`` is −1 for rows that are left out; a gene goes to the column ``new_gene`` of its position, from
    ``cursor_g`` to ``stop_g``.
    """
    n_genes = np.uint64(len(new_gene))
    for row in range(len(indptr) - 1):
        c = cell_b[row]
        if c < 0:
            continue
        for j in range(indptr[row], indptr[row + 1]):
            v = data[np.uint64(j)]
            if v == 0:
                continue
            i = np.uint64(indices[np.uint64(j)] + col_start)
            if i >= n_genes:
                return False
            g = np.uint64(new_gene[i])
            k = cursor_g[g]
            if k >= stop_g[g]:
                return False
            cells[np.uint64(k)] = c
            values[np.uint64(k)] = v
            cursor_g[g] = k + 1
    return True


@kernel()
def csc_merge(indptr, cells, values):
    """Sum neighbours of the same gene and cell in place; ``indptr`` is rewritten. Return the values kept."""
    out = 0
    lo = indptr[0]
    for g in range(len(indptr) - 1):
        hi = indptr[g + 1]
        start = out
        for j in range(lo, hi):
            if out > start and cells[out - 1] == cells[j]:
                values[out - 1] += values[j]
            else:
                cells[out] = cells[j]
                values[out] = values[j]
                out += 1
        lo = hi
        indptr[g + 1] = out
    return out


@kernel()
def csc_count_taken(indptr, cells, new_cell, first, stop, out_indptr):
    """Count, gene by gene from ``first`` to ``stop``, the cells with ``new_cell >= 0`` into ``out_indptr[g + 1]``."""
    for g in range(first, stop):
        n = 0
        for j in range(indptr[g], indptr[g + 1]):
            n += new_cell[np.uint32(cells[np.uint64(j)])] >= 0
        out_indptr[g + 1] = n


@kernel()
def csc_take(indptr, cells, values, new_cell, first, stop, out_indptr, out_cells, out_values):
    """Copy the cells with ``new_cell >= 0`` of the genes from ``first`` to ``stop``, renumbered, to ``out_indptr``."""
    for g in range(first, stop):
        k, stop_k = out_indptr[g], out_indptr[g + 1]
        for j in range(indptr[g], indptr[g + 1]):
            if k == stop_k:
                break
            c = new_cell[np.uint32(cells[np.uint64(j)])]
            out_cells[np.uint64(k)] = c  # written over where it is not taken: no branch that has to be guessed
            out_values[np.uint64(k)] = values[np.uint64(j)]
            k += c >= 0


@kernel()
def csc_append(indptr, cells, values, shift, first, stop, cursor_g, out_cells, out_values):
    """Append a matrix's cells to the genes from ``first`` to ``stop`` of another, from ``cursor_g`` on, moved up."""
    for g in range(first, stop):
        k = cursor_g[g]
        for j in range(indptr[g], indptr[g + 1]):
            out_cells[k] = cells[j] + shift
            out_values[k] = values[j]
            k += 1
        cursor_g[g] = k


@kernel()
def csc_draw(indptr, cells, values, draw_ptr, draws, scale_g, n_new, lib, out_indptr, out_cells, out_values):
    """Copy cells with replacement, scaled gene by gene in float64 and stored as float32; then the cells themselves.

    Parameters
    ----------
    draw_ptr, draws
        For each source cell, the new cells that are copies of it (ascending).
    lib
        (n_new,) float64, library sizes of the scaled cells are added to it.
    """
    k = 0
    for g in range(len(indptr) - 1):
        for j in range(indptr[g], indptr[g + 1]):
            v = np.float32(np.float64(values[j]) * scale_g[g])
            if v == 0.0:
                continue
            c = cells[j]
            for d in range(draw_ptr[c], draw_ptr[c + 1]):
                out_cells[k] = draws[d]
                out_values[k] = v
                lib[draws[d]] += np.float64(v)
                k += 1
        for j in range(indptr[g], indptr[g + 1]):
            out_cells[k] = cells[j] + n_new
            out_values[k] = values[j]
            k += 1
        out_indptr[g + 1] = k
    return k


@kernel(fastmath={"contract"})
def _log1p_pairs(u0, u1, n, d0, d1):
    """Write log(1 + u) of the first ``n`` of two arrays, by the series of atanh; for abs(u) <= 0.1 good to 4e-16.

    One division serves both. Without branches, so that it becomes vector instructions.
    """
    for j in range(n):
        a, b = u0[j], u1[j]
        x, y = 2.0 + a, 2.0 + b
        r = 1.0 / (x * y)
        s, t = a * y * r, b * x * r
        q, w = s * s, t * t
        d0[j] = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
        d1[j] = 2.0 * t * (1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13)))))))


@kernel(inline=True)
def _insert(keys, lo, hi):
    """Sort a short run by insertion."""
    for j in range(lo + 1, hi):
        key = keys[j]
        k = j
        while k > lo and keys[k - 1] > key:
            keys[k] = keys[k - 1]
            k -= 1
        keys[k] = key


@kernel()
def _radix(keys, lo, hi, other, hist, shift, top):
    """Sort a run by the bits from ``shift`` up to ``top``, 11 at a time from below; the result lies in ``keys``."""
    digit = np.uint64(2047)
    moved = False
    while shift < top:
        by = np.uint64(shift)
        hist[:] = 0
        for j in range(lo, hi):
            hist[(keys[j] >> by) & digit] += 1
        at = lo
        for b in range(2048):
            c = hist[b]
            hist[b] = at
            at += c
        for j in range(lo, hi):
            b = (keys[j] >> by) & digit
            k = hist[b]
            hist[b] = k + 1
            other[np.uint64(k)] = keys[j]
        keys, other = other, keys
        moved = not moved
        shift += 11
    if moved:
        for j in range(lo, hi):
            other[j] = keys[j]


@kernel()
def _two_digits(bits, small, cut, by, lo, hi, keys, other, hist_low, hist_high, shift, digit):
    """Make the keys of :func:`sort_genes` and sort them by the two digits from bit ``shift`` up; they need no more."""
    low, high = np.uint64(shift), np.uint64(shift + digit)
    mask = (np.uint64(1) << np.uint64(digit)) - np.uint64(1)
    n_bins = 1 << digit
    hist_low[:n_bins] = 0
    hist_high[:n_bins] = 0
    for j in range(lo, hi):
        key = ((bits[np.uint64(j)] - small) >> cut) << by
        hist_low[(key >> low) & mask] += 1
        hist_high[(key >> high) & mask] += 1
    at_low, at_high = lo, lo
    for b in range(n_bins):
        c, d = hist_low[b], hist_high[b]
        hist_low[b], hist_high[b] = at_low, at_high
        at_low += c
        at_high += d
    for j in range(lo, hi):
        key = (((bits[np.uint64(j)] - small) >> cut) << by) | np.uint64(j - lo)
        b = (key >> low) & mask
        k = hist_low[b]
        hist_low[b] = k + 1
        other[np.uint64(k)] = key
    for j in range(lo, hi):
        key = other[np.uint64(j)]
        b = (key >> high) & mask
        k = hist_high[b]
        hist_high[b] = k + 1
        keys[np.uint64(k)] = key


@kernel()
def sort_genes(indptr, cells, bits, out_cells, out_tied, keys, other, hist_db):
    """Sort each gene's cells by value, ascending.

    Parameters
    ----------
    indptr
        (w + 1,) int64 bounds of the genes in the block, starting at 0.
    cells, bits
        (m,) int32 cells and positive float64 values, as uint64.
    out_cells, out_tied
        (m,) int32 the sorted cells; uint8, 1 where the value equals the one before it in the same gene.
    keys, other
        (m,) uint64 scratch.
    hist_db
        (3, 2048) int64 scratch.

    Notes
    -----
    Positive floats order as their bits. A key is (bits − smallest), less as many low bits as the position in the gene
    takes, and that position. The 10 to 22 highest bits that differ within the gene are sorted by radix in two passes;
    what lies closer than these tell, or than a key can, is inserted by its value, on the way to the result; a gene
    with many such is sorted again by all bits of the key.
    """
    hist, hist_low, hist_high = hist_db[0], hist_db[1], hist_db[2]
    for g in range(len(indptr) - 1):
        lo, hi = indptr[g], indptr[g + 1]
        n = hi - lo
        if n == 0:
            continue
        small, big = bits[lo], bits[lo]
        for j in range(lo, hi):
            x = bits[np.uint64(j)]
            small = min(small, x)
            big = max(big, x)
        place = 0
        while (n >> place) != 0:
            place += 1
        width = 0
        while width < 64 and ((big - small) >> np.uint64(width)) != np.uint64(0):
            width += 1
        cut = np.uint64(max(width + place - 64, 0))
        by = np.uint64(place)
        top = min(width + place, 64)
        low = place
        if n <= 48 or width == 0:
            for j in range(lo, hi):
                keys[j] = (((bits[j] - small) >> cut) << by) | np.uint64(j - lo)
            _insert(keys, lo, hi)
        else:
            digit = min(11, max(5, place - 2))
            low = max(top - 2 * digit, place)
            _two_digits(bits, small, cut, by, lo, hi, keys, other, hist_low, hist_high, low, digit)
        where = (np.uint64(1) << by) - np.uint64(1)
        before = np.uint64(0)
        j = lo
        while j < hi:
            i = np.uint64(j)
            at = np.uint64(lo) + (keys[i] & where)
            here = bits[at]
            if here >= before:
                out_cells[i] = cells[at]
                out_tied[i] = here == before
                before = here
                j += 1
                continue
            # equal in the bits that were sorted, or but for the bits that were cut off; the values decide
            key = keys[j]
            k = j
            while k > lo and (j - k < 48 or low == place) and bits[lo + np.int64(keys[k - 1] & where)] > here:
                keys[k] = keys[k - 1]
                k -= 1
            keys[k] = key
            if k > lo and bits[lo + np.int64(keys[k - 1] & where)] > here:  # too many of them to insert one by one
                _radix(keys, lo, hi, other, hist, place, top)
                low = place
                k = lo
            before = np.uint64(0) if k == lo else bits[lo + np.int64(keys[k - 1] & where)]
            j = k


@kernel()
def label_genes(
    indptr,
    cells,
    values,
    cpm,
    sorted_cells,
    tied,
    target_sum,
    code_n,
    control_of,
    shift_n,
    grown_n,
    size_k,
    weight_k,
    total_k,
    power_kt,
    big_ptr,
    big_cells,
    sum_gk,
    cpm_gk,
    twice_u_gk,
    tie_gk,
    spread_k,
    group,
    strip_sj,
    far,
    real_sk,
    count_sk,
):
    """Sums, mean CPM, rank sums against the controls and leave-one-cell-out spread of each gene, one labeling.

    Parameters
    ----------
    indptr, cells, values, cpm
        A block of genes in cell order: bounds, int32 cells, float32 counts, float64 counts per million.
    sorted_cells, tied
        The same cells by value, from :func:`sort_genes`.
    target_sum
        What a profile's counts are scaled to before log1p.
    code_n
        (n,) int32 group of each cell; the last group takes what is left out: it has no weight and is its own control.
    control_of
        (k + 1,) int64 the group that holds each group's controls; a control group's own is itself.
    shift_n, grown_n
        (n,) float64 ``library / (S − library)`` and one more than that; both 0 for a cell that holds all of its
        group's counts.
    size_k, weight_k, total_k
        (k + 1,) float64 cells, weight of each cell in the mean CPM, counts S of each group.
    power_kt
        (k + 1, N_TERMS + 1) sums of the powers of ``shift`` over the group's cells up to SERIES_LIMIT.
    big_ptr, big_cells
        The cells of each group above SERIES_LIMIT, and those that hold all counts.
    sum_gk, cpm_gk, twice_u_gk, tie_gk
        (w, k) float64 outputs: counts summed; mean CPM; twice the U of the group; sum of t³ − t over the ties.
    spread_k
        (k,) float64, the sum over these genes of squared deviations is added to it.
    group
        int32 scratch, as long as the longest gene.
    strip_sj, far
        (4, STRIP) float64 and (STRIP,) int64 scratch.
    real_sk, count_sk
        (8, k + 1) float64 and (5, k + 1) int64 scratch.

    Notes
    -----
    With b the group's profile and t = (e^b − 1) / e^b, leaving out cell i moves an unexpressed gene by exactly
    log1p(t · shift_i). Its sums over the cells follow from the power sums of ``shift``, so a gene costs its stored
    values and N_TERMS multiplications a group, not a pass over all cells. Logarithms are taken of a whole gene at a
    time, in a loop without branches that the compiler turns into vector instructions.
    """
    k_all = len(size_k)
    u0, u1, d0, d1 = strip_sj[0], strip_sj[1], strip_sj[2], strip_sj[3]
    psum, csum, s1, s2 = real_sk[0], real_sk[1], real_sk[2], real_sk[3]
    t_k, w_k, tie, tie_c = real_sk[4], real_sk[5], real_sk[6], real_sk[7]
    u2, nnz, in_block, touched = count_sk[0], count_sk[1], count_sk[2], count_sk[3]
    left = count_sk[4]  # controls that are not above the value
    in_block[:] = 0
    for g in range(len(indptr) - 1):
        lo = indptr[g]
        n = indptr[g + 1] - lo
        cells_g, values_g, cpm_g = cells[lo : lo + n], values[lo : lo + n], cpm[lo : lo + n]
        psum[:] = 0.0
        csum[:] = 0.0
        nnz[:] = 0
        for j in range(n):
            p = np.uint32(code_n[np.uint32(cells_g[j])])
            group[j] = p
            psum[p] += np.float64(values_g[j])
            csum[p] += cpm_g[j] * weight_k[p]
            nnz[p] += 1
        for p in range(k_all):
            s1[p], s2[p], t_k[p], w_k[p] = 0.0, 0.0, 0.0, 0.0
            if psum[p] > 0.0 and size_k[p] >= 2.0:
                x = target_sum * psum[p] / total_k[p]
                t = x / (1.0 + x)
                t_k[p], w_k[p] = t, t / psum[p]
                a1, a2, h, sign, tk = 0.0, 0.0, 0.0, 1.0, 1.0
                for m in range(1, N_TERMS + 1):
                    tk *= t
                    a1 += sign * tk / m * power_kt[p, m]
                    if m >= 2:
                        a2 -= sign * 2.0 * h / m * tk * power_kt[p, m]
                    h += 1.0 / m
                    sign = -sign
                for d in range(big_ptr[p], big_ptr[p + 1]):
                    c = big_cells[d]
                    dev = -np.log1p(x) if grown_n[c] == 0.0 else np.log1p(t * shift_n[c])
                    a1 += dev
                    a2 += dev * dev
                s1[p] = a1
                s2[p] = a2
        for base in range(0, n, STRIP):
            m = min(STRIP, n - base)
            n_far = 0
            for j in range(m):
                c, p = np.uint32(cells_g[base + j]), np.uint32(group[base + j])
                a = t_k[p] * shift_n[c]
                b = a - grown_n[c] * np.float64(values_g[base + j]) * w_k[p]
                u0[j], u1[j] = a, b
                if a > 0.1 or abs(b) > 0.1:
                    far[n_far] = j
                    n_far += 1
            _log1p_pairs(u0, u1, m, d0, d1)
            for q in range(n_far):
                j = far[q]
                d0[j] = np.log1p(u0[j])
                d1[j] = np.log1p(max(u1[j], -1.0 + 1e-16))
            for j in range(m):
                p = np.uint32(group[base + j])
                s1[p] += d1[j] - d0[j]
                s2[p] += d1[j] * d1[j] - d0[j] * d0[j]

        for p in range(k_all):
            u2[p], tie[p], tie_c[p] = 0, 0.0, 0.0
            left[p] = np.int64(size_k[p])
        j = lo + n - 1
        while j >= lo:
            i = np.uint64(j)
            if tied[i] == 0:
                p = np.uint32(code_n[np.uint32(sorted_cells[i])])
                c = np.uint32(control_of[p])
                u2[p] += 2 * left[c]
                left[c] -= p == c
                j -= 1
                continue
            i -= np.uint64(1)  # the first of a gene is not tied
            if tied[i] == 0:  # a pair, which is what most ties are
                p = np.uint32(code_n[np.uint32(sorted_cells[np.uint64(j)])])
                q = np.uint32(code_n[np.uint32(sorted_cells[i])])
                c, e = np.uint32(control_of[p]), np.uint32(control_of[q])
                if p == q:
                    if p == c:
                        tie_c[c] += 6.0
                        left[c] -= 2
                    else:
                        tie[p] += 6.0
                        u2[p] += 4 * left[c]
                elif c == e and (p == c) != (q == c):  # a cell of the group and a control
                    k = q if p == c else p
                    tie[k] += 6.0
                    u2[k] += 2 * left[c] - 1
                    left[c] -= 1
                else:
                    u2[p] += 2 * left[c]
                    u2[q] += 2 * left[e]
                    left[c] -= p == c
                    left[e] -= q == e
                j -= 2
                continue
            n_touched = 0
            while True:
                p = np.uint32(code_n[np.uint32(sorted_cells[np.uint64(j)])])
                if in_block[p] == 0:
                    touched[n_touched] = p
                    n_touched += 1
                in_block[p] += 1
                j -= 1
                if tied[j + 1] == 0:
                    break
            for m in range(n_touched):
                p = touched[m]
                c = control_of[p]
                e = np.float64(in_block[c])
                own = e * e * e - e
                if p == c:
                    tie_c[c] += own
                else:
                    a = in_block[p]
                    u2[p] += a * (2 * left[c] - in_block[c])
                    both = np.float64(a) + e
                    tie[p] += (both * both * both - both) - own
            for m in range(n_touched):  # the controls of this block count as passed only now
                p = touched[m]
                if p == control_of[p]:
                    left[p] -= in_block[p]
            for m in range(n_touched):
                in_block[touched[m]] = 0
        for p in range(k_all - 1):
            sum_gk[g, p] = psum[p]
            cpm_gk[g, p] = csum[p]
            if psum[p] > 0.0 and size_k[p] >= 2.0:
                spread_k[p] += s2[p] - s1[p] * s1[p] / size_k[p]
            c = control_of[p]
            if p != c:
                zeros_c = size_k[c] - np.float64(nnz[c])
                zeros = size_k[p] - np.float64(nnz[p])
                z = zeros + zeros_c
                twice_u_gk[g, p] = np.float64(u2[p]) + zeros * zeros_c
                tie_gk[g, p] = tie[p] + tie_c[c] + (z * z * z - z)
