"""Kernels of the stores: write counts to rows, convert rows to float16 and bytes, and read rows.

A work row holds uint16 counts of the basis genes, where 65,535 refers to a list of large counts. A packed row holds
uint8 counts, where 255 refers to a list of escapes. A value row holds the bits of float16 CP10K+log1p values.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.checks import check_entry
from vcelltools.kernels.faults import FULL, MAX_COUNT, OK

WORK_ESCAPE = 65_535
BYTE_ESCAPE = 255
PACK_ESCAPE = 65_535
FIXED_ONE = 1 << 24  # the unit of the fixed-point sums
_TABLE = 64  # values of smaller counts are computed once per cell and looked up


@kernel()
def csr_fill_work(indptr, indices, data, basis_of_gene, out_row_b, libsize_b, work, over, status):
    """Scatter the basis counts of the cells of a chunk into work rows and sum library sizes.

    Parameters
    ----------
    indptr, indices, data
        The chunk; indices unchecked.
    basis_of_gene
        (n_genes,) int32: position in the basis, -1 outside.
    out_row_b
        (b,) int64: row of ``work`` for each cell, or -1 for dropped cells.
    libsize_b
        (b,) int64 out: the sum of all counts of the cell.
    work
        (m, stride) uint16 out; the rows in ``out_row_b`` are overwritten completely.
    over
        (c, 3) int64 out: (work row, position, count) of ``status[2]`` counts >= 65,535.
    status
        (4,) int64 out: fault, position in ``data``, entries in ``over``, cells whose indices do not increase.

    Cost: about 2 ns per stored value. Three plain loops over a cell (values, order, scatter) are faster than one with
    branches. Oracle: ``store_rows``.
    """
    n_genes = len(basis_of_gene)
    stride = work.shape[1]
    row = np.zeros(stride + 1, np.int64)  # the first entry receives genes outside the basis, at position -1
    n_over = 0
    n_unsorted = 0
    for i in range(len(indptr) - 1):
        begin, end = indptr[i], indptr[i + 1]
        cells_data, cells_indices = data[begin:end], indices[begin:end]
        total = np.int64(0)
        bad = np.int32(0)
        for j in range(len(cells_data)):  # no branch, so that the loop processes eight values at a time
            value = np.float64(cells_data[j])
            count = np.int32(value)
            bad |= np.int32(not ((value >= 0.0) & (value <= 2147483647.0))) | np.int32(np.float64(count) != value)
            total += np.int64(count)
        unsorted = np.int32(0)
        if end > begin:
            low = high = cells_indices[0]
            for j in range(1, len(cells_indices)):
                g = cells_indices[j]
                low = min(low, g)
                high = max(high, g)
                unsorted |= np.int32(g <= cells_indices[j - 1])
            bad |= np.int32(low < 0) | np.int32(high >= n_genes)
        if bad:
            for j in range(begin, end):
                fault = check_entry(indices[j], data[j], n_genes, MAX_COUNT)
                if fault != OK:
                    status[0], status[1] = fault, j
                    return
        libsize_b[i] = total
        n_unsorted += unsorted
        r = out_row_b[i]
        if r < 0:
            continue
        row[:] = 0
        for j in range(begin, end):
            # unsigned, so that numba does not test for negative indices
            row[np.uint64(basis_of_gene[np.uint64(indices[j])] + 1)] += np.int64(data[j])
        largest = np.int64(0)
        for p in range(stride):
            largest = max(largest, row[p + 1])
            work[r, p] = np.uint16(min(row[p + 1], WORK_ESCAPE))
        if largest >= WORK_ESCAPE:
            for p in range(stride):
                if row[p + 1] >= WORK_ESCAPE:
                    if n_over == len(over):
                        status[0], status[1] = FULL, begin
                        return
                    over[n_over, 0], over[n_over, 1], over[n_over, 2] = r, p, row[p + 1]
                    n_over += 1
    status[2] = n_over
    status[3] = n_unsorted


@kernel(inline=True)
def _fix_log(count, scale):
    """Return ``round(log1p(count * scale) * 2**24)``."""
    return np.int64(np.rint(np.log1p(count * scale) * FIXED_ONE))


@kernel()
def csr_fixed_logs(indptr, data, scale_b, fixed):
    """Write ``round(log1p(count * scale) * 2**24)`` of every stored count.

    Integer sums do not depend on the order of the terms, and thus not on chunks or threads.
    """
    table = np.empty(_TABLE, np.int64)
    for i in range(len(indptr) - 1):
        scale = scale_b[i]
        filled = 0
        for j in range(indptr[i], indptr[i + 1]):
            c = np.int64(data[np.uint64(j)])
            if c < _TABLE:
                while filled <= c:
                    table[filled] = _fix_log(filled, scale)
                    filled += 1
                fixed[np.uint64(j)] = table[np.uint64(c)]
            else:
                fixed[j] = _fix_log(c, scale)


@kernel()
def csr_pack_counts(indptr, indices, data, rows, measured_of_gene, ends, words):
    """Write the counts of some rows in words of 16 bits; return the number of words, or -1 if a count is too large.

    A word is ``step << 6 | count``, where the step leads from the measured gene of the last word to that of this one.
    Counts above 63, and steps that are negative or above 1,022, take three words: 65,535, measured gene, count.

    Parameters
    ----------
    indptr, indices, data
        (b + 1,), (nnz,), (nnz,): rows whose indices and counts have been checked.
    rows
        (k,) int64: the rows to write, in order.
    measured_of_gene
        (columns,) int32 below 65,536; columns of -1 are skipped.
    ends
        (k + 1,) int32 output: where the words of each row end.
    words
        uint16 output, three for each value.
    """
    at = 0
    ends[0] = 0
    for k in range(len(rows)):
        last = np.int64(0)
        for j in range(indptr[rows[k]], indptr[rows[k] + 1]):
            m = np.int64(measured_of_gene[np.uint64(indices[np.uint64(j)])])
            if m >= 0:
                c = np.int64(data[np.uint64(j)])
                step = m - last
                if c < _TABLE and 0 <= step <= 1022:
                    words[np.uint64(at)] = np.uint16(step << 6 | c)
                    at += 1
                elif c > 0xFFFF:
                    return -1
                else:
                    words[at], words[at + 1], words[at + 2] = PACK_ESCAPE, m, c
                    at += 3
                last = m
        ends[k + 1] = at
    return at


@kernel()
def add_packed(words, starts, ends, scale_b, row_b, order, sums):
    """Add ``round(log1p(count * scale) * 2**24)`` of the counts of each cell to the row of its group.

    Parameters
    ----------
    words
        (w,) uint16 as :func:`csr_pack_counts` writes them.
    starts, ends
        (b,) int64: the words of each cell.
    scale_b, row_b
        (b,) float64 and int32: the scale of a cell, and its row of ``sums``.
    order
        (b,) int64: the order in which to add the cells. By row, the sums of a row stay in the cache.
    sums
        (k, measured) int64.

    The values are those of :func:`csr_fixed_logs`. Oracle: ``test_sums``.
    """
    table = np.empty(_TABLE, np.int64)
    for i in order:
        scale = scale_b[i]
        row = sums[row_b[i]]
        filled = 0
        at, end = np.uint64(starts[i]), np.uint64(ends[i])
        g = np.uint64(0)
        while at < end:
            word = np.uint64(words[at])
            if word != PACK_ESCAPE:
                c = np.int64(word & np.uint64(63))
                g += word >> np.uint64(6)
                while filled <= c:
                    table[filled] = _fix_log(filled, scale)
                    filled += 1
                row[g] += table[np.uint64(c)]
                at += np.uint64(1)
            else:
                g = np.uint64(words[at + np.uint64(1)])
                c = np.int64(words[at + np.uint64(2)])
                row[g] += _fix_log(c, scale)
                at += np.uint64(3)


@kernel()
def csr_add_sums(indptr, indices, fixed, group_b, measured_of_gene, part, n_parts, sums):
    """Add the fixed-point logs of each cell to the row of its group; group -1 and genes of column -1 are skipped.

    Only groups with number ``part`` modulo ``n_parts`` are processed, so that threads add to different groups.

    ``sums`` is (k, measured) int64; :func:`csr_fill_work` has checked every index.
    """
    for i in range(len(indptr) - 1):
        k = group_b[i]
        if k >= 0 and k % n_parts == part:
            row = sums[k]
            for j in range(indptr[i], indptr[i + 1]):
                m = measured_of_gene[np.uint64(indices[np.uint64(j)])]
                if m >= 0:
                    row[np.uint64(m)] += fixed[np.uint64(j)]


@kernel()
def csc_fill_column(indices, data, row_of_cell, column):
    """Scatter the counts of one gene into ``column``, (n,) uint32 in store order; duplicates are summed.

    ``row_of_cell`` is (n_cells,) int32, with -1 for dropped cells. A sum beyond uint32 saturates at the largest
    value, which exceeds every supported count. Returns (fault, position).
    """
    n_cells = len(row_of_cell)
    for j in range(len(indices)):
        i = np.int64(indices[j])
        fault = check_entry(i, data[j], n_cells, MAX_COUNT)
        if fault != OK:
            return fault, j
        r = row_of_cell[i]
        if r >= 0:
            column[r] = np.uint32(min(np.int64(column[r]) + np.int64(data[j]), np.int64(4_294_967_295)))
    return OK, 0


@kernel()
def csc_add_libsize(indices, data, libsize):
    """Add the counts of some columns to ``libsize`` (n_cells,) int64; return (fault, position)."""
    n_cells = len(libsize)
    for j in range(len(indices)):
        i = np.int64(indices[j])
        fault = check_entry(i, data[j], n_cells, MAX_COUNT)
        if fault != OK:
            return fault, j
        libsize[i] += np.int64(data[j])
    return OK, 0


@kernel()
def column_add_sums(column, scale_n, group_n, sums_k):
    """Add the fixed-point logs of one gene (counts in store order) to the sums of its groups, (k,) int64."""
    for i in range(len(column)):
        if column[i] > 0:
            sums_k[group_n[i]] += np.int64(np.rint(np.log1p(column[i] * scale_n[i]) * FIXED_ONE))


@kernel(inline=True)
def _to_half(value):
    """Return the float16 bits of a finite float64 >= 0, rounded to nearest, ties to even."""
    if value < 6.103515625e-05:  # below the smallest normal number: steps of 2**-24
        return np.uint16(np.rint(value * 16777216.0))
    if value >= 65520.0:
        return np.uint16(0x7C00)
    mantissa, exponent = math.frexp(value)
    steps = np.int64(np.rint(mantissa * 2048.0))  # 1024 .. 2048
    return np.uint16(((exponent + 13) << 10) + steps)


@kernel(inline=True)
def _log_value(count, libsize, target, single):
    """Return log1p of a normalised count, in scanpy's single or double precision."""
    if single:
        q = np.float32(count) / (np.float32(libsize) / np.float32(target))
        return np.float64(np.float32(np.log1p(np.float64(q))))
    return np.log1p(np.float64(count) / (np.float64(libsize) / target))


