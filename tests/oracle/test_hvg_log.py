"""seurat and cell_ranger on log1p values, against scanpy on the same values."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

import vcelltools as vc
from tests.conftest import run_cli
from tests.make import as_layout, make_adata, make_counts
from vcelltools.errors import NotCountsError, UsageError


def make_log(layout="csr", base=None, batches=0, some_genes=False, dtype="float32"):
    adata = make_adata(as_layout(make_counts(300, 200, seed=1), "csr", dtype), batches=batches)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata, base=base)
    if some_genes:
        adata = adata[:, 20:].copy()  # no target that cells sum to
    adata.X = as_layout(adata.X.toarray(), layout, dtype)
    return adata


def check(adata, flavor, batch_key=None, **options):
    expected = adata.copy()
    with np.errstate(all="ignore"):
        sc.pp.highly_variable_genes(expected, n_top_genes=40, flavor=flavor, batch_key=batch_key)
    found = vc.hvg(adata, top=40, flavor=flavor, batch_key=batch_key, **options)
    mine, theirs = found["highly_variable"].to_numpy(), expected.var["highly_variable"].to_numpy()
    assert mine.sum() == 40 and not (mine & ~theirs).any(), "scanpy takes all genes that tie at the cut"
    if batch_key is None:
        score = expected.var["dispersions_norm"].to_numpy()
        np.testing.assert_allclose(score[theirs & ~mine], score[mine].min(), rtol=1e-5)
    else:
        assert (mine == theirs).all()
    for name in ("means", "dispersions", "dispersions_norm"):
        np.testing.assert_allclose(found[name], expected.var[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_log_values_give_scanpys_genes(flavor, layout):
    check(make_log(layout), flavor)


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
@pytest.mark.parametrize("change", [{"base": 2}, {"some_genes": True}, {"dtype": "float64"}])
def test_bases_panels_and_precisions(flavor, change):
    check(make_log(**change), flavor)


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
def test_batches_are_combined_as_in_scanpy(flavor):
    check(make_log(batches=3), flavor, batch_key="batch")


def test_float64_agrees_to_the_last_digits():
    adata = make_log(dtype="float64")
    expected = adata.copy()
    sc.pp.highly_variable_genes(expected, n_top_genes=40, flavor="seurat")
    found = vc.hvg(adata, top=40, flavor="seurat")
    for name in ("means", "dispersions"):
        np.testing.assert_allclose(found[name], expected.var[name], rtol=1e-10)
    np.testing.assert_allclose(found["dispersions_norm"], expected.var["dispersions_norm"], rtol=1e-6, atol=1e-6)
    assert found.attrs["settings"]["values"] == "log1p"


def test_threads_change_nothing():
    adata = make_log()
    one, other = (vc.hvg(adata, top=40, flavor="seurat", threads=t) for t in (1, 3))
    np.testing.assert_array_equal(one["dispersions"], other["dispersions"])


def test_other_flavours_and_saved_statistics_still_need_counts(tmp_path):
    adata = make_log()
    for flavor in ("seurat_v3", "dispersion", "pearson_residuals"):
        with pytest.raises(NotCountsError):
            vc.hvg(adata, flavor=flavor)
    with pytest.raises(UsageError, match="stats_dpath: not with log1p values"):
        vc.hvg(adata, flavor="seurat", stats_dpath=tmp_path / "s")


def test_a_log_file_is_ranked_by_the_command(tmp_path):
    make_log().write_h5ad(tmp_path / "log.h5ad")
    done = run_cli("hvg", "log.h5ad", "--flavor", "seurat", "--top", 40, "--out", "h.txt", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "log1p values are ranked as they are" in done.stderr
    expected = ad.read_h5ad(tmp_path / "log.h5ad")
    sc.pp.highly_variable_genes(expected, n_top_genes=40, flavor="seurat")
    assert set((tmp_path / "h.txt").read_text().split()) <= set(expected.var_names[expected.var["highly_variable"]])
