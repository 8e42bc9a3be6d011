"""Group sums against numpy, on every layout, with duplicates, and with invalid entries named."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from vcelltools.differential import groupsums
from vcelltools.differential.groupsums import sum_groups
from vcelltools.errors import DataError
from vcelltools.io import open_dataset

LAYOUTS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


def run(X, codes, n_groups, **options):
    obs = pd.DataFrame(index=[f"c{i}" for i in range(X.shape[0])])
    data = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(X.shape[1])]))
    with open_dataset(data) as dataset:
        return sum_groups(dataset, codes, n_groups, lambda chunk: chunk.values, squares=True, **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 3), st.booleans())
def test_sums_are_numpys(seed, layout, threads, shared):
    rng = np.random.default_rng(seed)
    n, g, k = rng.integers(1, 40), rng.integers(1, 12), int(rng.integers(1, 4))
    X = rng.gamma(1, 2, (n, g)) * (rng.random((n, g)) < 0.5)
    codes = rng.integers(-1, k, n)
    before = groupsums.STATE_BYTES
    groupsums.STATE_BYTES = 0 if shared else before
    try:
        found = run(LAYOUTS[layout](X), codes, k, threads=threads)
    finally:
        groupsums.STATE_BYTES = before
    for i in range(k):
        rows = X[codes == i]
        np.testing.assert_allclose(found.sum_kg[i], rows.sum(axis=0), atol=1e-9)
        np.testing.assert_allclose(found.square_kg[i], (rows**2).sum(axis=0), atol=1e-9)
        assert found.nnz_kg[i].tolist() == (rows > 0).sum(axis=0).tolist()
        assert found.size_k[i] == len(rows)
    assert found.max_value == X.max(initial=0)


def test_duplicates_are_summed_before_they_are_squared():
    X = sp.csr_matrix((np.array([1.0, 2.0, 4.0]), np.array([0, 0, 1]), np.array([0, 2, 3])), shape=(2, 2))
    found = run(X, np.zeros(2, np.int32), 1)
    assert found.sum_kg.tolist() == [[3, 4]]
    assert found.square_kg.tolist() == [[9, 16]]
    assert found.nnz_kg.tolist() == [[1, 1]]
    assert found.n_merged == 1


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (-1.0, "negative")])
def test_a_bad_value_is_named(layout, value, text):
    X = np.ones((5, 4))
    X[3, 2] = value
    with pytest.raises(DataError, match=rf"\(c3\).*\(g2\) holds .*{text}"):
        run(LAYOUTS[layout](X), np.zeros(5, np.int32), 1)
