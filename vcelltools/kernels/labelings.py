"""Compute all per-gene quantities of the 2026 rules for several labelings of the same cells at once.

A *labeling* assigns a group to each cell, or −1 to exclude it, and controls to each group. The full data is one
labeling; the two halves of a random split, each with its own controls, are another. The non-zero values of a gene are
sorted once, and one sweep per labeling then gives all rank sums: five splits cost five sweeps and no further sort.

The matrix is stored by gene (CSC, in cell order). Zeros are handled analytically, without densifying. The caller passes
scratch memory, because a kernel that allocates needs numba's array functions, which take 30 ms to load.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.faults import BAD_INDEX, NEGATIVE, NOT_FINITE, NOT_WHOLE
from vcelltools.kernels.sorting import ALL_BITS, SHORT, insert_sort, radix_sort

N_TERMS = 15
"""Number of powers of the library-size shift in the series; with shifts up to 0.05, the rest is below 1e-17."""
SERIES_LIMIT = 0.05
"""Cells whose counts exceed this fraction of the counts of the other cells in their group are summed one by one."""

STRIP = 512
"""Number of values whose logarithms are computed at a time, so that they stay in the L1 cache."""


@kernel()
def csr_count(indptr, indices, data, n_genes, col_start, slack, slot_b, lib_b, nnz_sg, seen_g, status):
    """Check the rows of a chunk and count the values that :func:`csr_scatter` will store.

    Parameters
    ----------
    indptr, indices, data
        The rows of the chunk; ``indices`` are relative to ``col_start``.
    slack
        Largest allowed deviation of a value from a whole number.
    slot_b
        (b,) the part of the data to which each row belongs, or −1 to exclude the row (it is still checked).
    lib_b
        (b,) float64, to which library sizes are added.
    nnz_sg
        (slots, n_genes) int64, to which the numbers of stored values are added.
    seen_g
        (n_genes,) int64 scratch, −1 on entry.
    status
        (4,) int64: fault, row, position, number of duplicates. Explicit zeros are not counted.
    """
    for i in range(len(indptr) - 1):
        total = 0.0
        s = slot_b[i]
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[np.uint64(j)] + col_start
            if g < 0 or g >= n_genes:
                status[0], status[1], status[2] = BAD_INDEX, i, j
                return
            v = np.float64(data[np.uint64(j)])
            if not np.isfinite(v):
                status[0], status[1], status[2] = NOT_FINITE, i, j
                return
            if v < 0.0:
                status[0], status[1], status[2] = NEGATIVE, i, j
                return
            if v != np.floor(v) and not abs(v - np.rint(v)) <= slack:
                status[0], status[1], status[2] = NOT_WHOLE, i, j
                return
            if v == 0.0:
                continue
            total += v
            if seen_g[g] == i:
                status[3] += 1
            seen_g[g] = i
            if s >= 0:
                nnz_sg[s, g] += 1
        lib_b[i] += total
    for g in range(n_genes):
        seen_g[g] = -1


@kernel()
def csr_scatter(indptr, indices, data, col_start, cell_b, new_gene, cursor_g, stop_g, cells, values):
    """Append the rows of a checked chunk to a CSC matrix; return False if they differ from what was counted.

    ``cell_b`` is −1 for excluded rows; a gene goes to the column ``new_gene`` of its position, from
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
    """Sum adjacent entries of the same gene and cell in place, and rewrite ``indptr``; return the number kept."""
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
    """Count the cells with ``new_cell >= 0`` of the genes ``first`` to ``stop`` in ``out_indptr[g + 1]``."""
    for g in range(first, stop):
        n = 0
        for j in range(indptr[g], indptr[g + 1]):
            n += new_cell[np.uint32(cells[np.uint64(j)])] >= 0
        out_indptr[g + 1] = n


@kernel()
def csc_take(indptr, cells, values, new_cell, first, stop, out_indptr, out_cells, out_values):
    """Copy the cells with ``new_cell >= 0`` of the genes ``first`` to ``stop``, renumbered, to ``out_indptr``."""
    for g in range(first, stop):
        k, stop_k = out_indptr[g], out_indptr[g + 1]
        for j in range(indptr[g], indptr[g + 1]):
            if k == stop_k:
                break
            c = new_cell[np.uint32(cells[np.uint64(j)])]
            out_cells[np.uint64(k)] = c  # an entry that is not kept is overwritten, which avoids a branch
            out_values[np.uint64(k)] = values[np.uint64(j)]
            k += c >= 0


