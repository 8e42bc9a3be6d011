"""The 2026 kernels against numpy and scipy, one cell at a time and densely."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from vcelltools.io import open_dataset
from vcelltools.kernels.pvalues import adjust_bh
from vcelltools.scoring.vcc2026.counts import GeneMajor, make_tables, read_part, take_census
from vcelltools.scoring.vcc2026.profiles import get_profiles, make_profiles, rank_p

TARGET = 50_000.0


def make_counts(X: np.ndarray) -> GeneMajor:
    c = sparse.csc_matrix(X.astype(np.float32))
    c.sort_indices()
    indptr, cells = c.indptr.astype(np.int64), c.indices.astype(np.int32)
    return GeneMajor(indptr=indptr, cells=cells, values=c.data, library=X.sum(1).astype(float))


def get_spread(X: np.ndarray) -> float:
    """The leave-one-cell-out variance, straight from its definition."""
    n, total = len(X), X.sum(0)
    if n < 2 or not X.any():
        return 0.0
    rest = total.sum() - X.sum(1)
    v = np.log1p(TARGET * (total - X) / np.where(rest > 0, rest, 1)[:, None])
    v[rest <= 0] = 0
    return float((n - 1) / n * ((v - v.mean(0)) ** 2).sum())


def draw(seed: int, n: int, g: int, k: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.5, 2.0, g) * rng.lognormal(0, 0.5, (n, 1))).astype(float)
    if kind == "ties":
        X = np.minimum(X, 2)
        X[:, 0] = 40 - X[:, 1:].sum(1) % 7
    if kind == "wide":
        X[:, 1] = rng.integers(0, 900_000, n)
    if kind == "alone":
        X[3:] *= rng.random((n - 3, 1)) < 0.3
    if kind == "empty":
        X[rng.random(n) < 0.5] = 0
    return X, rng.integers(-1, k, n).astype(np.int32)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(6, 100),
    k=st.integers(2, 6),
    kind=st.sampled_from(["plain", "ties", "wide", "alone", "empty"]),
)
def test_tables_equal_the_definitions(seed, n, k, kind):
    X, code = draw(seed, n, 12, k, kind)
    (t,) = make_tables(make_counts(X), [(code, 1)], k, target_sum=TARGET, threads=2)
    library = X.sum(1)
    cpm = X / np.where(library > 0, library, 1)[:, None] * 1e6
    logged = np.log1p(X / np.where(library > 0, library / 1e6, 1)[:, None])
    for p in range(k):
        rows = code == p
        assert t.size_k[p] == rows.sum()
        np.testing.assert_array_equal(t.sum_kg[p], X[rows].sum(0))
        if rows.any():
            np.testing.assert_allclose(t.cpm_kg[p], cpm[rows].mean(0), rtol=1e-12)
        assert t.spread_k[p] == pytest.approx(get_spread(X[rows]), rel=1e-9, abs=1e-12)
        if p == 0 or not rows.any() or not (code == 0).any():
            continue
        control = logged[code == 0]
        for g in range(12):
            own = logged[rows, g]
            u = (own[:, None] > control[None, :, g]).sum() + 0.5 * (own[:, None] == control[None, :, g]).sum()
            assert t.twice_u_kg[p, g] == 2 * u
            _, c = np.unique(np.concatenate([own, control[:, g]]), return_counts=True)
            assert t.tie_kg[p, g] == (c.astype(float) ** 3 - c).sum()


@pytest.mark.parametrize("close", [False, True])
def test_long_runs_of_close_values_are_sorted(close):
    """Values that share their 22 highest bits by the hundred: the second radix, and ties among them."""
    rng = np.random.default_rng(0)
    n = 4000
    v = 1e6 + rng.integers(0, 300, n) * (1e-9 if close else 1e-3)
    v[:200] = rng.random(200) * 13
    v[200:260] = v[300]
    from vcelltools.kernels.labelings import sort_genes

    order, tied = np.empty(n, np.int32), np.empty(n, np.uint8)
    scratch = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty((3, 2048), np.int64)
    sort_genes(np.array([0, n]), np.arange(n, dtype=np.int32), v.view(np.uint64), order, tied, *scratch)
    np.testing.assert_array_equal(v[order], np.sort(v))
    np.testing.assert_array_equal(tied[1:] == 1, np.diff(np.sort(v)) == 0)
    assert set(order) == set(range(n))


def test_sets_of_a_labeling_are_those_of_two():
    X, code = draw(3, 200, 30, 4, "ties")
    half = np.random.default_rng(1).random(200) < 0.5
    both = np.where(code < 0, -1, code + 4 * half).astype(np.int32)
    counts = make_counts(X)
    a, b = make_tables(counts, [(both, 2)], 4, target_sum=TARGET)
    for part, inside in ((a, ~half), (b, half)):
        (alone,) = make_tables(counts, [(np.where(inside, code, -1).astype(np.int32), 1)], 4, target_sum=TARGET)
        for name in ("size_k", "sum_kg", "twice_u_kg", "tie_kg"):
            np.testing.assert_array_equal(getattr(part, name), getattr(alone, name))
        np.testing.assert_allclose(part.cpm_kg, alone.cpm_kg, rtol=1e-13)
        np.testing.assert_allclose(part.spread_k, alone.spread_k, rtol=1e-12)


def test_threads_and_memory_do_not_change_the_tables(monkeypatch):
    from vcelltools.scoring.vcc2026 import counts as genemajor

    X, code = draw(4, 300, 60, 5, "plain")
    counts = make_counts(X)
    labelings = [(code, 1), (np.where(code == 2, -1, code).astype(np.int32), 1)]
    first = list(make_tables(counts, labelings, 5, target_sum=TARGET, threads=1))
    monkeypatch.setattr(genemajor, "_BLOCK_VALUES", 500)
    monkeypatch.setattr(genemajor, "_TABLE_BYTES", 1)
    second = list(make_tables(counts, labelings, 5, target_sum=TARGET, threads=4))
    for s, t in zip(first, second, strict=True):
        np.testing.assert_array_equal(s.cpm_kg, t.cpm_kg)
        np.testing.assert_array_equal(s.twice_u_kg, t.twice_u_kg)
        np.testing.assert_allclose(s.spread_k, t.spread_k, rtol=1e-12)


@pytest.mark.parametrize("continuity", [True, False])
def test_p_is_scipys(continuity):
    X, code = draw(5, 250, 40, 4, "ties")
    code[code < 0] = 0
    (t,) = make_tables(make_counts(X), [(code, 1)], 4, target_sum=TARGET)
    p = rank_p(t.twice_u_kg[1:], t.tie_kg[1:], t.size_k[1:, None], t.size_k[0], continuity=continuity)
    logged = np.log1p(X / (X.sum(1) / 1e6)[:, None])
    for k in range(3):
        want = stats.mannwhitneyu(
            logged[code == k + 1], logged[code == 0], use_continuity=continuity, method="asymptotic"
        ).pvalue
        np.testing.assert_allclose(p[k], np.nan_to_num(want, nan=1.0), rtol=1e-11)
    for row in adjust_bh(p):
        assert (row >= 0).all()
        assert (row <= 1).all()
    np.testing.assert_allclose(adjust_bh(p)[0], stats.false_discovery_control(p[0]), rtol=1e-14)


def test_moves_of_cells():
    X, _ = draw(6, 40, 15, 3, "plain")
    counts = make_counts(X)

    def dense(c: GeneMajor) -> np.ndarray:
        return sparse.csc_matrix((c.values, c.cells, c.indptr), shape=(c.n_cells, c.n_genes)).toarray()

    rows = np.array([0, 3, 4, 17, 39])
    np.testing.assert_array_equal(dense(counts.take(rows)), X[rows])
    draws = np.array([5, 5, 0, 39, 5])
    scale = np.linspace(0, 2, 15)
    drawn = counts.draw(draws, scale)
    want = np.vstack([(X[draws] * scale).astype(np.float32), X])
    np.testing.assert_array_equal(dense(drawn), want)
    np.testing.assert_allclose(drawn.library, want.sum(1, dtype=float), rtol=1e-12)


def test_reading_by_parts(tmp_path):
    import anndata as ad

    X, _ = draw(7, 90, 20, 3, "plain")
    ad.AnnData(sparse.csr_matrix(X)).write_h5ad(tmp_path / "x.h5ad")
    part = np.random.default_rng(0).integers(-1, 2, 90).astype(np.int32)
    with open_dataset(tmp_path / "x.h5ad") as data:
        census = take_census(data, part, 2, what="truth", max_total=1e6)
        np.testing.assert_array_equal(census.library, X.sum(1))
        for i in range(2):
            c = read_part(data, census, i)
            got = sparse.csc_matrix((c.values, c.cells, c.indptr), shape=(c.n_cells, c.n_genes)).toarray()
            np.testing.assert_array_equal(got, X[part == i])
        back = np.arange(20)[::-1].copy()
        both = read_part(data, census, 0, gene_order=back, behind=make_counts(X[:7, back]))
        got = sparse.csc_matrix((both.values, both.cells, both.indptr), shape=(both.n_cells, 20)).toarray()
        np.testing.assert_array_equal(got, np.vstack([X[part == 0], X[:7]])[:, back])
        np.testing.assert_array_equal(both.library, np.concatenate([X[part == 0], X[:7]]).sum(1))


def test_profiles_sum_to_the_target():
    X, code = draw(8, 60, 20, 3, "plain")
    (t,) = make_tables(make_counts(X), [(code, 1)], 3, target_sum=TARGET)
    side = make_profiles(t, continuity=True)
    np.testing.assert_allclose(np.expm1(side.profile_kg).sum(1), TARGET, rtol=1e-12)
    assert not get_profiles(np.zeros((1, 5))).any()
