"""Count histograms for every gene, in one pass over a CSR, CSC or dense chunk.

The histogram of a gene gives its mean, variance and any clipped moment exactly, because the
counts are small integers. Gene ``g`` owns the bins ``offsets[g] .. offsets[g + 1] - 1`` (bin v counts the value v; bin
0 collects explicit zeros and is not used); larger values go to an overflow list.

Every kernel checks its input: indices are bounds-checked, a row (or column) whose indices do not strictly
increase is searched for duplicates, and duplicates are summed as scipy's canonical form does. Values must be
whole numbers from 0 to ``MAX_COUNT``. A violation stops the kernel; ``state`` then holds the fault and its position.

Each row is processed twice: a first loop without branches, which vectorises, checks order
and values and writes them as int32; the second only scatters. Rows that fail the first loop (an index out of
order, a value that is fractional or at least 4,096) take the slow path, one value at a time.

Oracle of all kernels here: ``tests.oracles.count_histograms``.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.checks import check_count, check_entry
from vcelltools.kernels.faults import (
    BAD_INDEX,
    FAULT,
    MAX_COUNT,
    N_DUPLICATES,
    N_OVER,
    N_UNSORTED,
    POSITION,
    STAMP,
)

BLOCK = 4_096


@kernel(inline=True)
def _is_count(v):
    return v >= 0 and v <= MAX_COUNT and np.int64(v) == v


@kernel(inline=True)
def _is_increasing(indices, a, b):
    """Whether ``indices[a:b]`` strictly increases; written so that it vectorises."""
    part = indices[a:b]
    bad = np.int32(0)
    for j in range(1, len(part)):
        bad |= np.int32(part[j] <= part[j - 1])
    return bad == 0


@kernel(inline=True)
def _to_small_counts(values, out):
    """Write ``values`` as int32; return (whether any is not a whole number in 0 .. 4095, sum, non-zeros, maximum)."""
    bad = np.int32(0)
    total = np.int64(0)
    positive = np.int64(0)
    top = np.int32(0)
    for j in range(len(values)):
        v = values[j]
        ordinary = (v >= 0) & (v < 4096)
        c = np.int32(v if ordinary else values.dtype.type(0))
        bad |= np.int32(c != v)
        out[j] = c
        total += c
        positive += np.int64(c > 0)
        top = max(top, c)
    return bad != 0, total, positive, top


@kernel(inline=True)
def _sum_duplicates(indices, data, a, b, n_minor, last_minor, slot_minor, stamp, scratch_i, scratch_v):
    """Copy the entries ``a:b`` to the scratch arrays with duplicates summed.

    ``last_minor`` holds the stamp of the last row with an index, and ``slot_minor`` its position. Returns the
    number of entries kept, or -1 - j if ``indices[j]`` is out of range or ``data[j]`` is not a count, which a sum of
    counts would hide.
    """
    n = 0
    for j in range(a, b):
        i = np.int64(indices[j])
        if i < 0 or i >= n_minor or not _is_count(data[j]):
            return -1 - j
        v = np.float64(data[j])
        if last_minor[i] == stamp:
            scratch_v[slot_minor[i]] += v
        else:
            last_minor[i] = stamp
            slot_minor[i] = n
            scratch_i[n] = i
            scratch_v[n] = v
            n += 1
    return n


@kernel(inline=True)
def _find(indices, a, b, i):
    """Return the first position in ``a:b`` whose index is ``i``."""
    for j in range(a, b):
        if indices[j] == i:
            return j
    return a


@kernel()
def csr_histogram(
    indptr,
    indices,
    data,
    order_b,
    batch_b,
    offsets,
    hist,
    last_g,
    slot_g,
    scratch_i,
    scratch_v,
    scratch_c,
    over_key,
    over_value,
    library_size_b,
    genes_per_cell_b,
    from_row,
    state,
):
    """Add a CSR chunk to the histograms.

    Parameters
    ----------
    indptr, indices, data
        The chunk: (b + 1,) int64, (nnz,) int32 or int64, (nnz,) numbers.
    order_b
        (b,) int64: the order in which rows are visited (by batch, so that the bins of one batch stay in cache).
    batch_b
        (b,) int64: the batch of each row, or -1 to exclude the row from the histograms.
    offsets
        (g + 1,) int32 bin offsets; the width of a gene is the difference.
    hist
        (n_batches * offsets[g],) int32, added to.
    last_g, slot_g
        (g,) int64 scratch for the search for duplicates; ``last_g`` starts at 0 and is never reset.
    scratch_i, scratch_v, scratch_c
        Scratch as long as the longest row: int64, float64, int32.
    over_key, over_value
        int64 overflow list: batch * g + gene, and the value. It needs space for the longest row.
    library_size_b, genes_per_cell_b
        (b,) int64 outputs: the sum and the number of non-zero entries of each row.
    from_row
        The position in ``order_b`` at which to begin.
    state
        (STATE_SIZE,) int64, see :data:`vcelltools.kernels.faults.STATE_SIZE`.

    Returns
    -------
    int
        The number of entries of ``order_b`` that are done: fewer than b if the overflow list must be drained first, or
        if ``state[FAULT]`` reports a violation.

    Notes
    -----
    Cost: one random increment per non-zero; about half a billion non-zeros per second and thread.
    """
    n_genes = len(offsets) - 1
    n_bins = np.int64(offsets[n_genes])
    n_over = state[N_OVER]
    for k in range(from_row, len(order_b)):
        r = order_b[k]
        a, b = indptr[r], indptr[r + 1]
        if n_over + (b - a) > len(over_key):
            state[N_OVER] = n_over
            return k
        batch = batch_b[r]
        base = batch * n_bins
        increasing = _is_increasing(indices, a, b)
        if increasing and b > a and (indices[a] < 0 or indices[b - 1] >= n_genes):
            state[FAULT] = BAD_INDEX
            state[POSITION] = a if indices[a] < 0 else b - 1
            return k
        odd, total, positive, _ = _to_small_counts(data[a:b], scratch_c)
        if increasing and not odd:
            library_size_b[r] = total
            genes_per_cell_b[r] = positive
            if batch < 0:
                continue
            part = indices[a:b]
            for j in range(len(part)):
                g = np.uintp(part[j])
                to = offsets[g] + scratch_c[j]
                if to < offsets[g + np.uintp(1)]:
                    hist[np.uintp(base + to)] += 1
                else:
                    over_key[n_over] = batch * n_genes + np.int64(g)
                    over_value[n_over] = scratch_c[j]
                    n_over += 1
            continue
        n = b - a
        if increasing:
            for j in range(n):
                scratch_i[j] = indices[a + j]
                scratch_v[j] = data[a + j]
        else:
            state[N_UNSORTED] += 1
            state[STAMP] += 1
            n = _sum_duplicates(indices, data, a, b, n_genes, last_g, slot_g, state[STAMP], scratch_i, scratch_v)
            if n < 0:
                j = -1 - n
                state[FAULT] = check_entry(indices[j], data[j], n_genes, MAX_COUNT)
                state[POSITION] = j
                return k
            state[N_DUPLICATES] += (b - a) - n
        total = np.int64(0)
        positive = np.int64(0)
        for j in range(n):
            v = scratch_v[j]
            if not _is_count(v):
                state[FAULT] = check_count(v, MAX_COUNT)
                state[POSITION] = _find(indices, a, b, scratch_i[j])
                return k
            c = np.int64(v)
            if c == 0:
                continue
            g = scratch_i[j]
            total += c
            positive += 1
            if batch < 0:
                continue
            if c < offsets[g + 1] - offsets[g]:
                hist[base + offsets[g] + c] += 1
            else:
                over_key[n_over] = batch * n_genes + g
                over_value[n_over] = c
                n_over += 1
        library_size_b[r] = total
        genes_per_cell_b[r] = positive
    state[N_OVER] = n_over
    return len(order_b)


@kernel()
def csc_histogram(
    indptr,
    indices,
    data,
    first_col,
    n_genes,
    batch_n,
    local_hist,
    last_n,
    slot_n,
    scratch_i,
    scratch_v,
    scratch_c,
    over_key,
    over_value,
    max_w,
    library_size_n,
    genes_per_cell_n,
    from_col,
    state,
):
    """Count the columns of a CSC chunk; the histogram of a column is complete when the column is done.

    Parameters
    ----------
    indptr, indices, data
        The chunk: (w + 1,) int64, (nnz,) int32 or int64 cell positions, (nnz,) numbers.
    first_col, n_genes
        The gene of the first column, and the number of genes of the matrix.
    batch_n
        (n,) int32 batch of each cell (-1 excludes it), or (0,) if there is only one batch.
    local_hist
        (w, n_batches, width) int32, zero on entry.
    last_n, slot_n, scratch_i, scratch_v
        Scratch for duplicates, as in :func:`csr_histogram`; may be empty until a column needs it; the kernel then
        returns with ``state[N_UNSORTED]`` negative.
    scratch_c
        (BLOCK,) int32.
    max_w
        (w,) int64 output: the largest value below ``width`` in each column.
    library_size_n, genes_per_cell_n
        (n,) int64 and int32, added to.

    Returns
    -------
    int
        The number of columns done, as in :func:`csr_histogram`.
    """
    n_cells = len(library_size_n)
    width = local_hist.shape[2]
    fast_top = min(width, 4096)
    n_over = state[N_OVER]
    for k in range(from_col, len(indptr) - 1):
        a, b = indptr[k], indptr[k + 1]
        if n_over + (b - a) > len(over_key):
            state[N_OVER] = n_over
            return k
        gene = first_col + k
        top = np.int64(0)
        if _is_increasing(indices, a, b):
            if b > a and (indices[a] < 0 or indices[b - 1] >= n_cells):
                state[FAULT] = BAD_INDEX
                state[POSITION] = a if indices[a] < 0 else b - 1
                return k
            for start in range(a, b, 4096):
                stop = min(start + 4096, b)
                odd, _, _, block_top = _to_small_counts(data[start:stop], scratch_c)
                if not odd and block_top < fast_top and len(batch_n) == 0:
                    top = max(top, np.int64(block_top))
                    part = indices[start:stop]
                    for j in range(len(part)):
                        i = np.uintp(part[j])
                        c = scratch_c[j]
                        library_size_n[i] += c
                        genes_per_cell_n[i] += np.int32(c > 0)
                        local_hist[k, 0, np.uint32(c)] += 1
                    continue
                for j in range(start, stop):
                    v = data[j]
                    if not _is_count(v):
                        state[FAULT] = check_count(v, MAX_COUNT)
                        state[POSITION] = j
                        return k
                    c = np.int64(v)
                    if c == 0:
                        continue
                    i = np.int64(indices[j])
                    library_size_n[i] += c
                    genes_per_cell_n[i] += 1
                    batch = np.int64(batch_n[i]) if len(batch_n) else np.int64(0)
                    if batch < 0:
                        continue
                    if c < width:
                        local_hist[k, batch, c] += 1
                        top = max(top, c)
                    else:
                        over_key[n_over] = batch * n_genes + gene
                        over_value[n_over] = c
                        n_over += 1
        else:
            if len(last_n) == 0:
                state[N_OVER] = n_over
                state[N_UNSORTED] = -1 - state[N_UNSORTED]
                return k
            state[N_UNSORTED] += 1
            state[STAMP] += 1
            n = _sum_duplicates(indices, data, a, b, n_cells, last_n, slot_n, state[STAMP], scratch_i, scratch_v)
            if n < 0:
                j = -1 - n
                state[FAULT] = check_entry(indices[j], data[j], n_cells, MAX_COUNT)
                state[POSITION] = j
                return k
            state[N_DUPLICATES] += (b - a) - n
            for j in range(n):
                v = scratch_v[j]
                if not _is_count(v):
                    state[FAULT] = check_count(v, MAX_COUNT)
                    state[POSITION] = _find(indices, a, b, scratch_i[j])
                    return k
                c = np.int64(v)
                if c == 0:
                    continue
                i = scratch_i[j]
                library_size_n[i] += c
                genes_per_cell_n[i] += 1
                batch = np.int64(batch_n[i]) if len(batch_n) else np.int64(0)
                if batch < 0:
                    continue
                if c < width:
                    local_hist[k, batch, c] += 1
                    top = max(top, c)
                else:
                    over_key[n_over] = batch * n_genes + gene
                    over_value[n_over] = c
                    n_over += 1
        max_w[k] = top
    state[N_OVER] = n_over
    return len(indptr) - 1


@kernel()
def dense_histogram(
    block,
    first_col,
    n_genes,
    batch_b,
    offsets,
    hist,
    scratch_c,
    scratch_at,
    over_key,
    over_value,
    library_size_b,
    genes_per_cell_b,
    from_row,
    state,
):
    """Add a dense block (b cells × w genes from ``first_col``) to the histograms.

    Parameters
    ----------
    block
        (b, w) C-contiguous numbers.
    first_col, n_genes
        The gene of the first column of the block, and the number of genes of the matrix.
    batch_b
        (b,) int64 batch of each row, or -1 to exclude it.
    offsets, hist, over_key, over_value
        As in :func:`csr_histogram`; the list needs space for w entries.
    scratch_c, scratch_at
        (w,) and (w + 1,) int32.
    library_size_b, genes_per_cell_b
        (b,) int64, added to.

    Returns
    -------
    int
        The number of rows done.

    Notes
    -----
    Cost: about 0.6 ns per entry; zeros, which are most entries, are skipped without a branch.
    """
    n_bins = np.int64(offsets[n_genes])
    n_rows, width = block.shape
    n_over = state[N_OVER]
    for r in range(from_row, n_rows):
        if n_over + width > len(over_key):
            state[N_OVER] = n_over
            return r
        batch = batch_b[r]
        base = batch * n_bins
        row = block[r]
        odd, total, positive, _ = _to_small_counts(row, scratch_c)
        if odd:
            total = np.int64(0)
            positive = np.int64(0)
            for col in range(width):
                v = row[col]
                if not _is_count(v):
                    state[FAULT] = check_count(v, MAX_COUNT)
                    state[POSITION] = r * width + col
                    return r
                c = np.int64(v)
                total += c
                positive += np.int64(c > 0)
                scratch_c[col] = c
        library_size_b[r] += total
        genes_per_cell_b[r] += positive
        if batch < 0:
            continue
        n = 0
        for col in range(width):
            scratch_at[n] = col  # the next value overwrites this one if it is zero, which avoids a branch
            n += np.int64(scratch_c[col] != 0)
        for j in range(n):
            col = scratch_at[j]
            g = np.uintp(first_col + col)
            to = np.int64(offsets[g]) + scratch_c[col]
            if to < offsets[g + np.uintp(1)]:
                hist[np.uintp(base + to)] += 1
            else:
                over_key[n_over] = batch * n_genes + np.int64(g)
                over_value[n_over] = scratch_c[col]
                n_over += 1
    state[N_OVER] = n_over
    return n_rows
