"""Rank sums of all groups against one control group, with one joint sort per gene for all groups.

Only the ranks *within the controls* matter for a Mann-Whitney U, so sorting the positive values of a gene once,
all groups together, and sweeping them while counting the controls passed gives U of every group at the same time.
Zeros are not sorted: they are one tie block of known size. The cost is O(non-zeros) plus the
groups × genes outputs; no matrix is densified or transposed.

Each gene is gathered from the buckets (:mod:`vcelltools.kernels.bucket`), sorted and swept separately. Positive
floats sort like their bits, so the sort is a radix sort on ``(bits - smallest) << group_bits | group``.

Statistics: two-sided Mann-Whitney U with mid-ranks and tie correction (Mann & Whitney 1947; Lehmann,
Nonparametrics, 1975, ch. 1), optional continuity correction 0.5. Oracle: ``scipy.stats.mannwhitneyu``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.pvalues import get_two_sided_p
from vcelltools.kernels.sorting import ALL_BITS, DIGIT, RADIX, SHORT, insert_sort, radix_pass, radix_sort
from vcelltools.kernels.transform import expm1_small


@kernel()
def _sort_by_value(buf, n, low, bits, hist, tmp):
    """Sort ``buf[:n]`` (uint64) by the bits ``low .. low + bits - 1``; ``tmp`` is as long, ``hist`` has RADIX entries.

    Up to 22 of the highest bits are sorted by radix, in two passes. Few values still share them: those that are out
    of order are sorted by insertion, or again by radix if a run of them is long.
    """
    mask = ALL_BITS << np.uint64(low)
    if n < SHORT:
        insert_sort(buf, 0, n, mask)
        return
    if bits == 0:
        return
    width = 6  # about as many bins as values
    while width < DIGIT and (2 << width) < n:
        width += 1
    head = min(bits, 2 * width)
    rest = bits - head
    width = (head + 1) // 2
    radix_pass(buf, 0, n, low + rest, width, hist, tmp)
    radix_pass(tmp, 0, n, low + rest + width, head - width, hist, buf)
    if rest == 0:
        return
    high = np.uint64(low + rest)
    i = 1
    while i < n:
        if (buf[np.uint64(i)] & mask) >= (buf[np.uint64(i - 1)] & mask):
            i += 1
            continue
        value = buf[i] >> high
        lo = i - 1
        while lo > 0 and (buf[lo - 1] >> high) == value:
            lo -= 1
        hi = i + 1
        while hi < n and (buf[hi] >> high) == value:
            hi += 1
        if hi - lo <= SHORT:
            insert_sort(buf, lo, hi, mask)
        else:
            radix_sort(buf, lo, hi, low, low + rest, hist, tmp)
        i = hi


PIECE = 512
"""Number of values that are transformed at once, so that they stay in the first cache."""


class Buckets(NamedTuple):
    """Values sorted by gene, in blocks of cells (:mod:`vcelltools.kernels.bucket`)."""

    start_bg: np.ndarray
    """(blocks, g) int64: the start of the values of each gene in each block."""
    stop_bg: np.ndarray
    """(blocks, g) int64: their end."""
    keys: np.ndarray
    """(m,) uint32 or uint64: the bits of the positive values."""
    values: np.ndarray
    """(m,) float32 or float64: the same memory as numbers."""
    groups: np.ndarray
    """(m,) uint16: the group of the cell of each value."""
    first: int
    """The gene of the first column of ``start_bg`` and ``stop_bg``."""


class RankTask(NamedTuple):
    """The task for every gene."""

    size_k: np.ndarray
    """(k,) int64: number of cells in each group."""
    control: int
    """The control group."""
    continuity: float
    """0.5 or 0.0."""
    with_test: bool
    """Whether to sort and test."""
    moment: int
    """The additional sum: 0 for none, 1 for expm1 of the values, 2 for log1p."""
    inverse_k: np.ndarray
    """(k,) factors of the values in ``single_kg``, in its precision; empty to skip this sum."""


class RankOutput(NamedTuple):
    """The outputs per gene; the rows of the controls in U, ties and p are not written."""

    sum_kg: np.ndarray
    """(k, g) float64: sums of the values."""
    nnz_kg: np.ndarray
    """(k, g) int64: numbers of values."""
    moment_kg: np.ndarray
    """(k, g) float64: sums of expm1 or log1p of the values."""
    single_kg: np.ndarray
    """(k, g): sums of value · factor in float32 or float64, rounded at every step, in cell order."""
    u_kg: np.ndarray
    """(k, g) float64: U of the group."""
    tie_kg: np.ndarray
    """(k, g) float64: sum of t³ − t over the ties of group and controls."""
    p_kg: np.ndarray
    """(k, g) float64: two-sided asymptotic p."""
    control_tie_g: np.ndarray
    """(g,) float64: sum of t³ − t over the positive ties within the controls."""
    max_g: np.ndarray
    """(g,) float64: the largest value."""


class RankScratch(NamedTuple):
    """Scratch memory of one thread, made by :func:`make_rank_scratch`."""

    buf: np.ndarray
    """(largest gene,) uint64."""
    tmp: np.ndarray
    """(largest gene,) uint64."""
    line: np.ndarray
    """(largest gene,) float64."""
    piece_2s: np.ndarray
    """(2, PIECE) float64."""
    hist: np.ndarray
    """(RADIX,) int64."""
    real_sk: np.ndarray
    """(4, k) float64."""
    count_sk: np.ndarray
    """(4, k) int64."""
    single_k: np.ndarray
    """(k,) with the precision of ``inverse_k``."""


def make_rank_scratch(largest: int, n_groups: int, single: np.dtype) -> RankScratch:
    """Return the scratch of one thread for genes of up to ``largest`` values."""
    buf, tmp, line = np.empty(largest, np.uint64), np.empty(largest, np.uint64), np.empty(largest)
    real, count = np.empty((4, n_groups)), np.empty((4, n_groups), np.int64)
    return RankScratch(
        buf, tmp, line, np.empty((2, PIECE)), np.empty(RADIX, np.int64), real, count, np.empty(n_groups, single)
    )


@kernel()
def _gather(buckets, g, task, shift, scratch):
    """Copy the keys of a gene and their groups to ``buf`` and sum its values; return (n, top, lowest key, largest)."""
    keys, values, groups = buckets.keys, buckets.values, buckets.groups
    buf, single_k, inverse_k = scratch.buf, scratch.single_k, task.inverse_k
    total_k, lost_k, moment_k = scratch.real_sk[0], scratch.real_sk[1], scratch.real_sk[2]
    nnz_k, line = scratch.count_sk[0], scratch.line
    total_k[:] = 0.0
    lost_k[:] = 0.0
    moment_k[:] = 0.0
    single_k[:] = 0.0
    nnz_k[:] = 0
    wide = values.itemsize == 8
    n = 0
    top = 0.0
    low_key = ALL_BITS
    high_key = np.uint64(0)
    column = g - buckets.first
    for b in range(buckets.start_bg.shape[0]):
        start, stop = buckets.start_bg[b, column], buckets.stop_bg[b, column]
        for j in range(start, stop):
            at = np.uint64(j)
            k = np.uint64(groups[at])
            key = np.uint64(keys[at])
            v = values[at]
            if wide:  # compensated, because a mean must not depend on the order of the cells
                step = v - lost_k[k]
                grown = total_k[k] + step
                lost_k[k] = (grown - total_k[k]) - step
                total_k[k] = grown
            else:
                total_k[k] += v
            nnz_k[k] += 1
            top = max(top, np.float64(v))
            buf[np.uint64(n)] = (key << shift) | k
            line[np.uint64(n)] = v
            low_key = min(low_key, key)
            high_key = max(high_key, key)
            n += 1
        if task.moment == 2:
            for j in range(start, stop):
                at = np.uint64(j)
                moment_k[np.uint64(groups[at])] += math.log1p(np.float64(values[at]))
        if len(inverse_k) > 0:
            for j in range(start, stop):
                at = np.uint64(j)
                k = np.uint64(groups[at])
                single_k[k] += values[at] * inverse_k[k]
    if task.moment == 1:
        grown, powers = scratch.piece_2s[0], scratch.piece_2s[1]
        bits = powers.view(np.int64)
        group_mask = (np.uint64(1) << shift) - np.uint64(1)
        for a in range(0, n, PIECE):
            m = min(PIECE, n - a)
            expm1_small(line[a : a + m], m, bits, powers, grown)
            for i in range(m):
                moment_k[buf[np.uint64(a + i)] & group_mask] += grown[np.uint64(i)]
    return n, top, low_key, high_key


@kernel()
def _order_wide(buckets, g, n):
    """Return the sorted (keys, groups) of a gene whose float64 values do not fit into a key with the group."""
    whole = np.empty(n, np.uint64)
    owner = np.empty(n, np.uint64)
    m = 0
    for b in range(buckets.start_bg.shape[0]):
        for j in range(buckets.start_bg[b, g - buckets.first], buckets.stop_bg[b, g - buckets.first]):
            whole[m] = np.uint64(buckets.keys[j])
            owner[m] = np.uint64(buckets.groups[j])
            m += 1
    order = np.argsort(whole, kind="mergesort")
    return whole[order], owner[order]


@kernel()
def _sweep(done, group_of, by, n, group_mask, task, scratch):
    """Sweep the values of a gene in order, counting the controls passed; return Σ t³ − t over ties within the controls.

    On entry, ``double_u_k`` and ``extra_k`` hold the contribution of the zeros.

    A forward pass notes the controls below each value, and a backward pass those up to it, so 2·U grows by their sum.
    Every value adds its own part of the ties: the c-th of its group (from 0) among a tied controls adds
    3·(a + c)·(a + c + 1), which sums to (a + t)³ − (a + t) − (a³ − a). There are no branches, because whether a value
    is tied cannot be predicted.
    """
    nnz_k, double_u_k, count_k, run_k = (
        scratch.count_sk[0],
        scratch.count_sk[1],
        scratch.count_sk[2],
        scratch.count_sk[3],
    )
    extra_k, below = scratch.real_sk[3], scratch.tmp
    own = np.uint64(task.control)
    run_k[:] = -1
    extra_k[own] = 0.0
    passed = task.size_k[task.control] - nnz_k[task.control]
    start = passed
    last = ~(done[0] >> by)
    for m in range(n):
        i = np.uint64(m)
        value = done[i] >> by
        start = start if value == last else passed
        last = value
        passed += (group_of[i] & group_mask) == own
        below[i] = np.uint64(start)
    stop, run = passed, 0
    last = ~(done[np.uint64(n - 1)] >> by)
    for m in range(n):
        i = np.uint64(n - 1 - m)
        value = done[i] >> by
        tied = value == last
        stop = stop if tied else passed
        run += not tied
        last = value
        at = group_of[i] & group_mask
        is_control = at == own
        start = np.int64(below[i])
        count = count_k[at] if run_k[at] == run else 0
        run_k[at], count_k[at] = run, count + 1
        double_u_k[at] += start + stop
        s = np.float64((0 if is_control else stop - start) + count)
        extra_k[at] += 3.0 * s * (s + 1.0)
        passed -= is_control
    return extra_k[own]


@kernel()
def bucket_rank_sum(buckets, g0, g1, task, scratch, out):
    """Write sums, U, tie terms and asymptotic p-values of the genes ``g0:g1``.

    Parameters
    ----------
    buckets, task, scratch, out
        :class:`Buckets`, :class:`RankTask`, :class:`RankScratch`, :class:`RankOutput`.

    Notes
    -----
    Cost: O(non-zeros) for the sort and the sweep, and k per gene.
    """
    size_k, control = task.size_k, task.control
    k_groups = len(size_k)
    total_k, moment_k, extra_k = scratch.real_sk[0], scratch.real_sk[2], scratch.real_sk[3]
    nnz_k, double_u_k = scratch.count_sk[0], scratch.count_sk[1]
    group_bits = 0
    while (1 << group_bits) < k_groups:
        group_bits += 1
    group_mask = np.uint64((1 << group_bits) - 1)
    shift = np.uint64(group_bits)
    size_c = size_k[control]
    for g in range(g0, g1):
        n, top, low_key, high_key = _gather(buckets, g, task, shift, scratch)
        out.max_g[g] = top
        for k in range(k_groups):
            out.sum_kg[k, g] = total_k[k]
            out.nnz_kg[k, g] = nnz_k[k]
            if task.moment != 0:
                out.moment_kg[k, g] = moment_k[k]
            if len(task.inverse_k) > 0:
                out.single_kg[k, g] = scratch.single_k[k]
        if not task.with_test:
            continue
        # the zeros are one tie block of known size
        zeros_c = size_c - nnz_k[control]
        for k in range(k_groups):
            zeros = size_k[k] - nnz_k[k]
            double_u_k[k] = zeros * zeros_c
            t = np.float64(zeros + zeros_c)
            extra_k[k] = t * t * t - t
        shared = 0.0
        if n > 0:
            value_bits = 0
            while value_bits < 64 and ((high_key - low_key) >> np.uint64(value_bits)) != 0:
                value_bits += 1
            if value_bits + group_bits <= 64:
                least = low_key << shift  # an overflow cancels out, so the difference is exact
                for m in range(n):
                    scratch.buf[m] -= least
                _sort_by_value(scratch.buf, n, group_bits, value_bits, scratch.hist, scratch.tmp)
                shared = _sweep(scratch.buf, scratch.buf, shift, n, group_mask, task, scratch)
            else:
                done, group_of = _order_wide(buckets, g, n)
                shared = _sweep(done, group_of, np.uint64(0), n, group_mask, task, scratch)
        out.control_tie_g[g] = shared
        for k in range(k_groups):
            if k != control:
                u, tie = double_u_k[k] / 2.0, extra_k[k] + shared
                out.u_kg[k, g] = u
                out.tie_kg[k, g] = tie
                expressed = nnz_k[k] + nnz_k[control] > 0
                n1, n2 = np.float64(size_k[k]), np.float64(size_c)
                out.p_kg[k, g] = get_two_sided_p(u, tie, n1, n2, task.continuity) if expressed else 1.0


@kernel()
def bucket_counts_below(start_bg, stop_bg, keys, groups, control, key_g, below_g, equal_g):
    """Count the positive control values of each gene below and equal to ``key_g``, both as bits."""
    for g in range(len(key_g)):
        for b in range(start_bg.shape[0]):
            for j in range(start_bg[b, g], stop_bg[b, g]):
                if groups[j] == control:
                    if keys[j] < key_g[g]:
                        below_g[g] += 1
                    elif keys[j] == key_g[g]:
                        equal_g[g] += 1
