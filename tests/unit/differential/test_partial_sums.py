"""Sums by group that are bitwise equal to those of numpy."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.differential.partial_sums import get_leaves, make_plan
from vcelltools.differential.ranks import GeneBuckets

SIZES = (0, 1, 5, 7, 8, 9, 16, 23, 127, 128, 129, 136, 200, 257, 1000, 2051)


def test_leaves_halve_at_multiples_of_eight():
    assert get_leaves(100) == [(100, 0)]
    assert get_leaves(129) == [(64, 0), (65, 1)]
    # 300 = 144 + 156; 144 = 72 + 72, 156 = 72 + 84
    assert get_leaves(300) == [(72, 0), (72, 1), (72, 0), (84, 2)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("blocks", [1, 3])
def test_sums_equal_numpys(dtype, blocks):
    rng = np.random.default_rng(1)
    codes = rng.permutation(np.concatenate([np.repeat(np.arange(len(SIZES)), SIZES), np.full(50, -1)])).astype(np.int32)
    values = (rng.gamma(1, 1, (len(codes), 70)) * (rng.random((len(codes), 70)) < 0.6)).astype(dtype)
    plan = make_plan(codes, len(SIZES))
    buckets = GeneBuckets(n_genes=70, n_groups=plan.n_slots, capacity=values.size, dtype=dtype, n_blocks=blocks)
    buckets.count_cells(plan.slot_n)
    for b, rows in enumerate(np.array_split(np.arange(len(codes)), blocks)):
        assert buckets.add_dense(b, 0, np.ascontiguousarray(values[rows]), plan.slot_n[rows]) is None
    sum_kg = buckets.sum_pairwise(plan, threads=2)
    assert sum_kg.dtype == dtype
    for k in range(len(SIZES)):
        columns = [np.add.reduce(np.ascontiguousarray(values[codes == k, g])) for g in range(70)]
        assert np.array_equal(sum_kg[k], np.array(columns, dtype)), SIZES[k]
    # the buckets hold the groups afterwards
    assert buckets.size_k.tolist() == list(SIZES)
    ranked = buckets.rank_sum(12)
    other = GeneBuckets(n_genes=70, n_groups=len(SIZES), capacity=values.size, dtype=dtype, n_blocks=1)
    other.count_cells(codes)
    other.add_dense(0, 0, values, codes)
    want = other.rank_sum(12)
    assert np.array_equal(np.delete(ranked.u_kg, 12, axis=0), np.delete(want.u_kg, 12, axis=0))
    assert np.array_equal(ranked.nnz_kg, want.nnz_kg)