@kernel()
def csc_append(indptr, cells, values, shift, first, stop, cursor_g, out_cells, out_values):
    """Append the cells of a matrix, shifted, to the genes ``first`` to ``stop`` of another from ``cursor_g`` on."""
    for g in range(first, stop):
        k = cursor_g[g]
        for j in range(indptr[g], indptr[g + 1]):
            out_cells[k] = cells[j] + shift
            out_values[k] = values[j]
            k += 1
        cursor_g[g] = k


@kernel()
def csc_draw(indptr, cells, values, draw_ptr, draws, scale_g, n_new, lib, out_indptr, out_cells, out_values):
    """Copy cells with replacement, scaled by gene in float64 and stored as float32, followed by the cells themselves.

    Parameters
    ----------
    draw_ptr, draws
        For each source cell, the new cells that are copies of it (ascending).
    lib
        (n_new,) float64, to which the library sizes of the scaled cells are added.
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
    """Write log(1 + u) of the first ``n`` values of two arrays, by the series of atanh.

    The error is at most 4e-16 for abs(u) <= 0.1. One division serves both. There are no branches, so that the loop
    vectorises.
    """
    for j in range(n):
        a, b = u0[j], u1[j]
        x, y = 2.0 + a, 2.0 + b
        r = 1.0 / (x * y)
        s, t = a * y * r, b * x * r
        q, w = s * s, t * t
        d0[j] = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
        d1[j] = 2.0 * t * (1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13)))))))


@kernel()
def _two_digits(bits, small, cut, by, lo, hi, keys, other, hist_low, hist_high, shift, digit):
    """Make the keys of :func:`sort_genes` and sort them by two digits from bit ``shift`` up, which is sufficient."""
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
    """Sort the cells of each gene by value, ascending.

    Parameters
    ----------
    indptr
        (w + 1,) int64 bounds of the genes in the block, starting at 0.
    cells, bits
        (m,) int32 cells and positive float64 values, as uint64.
    out_cells, out_tied
        (m,) int32 sorted cells, and (m,) uint8: 1 if a value equals the previous one of the same gene.
    keys, other
        (m,) uint64 scratch.
    hist_db
        (3, 2048) int64 scratch.

    Notes
    -----
    Positive floats sort like their bits. A key is (bits − smallest) without as many low bits as the position in the
    gene takes, followed by that position. The 10 to 22 highest bits that differ within the gene are sorted by radix in
    two passes; values that these bits, or a key, do not distinguish are inserted by value; a gene with many such values
    is sorted again by all bits of the key.
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
        if n <= SHORT or width == 0:
            for j in range(lo, hi):
                keys[j] = (((bits[j] - small) >> cut) << by) | np.uint64(j - lo)
            insert_sort(keys, lo, hi, ALL_BITS)
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
            # equal in the sorted bits, or except for the dropped bits, so compare the values
            key = keys[j]
            k = j
            while k > lo and (j - k < SHORT or low == place) and bits[lo + np.int64(keys[k - 1] & where)] > here:
                keys[k] = keys[k - 1]
                k -= 1
            keys[k] = key
            if k > lo and bits[lo + np.int64(keys[k - 1] & where)] > here:  # too many to insert one by one
                radix_sort(keys, lo, hi, place, top, hist, other)
                low = place
                k = lo
            before = np.uint64(0) if k == lo else bits[lo + np.int64(keys[k - 1] & where)]
            j = k


class GeneBlock(NamedTuple):
    """Genes and their non-zero values, both in cell order and sorted by value."""

    indptr: np.ndarray
    """(w + 1,) int64 bounds of the genes, starting at 0."""
    cells: np.ndarray
    """(m,) int32 cells, in order."""
    values: np.ndarray
    """(m,) float32 counts."""
    cpm: np.ndarray
    """(m,) float64 counts per million."""
    sorted_cells: np.ndarray
    """(m,) int32 cells sorted by value, from :func:`sort_genes`."""
    tied: np.ndarray
    """(m,) uint8: 1 if a value equals the previous one of the same gene."""


