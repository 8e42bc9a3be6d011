"""Fractional counts in hvg: refused by default with what to do, rounded at random, or kept as scanpy keeps them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

from tests.files import read_all
from tests.make import as_layout, make_adata, make_counts
from vcelltools.errors import NotCountsError, UsageError
from vcelltools.io import open_dataset
from vcelltools.io.rounding import round_matrix
from vcelltools.selection.hvg import compute_hvg

LAYOUTS = ["csr", "csc", "dense"]


@pytest.fixture(scope="module")
def fractions():
    X = make_counts(300, 200, seed=6)
    X[:30, :20] *= 12
    return (X * np.random.default_rng(1).uniform(0.8, 1.0, X.shape)).astype("float32")


def test_the_default_refuses_and_names_the_options(fractions):
    with pytest.raises(NotCountsError) as e:
        compute_hvg(make_adata(fractions))
    assert "non_integer='round' or 'keep'" in e.value.hint
    with pytest.raises(UsageError, match="not known"):
        compute_hvg(make_adata(fractions), non_integer="drop")
    with pytest.raises(UsageError, match="only supported for one file"):
        compute_hvg([make_adata(fractions)] * 2, non_integer="round")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_keeps_the_mean_and_knows_no_layout(fractions, layout, tmp_path):
    make_adata(as_layout(fractions, layout)).write_h5ad(tmp_path / "x.h5ad")
    with open_dataset(tmp_path / "x.h5ad") as ds:
        got = read_all(round_matrix(ds.matrix, 3), max_values=999)
        other = read_all(round_matrix(ds.matrix, 4))
    with open_dataset(make_adata(fractions)) as ds:
        np.testing.assert_array_equal(got, read_all(round_matrix(ds.matrix, 3)))
    assert (got == np.rint(got)).all() and ((got - fractions) < 1).all() and ((got - fractions) > -1).all()
    assert (other != got).any()
    n = np.count_nonzero(fractions)
    assert abs((got - fractions).sum()) < 4 * 0.5 * np.sqrt(n)
    up = (got > fractions)[fractions > 0].mean()
    assert abs(up - (fractions - np.floor(fractions))[fractions > 0].mean()) < 4 * 0.5 / np.sqrt(n)


def test_rounded_counts_are_ranked_as_if_they_were_in_the_file(fractions, tmp_path):
    adata = make_adata(as_layout(fractions, "csr"), batches=2)
    with open_dataset(adata) as ds:
        whole = make_adata(read_all(round_matrix(ds.matrix, 7)).astype("float32"))
    whole.obs = adata.obs
    for flavor in ("seurat_v3", "seurat", "pearson_residuals"):
        got = compute_hvg(adata, top=50, flavor=flavor, batch_key="batch", non_integer="round", seed=7)
        assert got.selected == compute_hvg(whole, top=50, flavor=flavor, batch_key="batch").selected
        assert got.settings["non_integer"] == "round" and any("rounded" in w for w in got.warnings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batches", [0, 3])
def test_kept_fractions_equal_scanpy(fractions, layout, batches, tmp_path):
    adata = make_adata(as_layout(fractions, layout, "float64"), batches=batches)
    key = "batch" if batches else None
    got = compute_hvg(adata, top=60, batch_key=key, non_integer="keep", threads=3)
    again = compute_hvg(adata, top=60, batch_key=key, non_integer="keep", threads=1)
    with pytest.warns(UserWarning, match="non-integers"):
        want = sc.pp.highly_variable_genes(
            ad.AnnData(adata.X, adata.obs, adata.var), flavor="seurat_v3", n_top_genes=60, batch_key=key, inplace=False
        )
    np.testing.assert_allclose(got.columns["variances_norm"], want["variances_norm"], rtol=1e-8)
    differ = np.flatnonzero(got.columns["highly_variable"] != want["highly_variable"])
    assert len(differ) <= 2 * bool(batches)  # equal median ranks: scanpy breaks the tie by position, we by name
    np.testing.assert_array_equal(got.columns["variances_norm"], again.columns["variances_norm"])
    assert any("sums of floats" in w for w in got.warnings)


def test_kept_fractions_in_the_other_flavours(fractions):
    adata = make_adata(as_layout(fractions, "csr", "float64"))
    got = compute_hvg(adata, top=60, flavor="dispersion", non_integer="keep")
    mean, variance = fractions.astype("f8").mean(0), fractions.astype("f8").var(0, ddof=1)
    np.testing.assert_allclose(got.columns["means"], mean)
    np.testing.assert_allclose(got.columns["variances"], variance)
    logged = ad.AnnData(np.log1p(fractions / fractions.sum(1, keepdims=True) * 1e4), var=adata.var)
    want = sc.pp.highly_variable_genes(logged, flavor="seurat", n_top_genes=60, inplace=False)
    got = compute_hvg(adata, top=60, flavor="seurat", non_integer="keep")
    assert (got.columns["highly_variable"] == want["highly_variable"]).mean() > 0.98
    assert len(compute_hvg(adata, top=60, flavor="pearson_residuals", non_integer="keep").selected) == 60


def test_the_command_takes_them(fractions, tmp_path, cli):
    make_adata(as_layout(fractions, "csr")).write_h5ad(tmp_path / "x.h5ad")
    done = cli("hvg", "x.h5ad", "--top", 9, "--out", "h.txt", "--json", cwd=tmp_path)
    assert done.code == 3 and "--non-integer" in done.json["error"]["hint"]
    for what in ("round", "keep"):
        done = cli("hvg", "x.h5ad", "--top", 9, "--out", f"{what}.txt", "--non-integer", what, cwd=tmp_path)
        assert done.code == 0 and "warning" in done.stderr


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3", "dispersion", "pearson_residuals"])
def test_a_batch_without_counts_is_told_and_ranks_nothing(flavor):
    counts = make_counts(90, 50, seed=2)
    counts[0] = 0
    adata = make_adata(as_layout(counts, "csr"), batches=2)
    want = compute_hvg(make_adata(as_layout(counts[1:], "csr")), top=10, flavor="dispersion").selected
    adata.obs["batch"] = ["empty", *adata.obs["batch"].astype(str)[1:]]
    got = compute_hvg(adata, top=10, flavor=flavor, batch_key="batch")
    assert len(got.selected) == 10 and len(want) == 10
    if flavor in ("seurat", "cell_ranger"):
        assert "batch 'empty' has no counts" in got.warnings


def test_small_fractions_are_counts_for_those_who_say_so():
    """Values below 15 may be log1p values: they are refused, with the options, unless an option is given."""
    small = (make_counts(300, 60, seed=2) * np.random.default_rng(3).uniform(0.8, 1.0, (300, 60))).astype("float32")
    small = np.minimum(small, 14)
    with pytest.raises(NotCountsError, match="log1p") as e:
        compute_hvg(make_adata(small))
    assert "non_integer='round' or 'keep'" in e.value.hint
    got = compute_hvg(make_adata(small), top=20, non_integer="keep")
    assert any("may be log1p" in n for n in got.notes)
    want = sc.pp.highly_variable_genes(
        make_adata(small), n_top_genes=20, flavor="seurat_v3", check_values=False, inplace=False
    )
    assert set(got.selected) == set(want.index[want["highly_variable"]])
