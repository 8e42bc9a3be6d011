"""Rank sums within strata, against controls or against the other groups: one joint sort per gene serves all of them.

Cells are coded by group and stratum together. The sweep over a gene's sorted values counts, for each stratum, the
reference cells passed: of the controls, or of all groups, of which a group's own are then taken away (against itself
its U is n²/2, ties included). The strata's statistics are added with the weights of van Elteren 1960, 1/(n1 + n2 + 1).

Cost: O(non-zeros) for the sort and the sweep, and the codes for each gene. Oracles: ``scipy.stats.mannwhitneyu`` for a
single stratum, sums of it for several.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vcelltools.kernels._jit import kernel
from vcelltools.kernels.ranksum import _gather, _order_wide, _sort_by_value


class Strata(NamedTuple):
    """How codes are made of groups and strata."""

    group_c: np.ndarray
    """(c,) int64: the group of each code."""
    stratum_c: np.ndarray
    """(c,) int64: its stratum."""
    own: int
    """The control's group, or -1 where a group's reference are the others."""
    n_groups: int
    n_strata: int


class StrataOutput(NamedTuple):
    """What is written, gene by gene."""

    moment_kg: np.ndarray
    """(k, g) float64: sums of expm1 of the values."""
    statistic_kg: np.ndarray
    """(k, g) float64: U of the group; with several strata, z."""
    p_kg: np.ndarray
    """(k, g) float64: two-sided p; NaN for the controls, and where no stratum holds group and reference."""
    max_g: np.ndarray
    """(g,) float64: the largest value."""


class StrataScratch(NamedTuple):
    """Memory of one thread, beside that of the sort."""

    count_c: np.ndarray
    """(c,) int64, zero on entry."""
    touched_c: np.ndarray
    """(c,) int64."""
    double_u_c: np.ndarray
    """(c,) int64."""
    extra_c: np.ndarray
    """(c,) float64."""
    int_xs: np.ndarray
    """(4, s) int64: reference cells, those passed, ties (zero on entry), strata touched."""
    shared_s: np.ndarray
    """(s,) float64."""


def make_strata_scratch(n_codes: int, n_strata: int) -> StrataScratch:
    """Return the scratch of one thread."""
    ints = np.zeros((3, n_codes), np.int64)
    return StrataScratch(ints[0], ints[1], ints[2], np.empty(n_codes), np.zeros((4, n_strata), np.int64),
                         np.empty(n_strata))  # fmt: skip


@kernel()
def _start_strata(size_c, nnz_c, strata, scratch):
    """Set what the zeros contribute: one tie block in each stratum, known without looking."""
    size_s, passed_s, shared_s = scratch.int_xs[0], scratch.int_xs[1], scratch.shared_s
    size_s[:] = 0
    passed_s[:] = 0
    for c in range(len(size_c)):
        if strata.own < 0 or strata.group_c[c] == strata.own:
            s = strata.stratum_c[c]
            size_s[s] += size_c[c]
            passed_s[s] += size_c[c] - nnz_c[c]
    for s in range(strata.n_strata):
        a = np.float64(passed_s[s])
        shared_s[s] = a * a * a - a if strata.own < 0 else 0.0
    for c in range(len(size_c)):
        zeros = size_c[c] - nnz_c[c]
        tied = passed_s[strata.stratum_c[c]]
        scratch.double_u_c[c] = zeros * tied
        t = np.float64(zeros + tied)
        scratch.extra_c[c] = t * t * t - t if strata.own >= 0 else 0.0


@kernel()
def _sweep_strata(done, code_of, by, n, code_mask, strata, scratch):
    """Pass a gene's values in order, counting the reference cells passed in each stratum."""
    count_c, touched_c, double_u_c, extra_c = (
        scratch.count_c, scratch.touched_c, scratch.double_u_c, scratch.extra_c,
    )  # fmt: skip
    passed_s, ties_s, touched_s, shared_s = scratch.int_xs[1], scratch.int_xs[2], scratch.int_xs[3], scratch.shared_s
    own = strata.own
    i = 0
    while i < n:
        value = done[np.uint64(i)] >> by
        j = i
        n_codes = 0
        n_strata = 0
        while j < n and (done[np.uint64(j)] >> by) == value:
            c = np.int64(code_of[np.uint64(j)] & code_mask)
            s = strata.stratum_c[c]
            is_own = strata.group_c[c] == own
            if own < 0 or is_own:
                if ties_s[s] == 0:
                    touched_s[n_strata] = s
                    n_strata += 1
                ties_s[s] += 1
            if not is_own:
                if count_c[c] == 0:
                    touched_c[n_codes] = c
                    n_codes += 1
                count_c[c] += 1
            j += 1
        for q in range(n_codes):
            c = touched_c[q]
            s = strata.stratum_c[c]
            double_u_c[c] += count_c[c] * (2 * passed_s[s] + ties_s[s])
            if own >= 0:
                a, t = np.float64(ties_s[s]), np.float64(count_c[c])
                extra_c[c] += 3.0 * a * t * (a + t) + t * t * t - t
            count_c[c] = 0
        for q in range(n_strata):
            s = touched_s[q]
            a = np.float64(ties_s[s])
            shared_s[s] += a * a * a - a
            passed_s[s] += ties_s[s]
            ties_s[s] = 0
        i = j


