"""AnnData objects whose matrix is still on the disk."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from vcelltools.errors import UsageError
from vcelltools.io import open_dataset


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_an_anndata_backed_by_its_file_is_read_from_there(tmp_path, mode):
    rng = np.random.default_rng(0)
    X = rng.poisson(1.0, (30, 7)).astype(np.float32)
    for name, stored in (("csr", sparse.csr_matrix(X)), ("csc", sparse.csc_matrix(X)), ("dense", X)):
        obs = pd.DataFrame({"g": ["a", "b", "c"] * 10}, index=[f"c{i}" for i in range(30)])
        path = tmp_path / f"{name}.h5ad"
        ad.AnnData(stored, obs, pd.DataFrame(index=list("tuvwxyz"))).write_h5ad(path)
        backed = ad.read_h5ad(path, backed=mode)
        backed.obs["g"] = "new"  # what is in memory counts
        with open_dataset(backed) as ds:
            assert ds.obs.column("g").labels().tolist() == ["new"] * 30
            chunk = ds.matrix.read(ds.matrix.plan()[0])
            total = chunk.block.sum() if ds.matrix.layout == "dense" else chunk.data.sum()
            assert total == X.sum()
        with open_dataset(backed[:5]) as part:
            assert part.matrix.shape == (5, 7)
        backed.file.close()


def test_what_is_no_anndata_is_said():
    with pytest.raises(UsageError, match="a DataFrame is not a data set"):
        open_dataset(pd.DataFrame({"a": [1]}))
