"""Thinning: exactly binomial, and the same whatever the layout, the chunks and the threads."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats as ss

import vcelltools as vc
from vcelltools.errors import DataError, NotCountsError, UsageError


def make_data(X) -> ad.AnnData:
    n, g = X.shape
    obs = pd.DataFrame({"line": ["a"] * n}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(g)]))


def thin(tmp_path, X, share, **options) -> np.ndarray:
    vc.sample(make_data(X), tmp_path / "t.h5ad", thin=share, force=True, **options)
    X = ad.read_h5ad(tmp_path / "t.h5ad").X
    return X.toarray() if sp.issparse(X) else X


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.poisson(4, (300, 40)) * (rng.random((300, 40)) < 0.6)).astype(np.int32)


def test_layouts_threads_and_dtypes_agree(tmp_path, counts):
    want = thin(tmp_path, sp.csr_matrix(counts), 0.4, seed=3, threads=1)
    assert want.max() > 0
    for X in (sp.csc_matrix(counts), counts, sp.csr_matrix(counts.astype(np.float32)), counts.astype(np.uint8)):
        np.testing.assert_array_equal(thin(tmp_path, X, 0.4, seed=3, threads=3), want)
    assert (thin(tmp_path, counts, 0.4, seed=4) != want).any()


def test_a_chosen_cell_is_thinned_as_it_is_among_all(tmp_path, counts):
    X = sp.csr_matrix(counts)
    every = thin(tmp_path, X, 0.5)
    vc.sample(make_data(X), tmp_path / "some.h5ad", thin=0.5, n=20)
    some = ad.read_h5ad(tmp_path / "some.h5ad")
    at = [int(v[1:]) for v in some.obs_names]
    np.testing.assert_array_equal(some.X.toarray(), every[at])


def test_counts_are_binomial(tmp_path):
    for count in (1, 2, 7, 500):
        X = np.full((400, 50), count, np.int32)
        got = thin(tmp_path, X, 0.3).ravel()
        assert got.max() <= count
        law = ss.binom(count, 0.3)
        assert got.mean() == pytest.approx(law.mean(), abs=5 * law.std() / np.sqrt(len(got)))
        assert got.var() == pytest.approx(law.var(), rel=0.06)
        if count < 10:
            seen = np.bincount(got, minlength=count + 1)
            assert ss.chisquare(seen, law.pmf(np.arange(count + 1)) * len(got)).pvalue > 1e-3


def test_less_lies_within_more(tmp_path, counts):
    few, more = (thin(tmp_path, counts, share) for share in (0.2, 0.7))
    assert (few <= more).all()
    assert (more <= counts).all()
    assert few.sum() < more.sum()


def test_no_zero_is_stored(tmp_path, counts):
    vc.sample(make_data(sp.csr_matrix(counts)), tmp_path / "t.h5ad", thin=0.1)
    assert (ad.read_h5ad(tmp_path / "t.h5ad").X.data > 0).all()


def test_refusals(tmp_path, counts):
    for share in (0.0, 1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(UsageError, match=r"above 0 and below 1|finite"):
            thin(tmp_path, counts, share)
    with pytest.raises(NotCountsError, match="not a whole number"):
        thin(tmp_path, counts + 0.5, 0.5)
    repeated = sp.csr_matrix((np.ones(2), np.zeros(2, int), np.array([0, 2])), shape=(1, 3))
    with pytest.raises(DataError, match="several entries"):
        thin(tmp_path, repeated, 0.5)
    with pytest.raises(UsageError, match="layers: not with thin"):
        thin(tmp_path, counts, 0.5, layers=["all"])