@kernel()
def finish_rows(work, row_of, libsize_m, over, n_basis, target, single, packed, escapes, values):
    """Convert work rows to packed rows and value rows, in store order.

    Parameters
    ----------
    work
        (m, stride) uint16.
    row_of
        (m,) int64: work row of each store row.
    libsize_m
        (m,) int64 library sizes in store order.
    over
        (c, 3) int64 (store row, position, count), sorted: the counts >= 65,535.
    packed
        (m, n_basis) uint8 out.
    escapes
        (e, 3) int64 out: (store row, position, count) of counts >= 255, in order.
    values
        (m, stride) uint16 out: float16 bits; zero beyond the basis.

    Returns
    -------
    The number of escapes; if it exceeds ``len(escapes)``, the rest was not written. ``-r - 1`` if the counts
    of store row r exceed its library size.
    """
    table = np.empty(_TABLE, np.uint16)
    table[0] = 0
    n_esc = 0
    o = 0
    for r in range(len(row_of)):
        src = work[row_of[r]]
        dst = values[r]
        size = libsize_m[r]
        left = size
        largest = np.int64(0)
        for p in range(n_basis):
            c = np.int64(src[p])
            largest = max(largest, c)
            left -= c
        if left < 0:
            return -r - 1
        for c in range(1, min(largest, _TABLE - 1) + 1):
            table[c] = _to_half(_log_value(c, size, target, single))
        for p in range(n_basis):
            c = np.int64(src[p])
            if c < _TABLE:
                packed[r, p] = c
                dst[p] = table[c]
                continue
            if c == WORK_ESCAPE:
                while o < len(over) and (over[o, 0] < r or (over[o, 0] == r and over[o, 1] < p)):
                    o += 1
                c = over[o, 2]
                left -= c - WORK_ESCAPE
                if left < 0:
                    return -r - 1
            if c < BYTE_ESCAPE:
                packed[r, p] = c
            else:
                packed[r, p] = BYTE_ESCAPE
                if n_esc < len(escapes):
                    escapes[n_esc, 0], escapes[n_esc, 1], escapes[n_esc, 2] = r, p, c
                n_esc += 1
            dst[p] = _to_half(_log_value(c, size, target, single))
        dst[n_basis:] = 0
    return n_esc


