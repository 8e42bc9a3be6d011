"""Pseudobulks compared with pandas on every layout, and invalid requests."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import vcelltools as vc
from tests.conftest import run_cli
from vcelltools.errors import DataError, NotCountsError, UsageError


def make_data(seed: int = 0, n=200, g=15) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"target_gene": rng.choice(["A", "B", "nt"], n), "batch": rng.choice(["1", "2"], n)},
                       index=[f"c{i}" for i in range(n)])  # fmt: skip
    X = rng.poisson(0.7, (n, g)).astype(np.int32)
    return ad.AnnData(sp.csr_matrix(X), obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(g)]))


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_means_and_detection_are_pandas(tmp_path, layout, threads):
    data = make_data()
    dense = data.to_df()
    data.X = layout(dense.to_numpy())
    result = vc.pseudobulk(data, tmp_path / "b.h5ad", by=["target_gene", "batch"], threads=threads)
    bulk = ad.read_h5ad(tmp_path / "b.h5ad")
    groups = dense.groupby([data.obs.target_gene, data.obs.batch])
    want = groups.sum()
    assert bulk.obs_names.tolist() == ["|".join(i) for i in want.index]
    assert bulk.X.dtype == np.int64
    np.testing.assert_array_equal(bulk.X.toarray(), want.to_numpy())
    np.testing.assert_allclose(bulk.layers["mean"].toarray(), groups.mean().to_numpy())
    np.testing.assert_allclose(bulk.layers["detected"].toarray(), (dense > 0).groupby(
        [data.obs.target_gene, data.obs.batch]).mean().to_numpy())  # fmt: skip
    assert bulk.obs.n_cells.tolist() == groups.size().tolist()
    assert bulk.obs.total_counts.tolist() == want.sum(axis=1).tolist()
    assert bulk.var_names.tolist() == data.var_names.tolist()
    assert (result.n_groups, result.n_cells) == (6, 200)


def test_small_and_missing_groups_are_left_out_and_said(tmp_path):
    data = make_data()
    data.obs["target_gene"] = data.obs["target_gene"].astype("category")
    data.obs.iloc[:5, 0] = np.nan
    data.obs.iloc[5:8, 1] = "3"
    result = vc.pseudobulk(data, tmp_path / "b.h5ad", by=["target_gene", "batch"], min_cells=4)
    assert result.n_groups == 6
    assert result.smallest >= 4
    assert any("5 cells without a label" in n for n in result.notes)
    assert any("combinations with fewer than 4 cells" in n for n in result.notes)


def test_refusals(tmp_path):
    data = make_data()
    out = tmp_path / "b.h5ad"
    for by, text in (([], "no column is given"), (["batch", "batch"], "given twice")):
        with pytest.raises(UsageError, match=text):
            vc.pseudobulk(data, out, by=by)
    with pytest.raises(DataError, match="no column 'x'"):
        vc.pseudobulk(data, out, by=["x"])
    with pytest.raises(DataError, match="no combination of batch has 1,000 cells"):
        vc.pseudobulk(data, out, by=["batch"], min_cells=1000)
    X = data.X.toarray().astype(float)
    X[7, 3] = 0.5
    with pytest.raises(NotCountsError, match=r"\(c7\), gene 3 \(g3\) holds 0.5"):
        vc.pseudobulk(ad.AnnData(X, obs=data.obs, var=data.var), out, by=["batch"])
    assert not out.exists()


def test_the_command(tmp_path):
    make_data().write_h5ad(tmp_path / "x.h5ad")
    done = run_cli("pseudobulk", "x.h5ad", "--by", "target_gene,batch", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.json["n_groups"] == 6
    again = run_cli("pseudobulk", "x.h5ad", cwd=tmp_path)
    assert again.code == 2
    assert "exists" in again.stderr
