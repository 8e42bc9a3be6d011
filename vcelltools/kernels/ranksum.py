"""Rank sums of every group against one control group: one joint sort per gene serves all groups.

Only the ranks *within the controls* matter for a Mann-Whitney U, so sorting the positive values of a gene once,
all groups together, and sweeping them while counting "controls passed" gives U of every group at the same time.
Zeros never enter the sort: they are one tie block whose sizes are known. Cost O(non-zeros) plus the
groups × genes outputs; nothing is ever densified and CSR is never transposed as a whole.

Each gene is gathered from the buckets (:mod:`vcelltools.kernels.bucket`), sorted and swept by itself. Positive
floats order as their bits do, so the sort is a radix sort on ``(bits - smallest) << group_bits | group``.

Statistics: two-sided Mann-Whitney U with mid-ranks and tie correction (Mann & Whitney 1947; Lehmann,
Nonparametrics, 1975, ch. 1), optional continuity correction 0.5. Oracle: ``scipy.stats.mannwhitneyu``.
"""

from __future__ import annotations

import math

import numpy as np

from vcelltools.kernels._jit import kernel

RADIX = 2048
"""Width of the workspace ``hist``."""


@kernel(inline=True)
def _insert(buf, mask, lo, hi):
    """Sort ``buf[lo:hi]`` by its bits in ``mask``, by insertion; equal ones stay in order."""
    for i in range(lo + 1, hi):
        x = buf[i]
        key = x & mask
        j = i - 1
        while j >= lo and (buf[j] & mask) > key:
            buf[j + 1] = buf[j]
            j -= 1
        buf[j + 1] = x


@kernel()
def radix_pass(src, dst, lo, hi, shift, width, hist):  # pragma: no cover  compiled
    """Distribute ``src[lo:hi]`` over ``dst[lo:hi]`` by ``width`` bits from ``shift`` up, in order."""
    digit = np.uint64((1 << width) - 1)
    by = np.uint64(shift)
    hist[: 1 << width] = 0
    for i in range(lo, hi):
        hist[(src[np.uint64(i)] >> by) & digit] += 1
    total = lo
    for b in range(1 << width):
        c = hist[b]
        hist[b] = total
        total += c
    for i in range(lo, hi):
        x = src[np.uint64(i)]
        b = (x >> by) & digit
        to = hist[b]
        hist[b] = to + 1
        dst[np.uint64(to)] = x


@kernel()
def sort_bits(buf, tmp, n, low, bits, hist):  # pragma: no cover  compiled
    """Sort ``buf[:n]`` (uint64) by its bits ``low .. low + bits - 1``; ``tmp`` is as long, ``hist`` has RADIX places.

    Up to 22 of the highest bits go by radix, in two passes. Values that still share them are few: where they are out
    of order they are finished by insertion, or by radix again where a run of them is long.
    """
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) << np.uint64(low)
    if n < 48:
        _insert(buf, mask, 0, n)
        return
    if bits == 0:
        return
    width = 6  # about as many places as values
    while width < 11 and (2 << width) < n:
        width += 1
    head = min(bits, 2 * width)
    rest = bits - head
    width = (head + 1) // 2
    radix_pass(buf, tmp, 0, n, low + rest, width, hist)
    radix_pass(tmp, buf, 0, n, low + rest + width, head - width, hist)
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
        if hi - lo <= 48:
            _insert(buf, mask, lo, hi)
        else:
            at = low
            while at < low + rest:
                step = min(11, low + rest - at)
                radix_pass(buf, tmp, lo, hi, at, step, hist)
                for q in range(lo, hi):
                    buf[q] = tmp[q]
                at += step
        i = hi