class Labeling(NamedTuple):
    """Groups of cells and their controls; an additional last group holds the excluded cells.

    The last group has no weight and is its own control.
    """

    code_n: np.ndarray
    """(n,) int32 group of each cell."""
    control_of: np.ndarray
    """(k + 1,) int64 the control group of each group; a control group is its own."""
    shift_n: np.ndarray
    """(n,) float64 ``library / (S − library)``, where S is the counts of the group; 0 if the cell holds all of them."""
    grown_n: np.ndarray
    """(n,) float64 ``shift_n + 1``; 0 for a cell that holds all counts of its group."""
    size_k: np.ndarray
    """(k + 1,) float64 cells."""
    weight_k: np.ndarray
    """(k + 1,) float64 weight of each cell in the mean CPM."""
    total_k: np.ndarray
    """(k + 1,) float64 counts S."""
    power_kt: np.ndarray
    """(k + 1, N_TERMS + 1) sums of the powers of ``shift`` over the cells of the group up to SERIES_LIMIT."""
    big_ptr: np.ndarray
    """(k + 2,) int64 bounds of the cells of each group in ``big_cells``."""
    big_cells: np.ndarray
    """int64 cells above SERIES_LIMIT, and those that hold all counts."""


class LabelOutput(NamedTuple):
    """The outputs for every gene and group."""

    sum_gk: np.ndarray
    """(w, k) float64 counts."""
    cpm_gk: np.ndarray
    """(w, k) float64 mean CPM."""
    twice_u_gk: np.ndarray
    """(w, k) float64 twice the U statistic of the group against its controls."""
    tie_gk: np.ndarray
    """(w, k) float64 sum of t³ − t over the ties."""
    spread_k: np.ndarray
    """(k,) float64, to which the sum of squared deviations over these genes is added."""


class LabelScratch(NamedTuple):
    """Scratch memory of one call, made by :func:`make_label_scratch`."""

    group: np.ndarray
    """(longest gene,) int32."""
    strip_sj: np.ndarray
    """(4, STRIP) float64."""
    far: np.ndarray
    """(STRIP,) int64."""
    real_sk: np.ndarray
    """(8, k + 1) float64."""
    count_sk: np.ndarray
    """(5, k + 1) int64."""


def make_label_scratch(longest: int, n_groups: int) -> LabelScratch:
    """Return scratch for genes of up to ``longest`` values and ``n_groups`` groups, including the last one."""
    strips, far = np.empty((4, STRIP)), np.empty(STRIP, np.int64)
    real, count = np.empty((8, n_groups)), np.zeros((5, n_groups), np.int64)
    return LabelScratch(np.empty(longest, np.int32), strips, far, real, count)


@kernel()
def _sum_unexpressed(labeling, target_sum, psum, s1, s2, t_k, w_k):
    """Initialise the sums of deviations and of their squares as if no cell expressed the gene; fill t of each group."""
    size_k, power_kt = labeling.size_k, labeling.power_kt
    for p in range(len(size_k)):
        s1[p], s2[p], t_k[p], w_k[p] = 0.0, 0.0, 0.0, 0.0
        if psum[p] > 0.0 and size_k[p] >= 2.0:
            x = target_sum * psum[p] / labeling.total_k[p]
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
            for d in range(labeling.big_ptr[p], labeling.big_ptr[p + 1]):
                c = labeling.big_cells[d]
                dev = -np.log1p(x) if labeling.grown_n[c] == 0.0 else np.log1p(t * labeling.shift_n[c])
                a1 += dev
                a2 += dev * dev
            s1[p] = a1
            s2[p] = a2


@kernel()
def _add_expressed(cells_g, values_g, labeling, t_k, w_k, scratch, s1, s2):
    """Replace the deviations of the cells that express the gene, one strip of logarithms at a time."""
    shift_n, grown_n = labeling.shift_n, labeling.grown_n
    group, far = scratch.group, scratch.far
    u0, u1, d0, d1 = scratch.strip_sj[0], scratch.strip_sj[1], scratch.strip_sj[2], scratch.strip_sj[3]
    n = len(cells_g)
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


