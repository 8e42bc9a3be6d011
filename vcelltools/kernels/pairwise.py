"""Sum the values of groups in numpy's order for a contiguous array (pairwise, with eight lanes per leaf)."""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel


@kernel()
def bucket_pairwise(
    start_bg, stop_bg, values, slots, g0, g1, first_l, lanes_l, tail_l, merges_l, leaf_k, slot_sum, sum_kg
):
    """Sum the values of the genes ``g0:g1`` by group, rounding to the precision of the values at every step.

    Parameters
    ----------
    start_bg, stop_bg
        (blocks, g) the range of each gene's values in each block.
    values, slots
        The buckets: values, and the slot to which the cell of each value is added.
    first_l, lanes_l, tail_l, merges_l
        (leaves,) the first slot of the leaf, its lanes (1 or 8), the remaining single cells, and the number of pairs of
        finished sums to add once it is done.
    leaf_k
        (k + 1,) the start of the leaves of each group.
    slot_sum
        (slots,) workspace with the type of the values.
    sum_kg
        Output. Oracle: ``numpy.add.reduce``.
    """
    stack = np.empty(64, slot_sum.dtype)
    for g in range(g0, g1):
        slot_sum[:] = 0
        for b in range(start_bg.shape[0]):
            for j in range(start_bg[b, g], stop_bg[b, g]):
                at = np.uint64(j)
                slot_sum[np.uint64(slots[at])] += values[at]
        for k in range(len(leaf_k) - 1):
            depth = 0
            for m in range(leaf_k[k], leaf_k[k + 1]):
                f = first_l[m]
                if lanes_l[m] == 8:
                    for width in (1, 2, 4):
                        for i in range(0, 8, 2 * width):
                            slot_sum[f + i] += slot_sum[f + i + width]
                for i in range(tail_l[m]):
                    slot_sum[f] += slot_sum[f + lanes_l[m] + i]
                stack[depth] = slot_sum[f]
                depth += 1
                for _ in range(merges_l[m]):
                    depth -= 1
                    stack[depth - 1] += stack[depth]
            if depth:
                sum_kg[k, g] = stack[0]