@kernel()
def pack_frames(packed, escapes, starts, n_basis, out, sizes):
    """Write the payloads of all frames consecutively.

    A payload consists of the numbers of non-zeros and escapes (2 uint32), one bit per (gene, row) that is not zero, the
    non-zero bytes, and the counts of the escapes (uint32), all in gene order, so that values of a gene are adjacent.

    Parameters
    ----------
    packed
        (m, n_basis) uint8 rows, where 255 is an escape.
    escapes
        (e, 3) int64 (row, position, count), sorted.
    starts
        (frames + 1,) int64 rows.
    out, sizes
        uint8 out of sufficient size; (frames,) int64 sizes of the payloads in bytes.
    """
    at = 0
    e_row = 0
    for f in range(len(starts) - 1):
        r0, r1 = starts[f], starts[f + 1]
        n_rows = r1 - r0
        pointer = np.empty(n_rows, np.int64)
        for i in range(n_rows):
            while e_row < len(escapes) and escapes[e_row, 0] < r0 + i:
                e_row += 1
            pointer[i] = e_row
        begin = at
        bits = at + 8
        n_bits = (n_rows * n_basis + 7) // 8
        values = bits + n_bits
        nnz = 0
        n_esc = 0
        byte = np.uint8(0)
        bit = 0
        at_bits = bits
        for g in range(n_basis):
            for i in range(n_rows):
                c = packed[r0 + i, g]
                there = np.uint8(c != 0)
                byte |= there << bit
                out[values + nnz] = c  # a zero is overwritten by the next value
                nnz += there
                n_esc += c == BYTE_ESCAPE
                bit += 1
                if bit == 8:
                    out[at_bits] = byte
                    at_bits += 1
                    byte = np.uint8(0)
                    bit = 0
        if bit:
            out[at_bits] = byte
        at = values + nnz
        if n_esc:
            for g in range(n_basis):
                for i in range(n_rows):
                    if packed[r0 + i, g] == BYTE_ESCAPE:
                        _put_uint32(out, at, escapes[pointer[i], 2])
                        pointer[i] += 1
                        at += 4
        _put_uint32(out, begin, nnz)
        _put_uint32(out, begin + 4, n_esc)
        sizes[f] = at - begin
    return at


