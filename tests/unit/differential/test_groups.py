"""The groups that ``de`` compares."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import vcelltools as vc
from tests.make import make_adata, make_counts
from tests.screens import write
from vcelltools.differential.expression import find_scale
from vcelltools.errors import DataError
from vcelltools.io import open_dataset


def test_controls_alone_are_no_comparison():
    adata = make_adata(make_counts(30, 10).astype(np.float32))
    adata.obs["target_gene"] = ["non-targeting"] * 20 + ["A"] * 10
    adata.obs["good"] = [True] * 20 + [False] * 10
    adata.obs["line"] = ["x"] * 10 + ["y"] * 20
    with pytest.raises(DataError, match="no cell selected by obs/good has a label"):
        vc.de(adata, keep="good")
    result = vc.de(adata, context_col="line")
    assert result.contexts == ["y"] and "contexts without a perturbation were left out: x" in result.notes


def test_totals_of_cells_in_columns_of_chunks_lose_nothing(tmp_path):
    """Every chunk has values of every cell, so threads must not add to one array."""
    X = np.random.default_rng(0).poisson(1.0, (20_000, 400))
    path = write(ad.AnnData(sparse.csr_matrix(X)), tmp_path / "x.h5ad", "dense-columns")
    for _ in range(20):
        with open_dataset(path) as ds:
            assert np.array_equal(find_scale(ds, threads=8).library_n, X.sum(axis=1))