@kernel()
def _rank_block(n_touched, control_of, in_block, touched, left, u2, tie, tie_c):
    """Count a block of three or more equal values; ``in_block`` holds its cells per group."""
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
    for m in range(n_touched):  # the controls in this block count as passed from here on
        p = touched[m]
        if p == control_of[p]:
            left[p] -= in_block[p]
    for m in range(n_touched):
        in_block[touched[m]] = 0


@kernel()
def _rank_gene(block, lo, n, labeling, scratch):
    """Sweep the values of a gene from the largest down, counting the controls that are not above; fill U and ties."""
    sorted_cells, tied = block.sorted_cells, block.tied
    code_n, control_of, size_k = labeling.code_n, labeling.control_of, labeling.size_k
    u2, in_block, touched, left = scratch.count_sk[0], scratch.count_sk[2], scratch.count_sk[3], scratch.count_sk[4]
    tie, tie_c = scratch.real_sk[6], scratch.real_sk[7]
    for p in range(len(size_k)):
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
        i -= np.uint64(1)  # the first value of a gene is not tied
        if tied[i] == 0:  # a pair, the most common kind of tie
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
        _rank_block(n_touched, control_of, in_block, touched, left, u2, tie, tie_c)


@kernel()
def label_genes(block, labeling, target_sum, scratch, out):
    """Compute sums, mean CPM, rank sums against the controls and leave-one-cell-out spread of each gene.

    This kernel processes one labeling.

    Parameters
    ----------
    block, labeling, scratch, out
        :class:`GeneBlock`, :class:`Labeling`, :class:`LabelScratch`, :class:`LabelOutput`.
    target_sum
        The sum to which the counts of a profile are scaled before log1p.

    Notes
    -----
    With b the profile of the group and t = (e^b − 1) / e^b, leaving out cell i moves an unexpressed gene by exactly
    log1p(t · shift_i). The sums over cells follow from the power sums of ``shift``, so a gene costs its stored
    values and N_TERMS multiplications per group, not a pass over all cells. Logarithms are computed for a whole gene at
    a time, in a loop without branches that vectorises.
    """
    code_n, control_of, size_k = labeling.code_n, labeling.control_of, labeling.size_k
    group, real_sk = scratch.group, scratch.real_sk
    psum, csum, s1, s2, t_k, w_k = real_sk[0], real_sk[1], real_sk[2], real_sk[3], real_sk[4], real_sk[5]
    tie, tie_c = real_sk[6], real_sk[7]
    u2, nnz = scratch.count_sk[0], scratch.count_sk[1]
    for g in range(len(block.indptr) - 1):
        lo = block.indptr[g]
        n = block.indptr[g + 1] - lo
        cells_g, values_g, cpm_g = block.cells[lo : lo + n], block.values[lo : lo + n], block.cpm[lo : lo + n]
        psum[:] = 0.0
        csum[:] = 0.0
        nnz[:] = 0
        for j in range(n):
            p = np.uint32(code_n[np.uint32(cells_g[j])])
            group[j] = p
            psum[p] += np.float64(values_g[j])
            csum[p] += cpm_g[j] * labeling.weight_k[p]
            nnz[p] += 1
        _sum_unexpressed(labeling, target_sum, psum, s1, s2, t_k, w_k)
        _add_expressed(cells_g, values_g, labeling, t_k, w_k, scratch, s1, s2)
        _rank_gene(block, lo, n, labeling, scratch)
        for p in range(len(size_k) - 1):
            out.sum_gk[g, p] = psum[p]
            out.cpm_gk[g, p] = csum[p]
            if psum[p] > 0.0 and size_k[p] >= 2.0:
                out.spread_k[p] += s2[p] - s1[p] * s1[p] / size_k[p]
            c = control_of[p]
            if p != c:
                zeros_c = size_k[c] - np.float64(nnz[c])
                zeros = size_k[p] - np.float64(nnz[p])
                z = zeros + zeros_c
                out.twice_u_gk[g, p] = np.float64(u2[p]) + zeros * zeros_c
                out.tie_gk[g, p] = tie[p] + tie_c[c] + (z * z * z - z)