@kernel(inline=True)
def _put_uint32(out, at, value):
    for k in range(4):
        out[at + k] = (value >> (8 * k)) & 255


@kernel(inline=True)
def _get_uint32(raw, at):
    return np.int64(raw[at]) | np.int64(raw[at + 1]) << 8 | np.int64(raw[at + 2]) << 16 | np.int64(raw[at + 3]) << 24


@kernel()
def unpack_frame(raw, counts):
    """Write the counts of one payload (see :func:`pack_frames`) into (r, n_basis) uint32.

    Returns False if the payload does not belong to a frame of this shape.
    """
    n_rows, n_basis = counts.shape
    n_bits = (n_rows * n_basis + 7) // 8
    if len(raw) < 8 + n_bits:
        return False
    nnz, n_esc = _get_uint32(raw, 0), _get_uint32(raw, 4)
    if len(raw) != 8 + n_bits + nnz + 4 * n_esc:
        return False
    value = 8 + n_bits
    escape = value + nnz
    end = escape
    bit = 0
    for g in range(n_basis):
        for i in range(n_rows):
            c = np.int64(0)
            if raw[8 + (bit >> 3)] >> (bit & 7) & 1:
                if value == end:
                    return False
                c = np.int64(raw[value])
                value += 1
                if c == BYTE_ESCAPE:
                    if escape + 4 > len(raw):
                        return False
                    c = _get_uint32(raw, escape)
                    escape += 4
            counts[i, g] = c
            bit += 1
    return value == end and escape == len(raw)