@kernel()
def bucket_strata(buckets, g0, g1, task, strata, sort, scratch, sums, out):
    """Write means' sums, statistics and p of the genes ``g0:g1``.

    Parameters
    ----------
    buckets, task, sort
        :class:`vcelltools.kernels.ranksum.Buckets`, ``RankTask`` (whose groups are the codes, and whose moment is 1)
        and ``RankScratch``.
    strata, scratch, out
        :class:`Strata`, :class:`StrataScratch`, :class:`StrataOutput`.
    sums
        (3, k) float64 scratch.
    """
    size_c = task.size_k
    n_codes = len(size_c)
    bits = 0
    while (1 << bits) < n_codes:
        bits += 1
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(bits)
    shift_t, shift_v, informative = sums[0], sums[1], sums[2]
    for g in range(g0, g1):
        n, top, low_key, high_key = _gather(buckets, g, task, shift, sort)
        out.max_g[g] = top
        moment_c, nnz_c = sort.real_sk[2], sort.count_sk[0]
        _start_strata(size_c, nnz_c, strata, scratch)
        if n > 0:
            value_bits = 0
            while value_bits < 64 and ((high_key - low_key) >> np.uint64(value_bits)) != 0:
                value_bits += 1
            if value_bits + bits <= 64:
                least = low_key << shift
                for m in range(n):
                    sort.buf[m] -= least
                _sort_by_value(sort.buf, n, bits, value_bits, sort.hist, sort.tmp)
                _sweep_strata(sort.buf, sort.buf, shift, n, mask, strata, scratch)
            else:
                done, code_of = _order_wide(buckets, g, n)
                _sweep_strata(done, code_of, np.uint64(0), n, mask, strata, scratch)
        shift_t[:] = 0.0
        shift_v[:] = 0.0
        informative[:] = 0.0
        for k in range(strata.n_groups):
            out.moment_kg[k, g] = 0.0
            out.statistic_kg[k, g] = 0.0
        for c in range(n_codes):
            k, s = strata.group_c[c], strata.stratum_c[c]
            out.moment_kg[k, g] += moment_c[c]
            n1 = np.float64(size_c[c])
            n2 = np.float64(scratch.int_xs[0, s]) - (n1 if strata.own < 0 else 0.0)
            if k == strata.own or n1 == 0.0 or n2 <= 0.0:
                continue
            u = scratch.double_u_c[c] / 2.0 - (n1 * n1 / 2.0 if strata.own < 0 else 0.0)
            total = n1 + n2
            tie = scratch.extra_c[c] + scratch.shared_s[s]
            weight = 1.0 / (total + 1.0) if strata.n_strata > 1 else 1.0
            informative[k] += 1.0
            shift_t[k] += weight * (u - n1 * n2 / 2.0)
            shift_v[k] += weight * weight * n1 * n2 / 12.0 * ((total + 1.0) - tie / (total * (total - 1.0)))
            if strata.n_strata == 1:
                out.statistic_kg[k, g] = u
            elif informative[k] == 1.0:
                out.statistic_kg[k, g] = weight  # of the only stratum so far, for the correction
        for k in range(strata.n_groups):
            if informative[k] == 0.0:
                out.statistic_kg[k, g] = np.nan
                out.p_kg[k, g] = np.nan
                continue
            # one stratum has the steps of a U, several have no common one: no correction there
            one = 1.0 if strata.n_strata == 1 else out.statistic_kg[k, g]
            step = task.continuity * one if informative[k] == 1.0 else 0.0
            p, z = 1.0, 0.0
            if shift_v[k] > 0.0:
                z = shift_t[k] / math.sqrt(shift_v[k])
                p = min(1.0, math.erfc((abs(shift_t[k]) - step) / math.sqrt(shift_v[k]) / math.sqrt(2.0)))
            out.p_kg[k, g] = p
            if strata.n_strata > 1:
                out.statistic_kg[k, g] = z
