"""The rank-sum kernel against scipy.stats."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats as ss
from hypothesis import given, settings
from hypothesis import strategies as st

from vcelltools.differential.ranks import GeneBuckets, RankSums
from vcelltools.errors import DataError
from vcelltools.kernels.faults import Fault
from vcelltools.kernels.pvalues import adjust_bh, get_exact_tail


def rank_sum(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    codes: np.ndarray,
    *,
    n_genes: int,
    n_groups: int,
    control: int,
    continuity: bool = True,
    exact: bool = False,
    threads: int = 1,
) -> RankSums:
    """Compare every group with the controls on a CSR matrix in memory; a bad value is a :class:`DataError`.

    Parameters
    ----------
    indptr, indices, data
        CSR arrays, cells × genes; data float32 or float64, non-negative.
    codes
        (n,) group of each cell; negative leaves a cell out.
    """
    data = np.ascontiguousarray(data, dtype=np.float32 if data.dtype == np.float32 else np.float64)
    buckets = GeneBuckets(n_genes=n_genes, n_groups=n_groups, capacity=len(data), dtype=data.dtype, n_blocks=1)
    codes = np.ascontiguousarray(codes, np.int32)
    buckets.count_cells(codes)
    index = np.ascontiguousarray(indices, np.int32 if indices.dtype.itemsize <= 4 else np.int64)
    fault = buckets.add_csr(0, np.ascontiguousarray(indptr, np.int64), index, data, codes)
    if fault is not None:
        cell = int(np.searchsorted(indptr, fault.position, side="right")) - 1
        what = Fault(fault.fault).name.lower().replace("_", " ")
        raise DataError(f"{what} at cell {cell}, stored value {fault.position}")
    return buckets.rank_sum(control, continuity=continuity, exact=exact, threads=threads)


def run(X: np.ndarray, codes: np.ndarray, control: int, **options):
    s = sp.csr_matrix(X)
    return rank_sum(
        s.indptr,
        s.indices,
        s.data,
        codes,
        n_genes=X.shape[1],
        n_groups=int(codes.max()) + 1,
        control=control,
        **options,
    )


def check(X: np.ndarray, codes: np.ndarray, control: int, *, exact: bool = False, continuity: bool = True) -> None:
    got = run(X, codes, control, exact=exact, continuity=continuity)
    wide = X.astype(np.float64)
    for k in range(int(codes.max()) + 1):
        mine = wide[codes == k]
        np.testing.assert_allclose(got.mean_kg[k], mine.mean(axis=0), rtol=1e-12)
        if k == control:
            assert np.isnan(got.p_kg[k]).all()
            continue
        method = "auto" if exact else "asymptotic"
        for g in range(X.shape[1]):
            pair = mine[:, g], wide[codes == control, g]
            if np.ptp(np.concatenate(pair)) == 0:  # scipy: 0 / 0
                assert got.p_kg[k, g] == 1.0
                continue
            want = ss.mannwhitneyu(*pair, method=method, use_continuity=continuity)
            assert got.u_kg[k, g] == want.statistic
            np.testing.assert_allclose(got.p_kg[k, g], want.pvalue, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["continuous", "counts", "wide"])
def test_equals_scipy(dtype, kind):
    rng = np.random.default_rng(3)
    X = rng.random((400, 12)) * (rng.random((400, 12)) < np.linspace(0.02, 0.98, 12))
    if kind == "counts":
        X = np.ceil(X * 5)
    elif kind == "wide":  # more significant bits than fit beside the group: the other sort
        X = np.where(X > 0, 10.0 ** (60 * X - 30), 0)
    X[:, 0] = 0
    X[:, 1] = 2.5
    codes = rng.choice(5, 400, p=[0.1, 0.2, 0.45, 0.2, 0.05]).astype(np.int32)
    X[codes == 3, 2] = 0
    check(X.astype(dtype), codes, 2)
    check(X.astype(dtype), codes, 2, continuity=False)


def test_large_genes_take_the_long_radix():
    rng = np.random.default_rng(4)
    X = rng.gamma(1.0, 1.0, (9000, 2)) * (rng.random((9000, 2)) < 0.8)
    codes = rng.integers(0, 3, 9000).astype(np.int32)
    check(X.astype(np.float32), codes, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_share_their_highest_bits(dtype):
    """Runs of close values by the hundred, and by the few, with ties among them: what the radix leaves is put right."""
    rng = np.random.default_rng(8)
    n = 4000
    X = np.empty((n, 3))
    X[:, 0] = 1e3 + rng.integers(0, 300, n) * (2.0**-10 if dtype == np.float32 else 2.0**-40)
    X[:200, 0] = rng.random(200)
    X[:, 1] = np.repeat(rng.random(n // 4) * 10, 4) + rng.integers(0, 3, n) * (1e-6 if dtype == np.float32 else 1e-12)
    X[:, 2] = np.where(rng.random(n) < 0.5, 1e-30, rng.random(n))
    codes = rng.integers(0, 4, n).astype(np.int32)
    check(X.astype(dtype), codes, 0)


def test_rows_in_any_order_and_duplicates_in_them():
    X = (np.arange(12) % 5).reshape(3, 4).astype(np.float32)
    s = sp.csr_matrix(X)
    codes = np.array([0, 1, 1], np.int32)
    whole = run(X, codes, 0)
    indices, data = s.indices.copy(), s.data.copy()
    for a, b in pairwise(s.indptr):
        indices[a:b], data[a:b] = indices[a:b][::-1].copy(), data[a:b][::-1].copy()
    turned = rank_sum(s.indptr, indices, data, codes, n_genes=4, n_groups=2, control=0)
    np.testing.assert_array_equal(turned.u_kg, whole.u_kg)
    np.testing.assert_array_equal(turned.sum_kg, whole.sum_kg)
    for late in ([0, 2, 1, 2], [2, 1, 0, 1], [0, 1, 2, 0]):
        with pytest.raises(DataError, match="duplicate"):
            rank_sum(
                np.array([0, 4, 4]), np.array(late, np.int32), np.ones(4, np.float32), codes[:2], n_genes=4, n_groups=2,
                control=0,
            )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(4, 80), levels=st.integers(1, 40), one_cell=st.booleans())
def test_any_ties_any_sizes(seed, n, levels, one_cell):
    rng = np.random.default_rng(seed)
    X = rng.integers(0, levels + 1, (n, 3)).astype(np.float32)
    codes = rng.integers(0, 3, n).astype(np.int32)
    codes[:3] = [0, 1, 2]
    if one_cell:
        codes[3:][codes[3:] == 1] = 2
    check(X, codes, 2, exact=True)


def test_exact_tail_of_small_samples():
    rng = np.random.default_rng(5)
    for n1, n2 in [(1, 1), (1, 30), (2, 9), (5, 40), (8, 8), (8, 25), (40, 3)]:
        tail = get_exact_tail(n1, n2)
        x, y = rng.random((n1, 20)), rng.random((n2, 20))
        want = ss.mannwhitneyu(x, y, method="exact")
        u = np.maximum(want.statistic, n1 * n2 - want.statistic).astype(int)
        np.testing.assert_allclose(np.minimum(1, 2 * tail[u]), want.pvalue, rtol=1e-13)
        assert tail[0] == 1.0


def test_three_million_ties_do_not_overflow():
    n = 3_000_000
    codes = np.zeros(n, np.int32)
    codes[: n // 2] = 1
    X = sp.csr_matrix((np.ones(4, np.float32), ([0, 1, 2, n - 1], [0, 0, 0, 0])), shape=(n, 1))
    got = rank_sum(X.indptr, X.indices, X.data, codes, n_genes=1, n_groups=2, control=0)
    # a normal approximation by hand, in exact integers
    n1 = n2 = n // 2
    ties = sum(t**3 - t for t in (4, n - 4))
    inner = ((n**3 - n) - ties) / (n * (n - 1))
    u = 3 * (n2 - 1) + 3 * 0.5 + (n1 - 3) * (n2 - 1) * 0.5
    z = (max(u, n1 * n2 - u) - n1 * n2 / 2 - 0.5) / np.sqrt(n1 * n2 / 12 * inner)
    assert got.u_kg[1, 0] == u
    np.testing.assert_allclose(got.p_kg[1, 0], 2 * ss.norm.sf(z), rtol=1e-4)
    assert got.tie_kg[1, 0] == pytest.approx(ties, rel=1e-15)


def test_layouts_threads_and_blocks_give_the_same_bits():
    rng = np.random.default_rng(6)
    X = (rng.random((300, 20)) * (rng.random((300, 20)) < 0.5)).astype(np.float32)
    codes = rng.integers(-1, 4, 300).astype(np.int32)
    whole = run(X, codes, 1)
    keep = codes >= 0
    without = run(X[keep], codes[keep], 1)
    s, t = sp.csr_matrix(X), sp.csc_matrix(X)
    filled = []
    for limit in (math.inf, 0):  # in memory, and in a temporary file
        shape = {"n_genes": 20, "n_groups": 4, "capacity": s.nnz, "dtype": "float32", "limit": limit}
        blocks = GeneBuckets(n_blocks=3, **shape)
        blocks.count_cells(codes)
        for b, rows in enumerate([slice(0, 90), slice(90, 91), slice(91, 300)]):
            c = s[rows]
            assert blocks.add_csr(b, c.indptr.astype(np.int64), c.indices, c.data, codes[rows]) is None
        columns = GeneBuckets(n_blocks=1, **shape)
        columns.count_cells(codes)
        for first, last in [(12, 20), (0, 12)]:
            c = t[:, first:last]
            assert columns.add_csc(0, first, c.indptr.astype(np.int64), c.indices, c.data, codes) is None
        dense = GeneBuckets(n_blocks=2, **shape)
        dense.count_cells(codes)
        for b, rows in enumerate([slice(0, 120), slice(120, 300)]):
            assert dense.add_dense(b, 0, X[rows], codes[rows]) is None
        filled += [blocks, columns, dense]
    for other in (without, *(b.rank_sum(1, threads=2) for b in filled)):
        for name in ("size_k", "sum_kg", "nnz_kg", "u_kg", "tie_kg", "p_kg"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(other, name))
    values, groups = filled[0].gene_values(7)
    np.testing.assert_array_equal(values, X[keep, 7][X[keep, 7] > 0])
    np.testing.assert_array_equal(groups, codes[keep][X[keep, 7] > 0])


@pytest.mark.parametrize(
    ("value", "index", "what"),
    [(np.nan, 1, "not finite"), (np.inf, 1, "not finite"), (-np.inf, 1, "not finite"), (-1.0, 1, "negative"),
     (1.0, 9, "index"), (1.0, -5, "index"), (1.0, 2_000_000_000, "index"), (1.0, 0, "duplicate")],
)  # fmt: skip
def test_faults_are_found(value, index, what):
    indptr = np.array([0, 2, 3])
    indices = np.array([0, index, 1], np.int32)
    data = np.array([1.0, value, 2.0], np.float32)
    with pytest.raises(DataError, match=what):
        rank_sum(indptr, indices, data, np.array([0, 1], np.int32), n_genes=3, n_groups=2, control=0)


def test_explicit_and_negative_zeros_are_zeros():
    data = np.array([0.0, -0.0, 3.0], np.float32)
    got = rank_sum(
        np.array([0, 1, 2, 3]),
        np.zeros(3, np.int32),
        data,
        np.array([0, 1, 1], np.int32),
        n_genes=1,
        n_groups=2,
        control=0,
    )
    assert got.nnz_kg.tolist() == [[0], [1]]
    assert got.u_kg[1, 0] == 1.5


@settings(max_examples=50, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_bh_equals_scipy(p):
    np.testing.assert_array_equal(adjust_bh(np.array(p)), ss.false_discovery_control(p))


def test_bh_rows_are_apart():
    p = np.random.default_rng(0).random((3, 50))
    np.testing.assert_array_equal(adjust_bh(p)[1], ss.false_discovery_control(p[1]))