@kernel()
def counts_to_csr(counts, at, indptr, indices, data):
    """Append the non-zeros of (r, n_basis) uint32 counts to CSR arrays from position ``at``; return the new end.

    With empty ``indices``, it only counts. ``indptr`` is (r,) int64: the end of each row.
    """
    write = len(indices) > 0
    for i in range(counts.shape[0]):
        for g in range(counts.shape[1]):
            if counts[i, g]:
                if write:
                    indices[at] = g
                    data[at] = counts[i, g]
                at += 1
        indptr[i] = at
    return at


@kernel()
def gather_rows(X, rows, places, start, stop, out):
    """Copy ``X[rows[i]]`` to ``out[places[i]]`` for i in start:stop; return False if a row is out of range.

    Parameters
    ----------
    X, out
        Rows of words (uint64, or uint16 if the width is not a multiple of four); ``X`` may be wider than ``out``.
    rows, places
        (m,) int64.
    """
    n, width = X.shape[0], out.shape[1]
    for i in range(start, stop):
        r = rows[i]
        if r < 0 or r >= n:
            return False
        src = X[r]
        dst = out[places[i]]
        for j in range(width):
            dst[j] = src[j]
    return True


@kernel()
def copy_rows(words, first, places, out):
    """Copy rows from anywhere in memory, ``out[places[i]] = words[first[i]:]``; return False if one is out of range.

    Parameters
    ----------
    words
        (w,) uint64 or uint16.
    first, places
        (m,) int64.
    out
        (n, width) with the same word type.
    """
    n, width = out.shape
    for i in range(len(first)):
        a, place = first[i], places[i]
        if a < 0 or a + width > len(words) or place < 0 or place >= n:
            return False
        src = words[a : a + width]
        dst = out[place]
        for j in range(width):
            dst[j] = src[j]
    return True


@kernel()
def draw_distinct(uniform, start, length, out):
    """Draw ``out.shape[1]`` distinct rows of each run (Floyd's algorithm), or with replacement if the run is too short.

    Parameters
    ----------
    uniform
        (sets, S) float64 in [0, 1).
    start, length
        (sets,) int64: the runs.
    out
        (sets, S) int64 rows.

    Source: Bentley and Floyd, "A sample of brilliance", CACM 30 (1987). A small hash table tests membership.
    """
    n_sets, S = out.shape
    size = 16
    while size < 4 * S:
        size *= 2
    slots = np.empty(size, np.int64)
    for s in range(n_sets):
        n = length[s]
        if n < S:
            for i in range(S):
                out[s, i] = start[s] + min(np.int64(uniform[s, i] * n), n - 1)
            continue
        slots[:] = -1
        for i in range(S):
            j = n - S + i
            t = min(np.int64(uniform[s, i] * (j + 1)), j)
            for _attempt in range(2):
                h = np.int64((np.uint64(t) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) & (size - 1)
                while slots[h] != -1 and slots[h] != t:
                    h = (h + 1) & (size - 1)
                if slots[h] == -1:
                    break
                t = j  # t is already in the sample, but j cannot be
            slots[h] = t
            out[s, i] = start[s] + t
    return 0