@kernel()
def bucket_rank_sum(
    start_bg,
    stop_bg,
    keys,
    values,
    groups,
    g0,
    g1,
    size_k,
    control,
    continuity,
    with_test,
    moment,
    inverse_k,
    buf,
    tmp,
    hist,
    sum_kg,
    nnz_kg,
    moment_kg,
    single_kg,
    u_kg,
    tie_kg,
    p_kg,
    control_tie_g,
    max_g,
):  # pragma: no cover  compiled
    """Sums, U, tie terms and asymptotic p-values of the genes ``g0:g1``.

    Parameters
    ----------
    start_bg, stop_bg
        (blocks, g) where each block keeps each gene's values.
    keys, values, groups
        The buckets: value bits, the same memory as floats, group codes.
    size_k
        (k,) int64 cells of each group.
    control
        The control's group.
    continuity
        0.5 or 0.0.
    with_test
        Whether to sort and test.
    moment
        0: no further sum; 1: of expm1 of the values; 2: of their log1p.
    inverse_k
        (k,) factors of the values in ``single_kg``, in its precision, or empty for no such sum.
    buf, tmp, hist
        uint64 workspaces of at least the largest gene's values; (RADIX,) int64.
    sum_kg, nnz_kg, moment_kg, u_kg, tie_kg, p_kg
        Outputs; U of the group (not of the controls); the control's own rows are left alone.
    control_tie_g
        Output: sum of t³ − t over the positive ties among the controls alone.
    max_g
        Output: the largest value.
    single_kg
        Output: the sum of value · factor in float32 or float64, rounded at every step, in cell order.
    """
    k_groups = len(size_k)
    group_bits = 0
    while (1 << group_bits) < k_groups:
        group_bits += 1
    group_mask = np.uint64((1 << group_bits) - 1)
    total_k = np.zeros(k_groups)
    lost_k = np.zeros(k_groups)
    moment_k = np.zeros(k_groups)
    single_k = np.zeros(k_groups, inverse_k.dtype)
    with_single = len(inverse_k) > 0
    wide = values.itemsize == 8
    nnz_k = np.zeros(k_groups, np.int64)
    count_k = np.zeros(k_groups, np.int64)
    double_u_k = np.zeros(k_groups, np.int64)
    extra_k = np.zeros(k_groups)
    touched = np.zeros(k_groups, np.int64)
    shift, own = np.uint64(group_bits), np.uint64(control)
    n_blocks = start_bg.shape[0]
    size_c = size_k[control]
    root2 = math.sqrt(2.0)
    for g in range(g0, g1):
        total_k[:] = 0.0
        lost_k[:] = 0.0
        moment_k[:] = 0.0
        single_k[:] = 0.0
        nnz_k[:] = 0
        n = 0
        top = 0.0
        low_key = np.uint64(0xFFFFFFFFFFFFFFFF)
        high_key = np.uint64(0)
        for b in range(n_blocks):
            start, stop = start_bg[b, g], stop_bg[b, g]
            for j in range(start, stop):
                at = np.uint64(j)
                k = np.uint64(groups[at])
                key = np.uint64(keys[at])
                v = values[at]
                if wide:  # compensated: a mean must not depend on the order of the cells
                    step = v - lost_k[k]
                    grown = total_k[k] + step
                    lost_k[k] = (grown - total_k[k]) - step
                    total_k[k] = grown
                else:
                    total_k[k] += v
                nnz_k[k] += 1
                top = max(top, np.float64(v))
                buf[np.uint64(n)] = (key << shift) | k
                low_key = min(low_key, key)
                high_key = max(high_key, key)
                n += 1
            if moment == 1:
                for j in range(start, stop):
                    at = np.uint64(j)
                    moment_k[np.uint64(groups[at])] += math.expm1(np.float64(values[at]))
            elif moment == 2:
                for j in range(start, stop):
                    at = np.uint64(j)
                    moment_k[np.uint64(groups[at])] += math.log1p(np.float64(values[at]))
            if with_single:
                for j in range(start, stop):
                    at = np.uint64(j)
                    k = np.uint64(groups[at])
                    single_k[k] += values[at] * inverse_k[k]
        max_g[g] = top
        for k in range(k_groups):
            sum_kg[k, g] = total_k[k]
            nnz_kg[k, g] = nnz_k[k]
            if moment != 0:
                moment_kg[k, g] = moment_k[k]
            if with_single:
                single_kg[k, g] = single_k[k]
        if not with_test:
            continue
        # the zeros: one tie block, known without looking
        zeros_c = size_c - nnz_k[control]
        for k in range(k_groups):
            zeros = size_k[k] - nnz_k[k]
            double_u_k[k] = zeros * zeros_c
            t = np.float64(zeros + zeros_c)
            extra_k[k] = t * t * t - t
        shared = 0.0
        if n > 0:
            span = high_key - low_key
            value_bits = 0
            while value_bits < 64 and (span >> np.uint64(value_bits)) != 0:
                value_bits += 1
            if value_bits + group_bits <= 64:
                least = low_key << shift  # what ran over the top comes back: the difference is exact
                for m in range(n):
                    buf[m] -= least
                sort_bits(buf, tmp, n, group_bits, value_bits, hist)
                done, group_of, by = buf, buf, shift
            else:
                # float64 values of more than 64 - group_bits bits: sort positions by value instead
                whole = np.empty(n, np.uint64)
                owner = np.empty(n, np.uint64)
                m = 0
                for b in range(n_blocks):
                    for j in range(start_bg[b, g], stop_bg[b, g]):
                        whole[m] = np.uint64(keys[j])
                        owner[m] = np.uint64(groups[j])
                        m += 1
                order = np.argsort(whole, kind="mergesort")
                done = whole[order]
                group_of = owner[order]
                by = np.uint64(0)
            passed = zeros_c
            i = 0
            while i < n:
                value = done[np.uint64(i)] >> by
                j = i + 1
                while j < n and (done[np.uint64(j)] >> by) == value:
                    j += 1
                if j == i + 1:  # no branch on the group: what the control's own row gets is never read
                    at = group_of[np.uint64(i)] & group_mask
                    double_u_k[at] += 2 * passed
                    passed += at == own
                else:
                    ties_c = 0
                    n_touched = 0
                    for q in range(i, j):
                        at = group_of[np.uint64(q)] & group_mask
                        if at == own:
                            ties_c += 1
                        else:
                            if count_k[at] == 0:
                                touched[n_touched] = np.int64(at)
                                n_touched += 1
                            count_k[at] += 1
                    a = np.float64(ties_c)
                    shared += a * a * a - a
                    for q in range(n_touched):
                        k = touched[q]
                        t = np.float64(count_k[k])
                        extra_k[k] += 3.0 * a * t * (a + t) + t * t * t - t
                        double_u_k[k] += count_k[k] * (2 * passed + ties_c)
                        count_k[k] = 0
                    passed += ties_c
                i = j
        control_tie_g[g] = shared
        for k in range(k_groups):
            if k == control:
                continue
            n1 = size_k[k]
            u = double_u_k[k] / 2.0
            tie = extra_k[k] + shared
            u_kg[k, g] = u
            tie_kg[k, g] = tie
            n12 = np.float64(n1) * np.float64(size_c)
            total = np.float64(n1 + size_c)
            p = 1.0
            if n12 > 0.0 and nnz_k[k] + nnz_k[control] > 0:
                variance = n12 / 12.0 * ((total + 1.0) - tie / (total * (total - 1.0)))
                if variance > 0.0:
                    z = (max(u, n12 - u) - n12 / 2.0 - continuity) / math.sqrt(variance)
                    p = min(1.0, math.erfc(z / root2))
            p_kg[k, g] = p


@kernel()
def bucket_counts_below(
    start_bg, stop_bg, keys, groups, control, key_g, below_g, equal_g
):  # pragma: no cover  compiled
    """Count each gene's positive control values below and equal to ``key_g``, both as bits."""
    for g in range(len(key_g)):
        for b in range(start_bg.shape[0]):
            for j in range(start_bg[b, g], stop_bg[b, g]):
                if groups[j] == control:
                    if keys[j] < key_g[g]:
                        below_g[g] += 1
                    elif keys[j] == key_g[g]:
                        equal_g[g] += 1
