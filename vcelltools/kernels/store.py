"""Kernels of the stores: counts into rows, rows into float16 and bytes, rows out again.

A work row is uint16 counts of the basis genes, 65,535 standing for "see the list". A packed row is uint8
counts, 255 standing for "see the escapes". A value row is the bits of float16 CP10K+log1p.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

OK, BAD_INDEX, NOT_FINITE, NEGATIVE, NOT_INTEGER, TOO_LARGE, LIST_FULL = range(7)
MAX_COUNT = 2_147_483_647
WORK_ESCAPE = 65_535
BYTE_ESCAPE = 255
FIXED_ONE = 1 << 24  # one unit of the fixed-point sums
_TABLE = 64  # counts below this are looked up, once computed for the cell


@kernel(inline=True)
def _check(value):
    """Return the status of one stored value as a count."""
    if not (value >= 0):
        return NEGATIVE if value < 0 else NOT_FINITE
    if value > MAX_COUNT:
        return NOT_FINITE if value == np.inf else TOO_LARGE
    return OK if value == np.floor(value) else NOT_INTEGER


@kernel()
def csr_fill_work(indptr, indices, data, basis_of_gene, out_row_b, libsize_b, work, over, status):
    """Scatter the basis counts of a chunk's cells into work rows and add up library sizes.

    Parameters
    ----------
    indptr, indices, data
        The chunk; indices unchecked.
    basis_of_gene
        (n_genes,) int32: position in the basis, -1 outside.
    out_row_b
        (b,) int64: row of ``work`` for each cell, -1 where the cell is not kept.
    libsize_b
        (b,) int64 out: the sum of all counts of the cell.
    work
        (m, stride) uint16 out; rows named in ``out_row_b`` are overwritten whole.
    over
        (c, 3) int64 out: (work row, position, count) of counts >= 65,535; ``status[3]`` of them.
    status
        (5,) int64 out: code, cell, stored position, entries in ``over``, cells whose indices do not rise.

    Cost: about 2 ns a stored value: three plain loops over a cell (values, order, scatter) are faster than one with
    branches. Oracle: ``store_rows``.
    """
    n_genes = len(basis_of_gene)
    stride = work.shape[1]
    row = np.zeros(stride + 1, np.int64)  # the first place takes what is outside the basis: position -1
    n_over = 0
    n_unsorted = 0
    for i in range(len(indptr) - 1):
        begin, end = indptr[i], indptr[i + 1]
        cells_data, cells_indices = data[begin:end], indices[begin:end]
        total = np.int64(0)
        bad = np.int32(0)
        for j in range(len(cells_data)):  # no branch, so that it is done eight values at a time
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
                if indices[j] < 0 or indices[j] >= n_genes:
                    status[0], status[1], status[2] = BAD_INDEX, i, j
                    return
                code = _check(data[j])
                if code != OK:
                    status[0], status[1], status[2] = code, i, j
                    return
        libsize_b[i] = total
        n_unsorted += unsorted
        r = out_row_b[i]
        if r < 0:
            continue
        row[:] = 0
        for j in range(begin, end):
            # unsigned, so that no index is tested for counting from the end
            row[np.uint64(basis_of_gene[np.uint64(indices[j])] + 1)] += np.int64(data[j])
        largest = np.int64(0)
        for p in range(stride):
            largest = max(largest, row[p + 1])
            work[r, p] = np.uint16(min(row[p + 1], WORK_ESCAPE))
        if largest >= WORK_ESCAPE:
            for p in range(stride):
                if row[p + 1] >= WORK_ESCAPE:
                    if n_over == len(over):
                        status[0], status[1], status[2] = LIST_FULL, i, begin
                        return
                    over[n_over, 0], over[n_over, 1], over[n_over, 2] = r, p, row[p + 1]
                    n_over += 1
    status[3] = n_over
    status[4] = n_unsorted


@kernel()
def csr_fixed_logs(indptr, data, scale_b, fixed):
    """Write ``round(log1p(count * scale) * 2**24)`` of every stored count.

    Integers add up to the same sum in any order, so that sums do not depend on chunks or threads.
    """
    table = np.empty(_TABLE, np.int64)
    for i in range(len(indptr) - 1):
        scale = scale_b[i]
        filled = 0
        for j in range(indptr[i], indptr[i + 1]):
            c = np.int64(data[np.uint64(j)])
            if c < _TABLE:
                while filled <= c:
                    table[filled] = np.int64(np.rint(np.log1p(filled * scale) * FIXED_ONE))
                    filled += 1
                fixed[np.uint64(j)] = table[np.uint64(c)]
            else:
                fixed[j] = np.int64(np.rint(np.log1p(c * scale) * FIXED_ONE))


@kernel()
def csr_add_sums(indptr, indices, fixed, group_b, measured_of_gene, part, n_parts, sums):
    """Add the fixed-point logs of each cell to its group's row; cells of group -1, genes of column -1 are left out.

    Of the groups, those whose number leaves ``part`` when divided by ``n_parts``: threads add to different ones.

    ``sums`` is (k, measured) int64; every index was checked by :func:`csr_fill_work`.
    """
    for i in range(len(indptr) - 1):
        k = group_b[i]
        if k >= 0 and k % n_parts == part:
            row = sums[k]
            for j in range(indptr[i], indptr[i + 1]):
                m = measured_of_gene[np.uint64(indices[np.uint64(j)])]
                if m >= 0:
                    row[np.uint64(m)] += fixed[np.uint64(j)]


@kernel(inline=True)
def _check_entry(index, value, n_cells):
    """Return the status of one entry of a column."""
    if index < 0 or index >= n_cells:
        return BAD_INDEX
    return _check(value)


@kernel()
def csc_fill_column(indices, data, row_of_cell, column, status):
    """Scatter one gene's counts into ``column``, a (n,) uint32 in store order; duplicates are summed.

    ``row_of_cell`` is (n_cells,) int32 with -1 for cells that are not kept. A sum beyond uint32 stays at its largest
    value, which is above every count that is allowed.
    ``status`` as in :func:`csr_fill_work` (code, position).
    """
    n_cells = len(row_of_cell)
    for j in range(len(indices)):
        i = np.int64(indices[j])
        code = _check_entry(i, data[j], n_cells)
        if code != OK:
            status[0], status[2] = code, j
            return
        r = row_of_cell[i]
        if r >= 0:
            column[r] = np.uint32(min(np.int64(column[r]) + np.int64(data[j]), np.int64(4_294_967_295)))


@kernel()
def csc_add_libsize(indices, data, libsize, status):
    """Add the counts of some columns to ``libsize`` (n_cells,) int64."""
    n_cells = len(libsize)
    for j in range(len(indices)):
        i = np.int64(indices[j])
        code = _check_entry(i, data[j], n_cells)
        if code != OK:
            status[0], status[2] = code, j
            return
        libsize[i] += np.int64(data[j])


@kernel()
def column_add_sums(column, scale_n, group_n, sums_k):
    """Add one gene's fixed-point logs (counts in store order) to its groups' sums (k,) int64."""
    for i in range(len(column)):
        if column[i] > 0:
            sums_k[group_n[i]] += np.int64(np.rint(np.log1p(column[i] * scale_n[i]) * FIXED_ONE))


@kernel(inline=True)
def _to_half(value):
    """Return the float16 bits of a finite float64 >= 0, rounded once to nearest, ties to even."""
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
    """Turn work rows into packed rows and value rows, in store order.

    Parameters
    ----------
    work
        (m, stride) uint16.
    row_of
        (m,) int64: the work row of each store row.
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
    The number of escapes; where it exceeds ``len(escapes)``, those beyond were not written. ``-r - 1`` where the counts
    of store row r are more than its library size.
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
    """Write the payload of every frame, one after the other.

    A payload is: non-zeros and escapes of the frame (2 uint32), one bit a (gene, row) that is not zero, the
    non-zero bytes, the escapes' counts (uint32); all gene by gene, so that equal genes lie side by side.

    Parameters
    ----------
    packed
        (m, n_basis) uint8 rows, 255 an escape.
    escapes
        (e, 3) int64 (row, position, count), sorted.
    starts
        (frames + 1,) int64 rows.
    out, sizes
        uint8 out, large enough; (frames,) int64 bytes of each payload.
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
                out[values + nnz] = c  # what is zero is overwritten by the next
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

    Returns False where the payload is not that of a frame of this shape.
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

    With empty ``indices`` it only counts. ``indptr`` is (r,) int64: the end of each row.
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
    """Copy ``X[rows[i]]`` to ``out[places[i]]`` for i in start:stop; False where a row is out of range.

    Parameters
    ----------
    X, out
        Rows of words of one width (uint64, or uint16 where the width is no multiple of four); ``X`` may be wider.
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
    """Copy rows that lie anywhere in memory: ``out[places[i]] = words[first[i]:]``; False where one is out of range.

    Parameters
    ----------
    words
        (w,) uint64 or uint16.
    first, places
        (m,) int64.
    out
        (n, width) of the same words.
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
    """Draw ``out.shape[1]`` distinct rows of each run (Floyd's algorithm), or with replacement where short.

    Parameters
    ----------
    uniform
        (sets, S) float64 in [0, 1).
    start, length
        (sets,) int64: the runs.
    out
        (sets, S) int64 rows.

    Source: Bentley and Floyd, "A sample of brilliance", CACM 30 (1987). Membership is a small hash table.
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
                t = j  # t is in the sample already; j cannot be
            slots[h] = t
            out[s, i] = start[s] + t
    return 0
