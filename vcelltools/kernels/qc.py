"""Quality metrics of cells: counts of marked genes and of the top genes of each cell, and sums by batch."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def measure_rows(indptr, indices, data, marked, n_leading, heap, batch, marked_out, leading_out, sums, cells):
    """Sum the counts of marked genes, and of the ``n_leading`` genes with the most counts, in each cell.

    Also add up the counts, and the cells with a count, of every gene in each batch.

    The largest counts are kept in a min-heap, so that one pass over a row suffices.

    Parameters
    ----------
    indptr, indices, data
        (b + 1,) int64, (nnz,), (nnz,): rows with every gene once, in any order, and no zeros.
    marked
        (g,) bool.
    heap
        (n_leading,) int64 scratch.
    batch
        (b,) int64 batch of each cell.
    marked_out, leading_out
        (b,) int64 output.
    sums, cells
        (k, g) int64 and int32, added to.
    """
    for i in range(len(indptr) - 1):
        n, k = 0, batch[i]
        total = np.int64(0)
        of_marked = np.int64(0)
        for j in range(indptr[i], indptr[i + 1]):
            v = np.int64(data[j])
            g = indices[j]
            if marked[g]:
                of_marked += v
            sums[k, g] += v
            cells[k, g] += 1
            if n < n_leading:
                at = n
                n += 1
                total += v
                while at > 0 and heap[(at - 1) // 2] > v:
                    heap[at] = heap[(at - 1) // 2]
                    at = (at - 1) // 2
                heap[at] = v
            elif v > heap[0]:
                total += v - heap[0]
                at = 0
                while True:
                    child = 2 * at + 1
                    if child >= n:
                        break
                    if child + 1 < n and heap[child + 1] < heap[child]:
                        child += 1
                    if heap[child] >= v:
                        break
                    heap[at] = heap[child]
                    at = child
                heap[at] = v
        marked_out[i] = of_marked
        leading_out[i] = total
