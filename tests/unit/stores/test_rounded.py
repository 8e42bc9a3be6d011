"""Stores of fractional counts: refused, or rounded at random by the store's seed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.files import read_all
from tests.make import as_layout, make_adata, make_counts
from vcelltools.errors import DataError
from vcelltools.io import open_dataset
from vcelltools.io.rounding import round_matrix
from vcelltools.prediction.genes_outside import open_source, read_rows
from vcelltools.stores.building.make import build_store
from vcelltools.stores.store import open_store

OPTIONS = {"pert_col": "pert", "control": "ctrl", "basis": [f"g{i}" for i in range(20)], "name": "s"}


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_fractional_counts_are_rounded_when_asked(tmp_path, layout):
    X = (make_counts(80, 20, seed=2) * np.random.default_rng(0).uniform(0.8, 1, (80, 20))).astype("float32")
    adata = make_adata(as_layout(X, layout))
    adata.obs["pert"] = np.array(["ctrl", "A"])[np.arange(80) % 2]
    adata.write_h5ad(path := tmp_path / "x.h5ad")
    with pytest.raises(DataError):
        build_store(path, out=tmp_path / "no", **OPTIONS)
    built = build_store(path, out=tmp_path / "a", seed=5, non_integer="round", **OPTIONS)
    assert any("rounded up or down at random" in w for w in built.warnings)
    with open_dataset(path) as ds:
        want = read_all(round_matrix(ds.matrix, 5))
    store = open_store(built.path)
    rows = np.arange(80)
    np.testing.assert_array_equal(store.counts(rows).toarray(), want[store.source_rows[rows]])
    with open_source(store, None) as source:
        np.testing.assert_array_equal(read_rows(source, rows).toarray(), want)
    other = build_store(path, out=tmp_path / "b", seed=6, non_integer="round", **OPTIONS)
    assert other.sha256 != built.sha256
