"""Against scanpy 1.11.5: the same genes up to exact ties, the same numbers."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import vcelltools as vc
from tests.conftest import need_data
from tests.make import as_layout, make_adata, make_counts
from tests.oracles import normalised_moments, pearson_residual_variance, seurat_v3

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mudata
    import scanpy as sc

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers warn of their own affairs


def get_reference(adata, flavor, top, batch_key=None):
    a = adata.copy()
    a.var_names_make_unique()
    if flavor == "pearson_residuals":
        return sc.experimental.pp.highly_variable_genes(a, n_top_genes=top, batch_key=batch_key, inplace=False)
    if flavor in ("seurat", "cell_ranger"):
        a.X = a.X.astype(np.float32)
        sc.pp.normalize_total(a, target_sum=1e4)
        sc.pp.log1p(a)
    return sc.pp.highly_variable_genes(a, n_top_genes=top, flavor=flavor, batch_key=batch_key, inplace=False)


def assert_same_up_to_ties(ours, ref, adata, top, batch_key):
    """Genes chosen by one alone must owe it to an exact tie: within a batch, or of the final sort key at the cut."""
    a = set(ours.index[ours["highly_variable"]])
    b = set(ref.index[ref["highly_variable"]])
    assert len(a) == len(b) == min(top, len(ref))
    if a == b:
        return
    tied = get_tied_genes(adata, batch_key)
    for result in (ours, ref):
        frame = result.assign(n=result.get("highly_variable_nbatches", 1))
        inside = frame[frame["highly_variable"]]
        last = inside.sort_values(["highly_variable_rank", "n"], ascending=[True, False]).iloc[-1]
        same_key = (frame["highly_variable_rank"] == last["highly_variable_rank"]) & (frame["n"] == last["n"])
        tied |= set(frame.index[same_key])
    assert a ^ b <= tied, f"no ties: {(a ^ b) - tied}"
    assert len(a ^ b) <= 0.05 * top


def get_tied_genes(adata, batch_key):
    """Genes that share their normalised variance with another gene in some batch (scanpy's own figures)."""
    out = set()
    labels = [None] if batch_key is None else sorted(adata.obs[batch_key].unique())
    for label in labels:
        part = adata if label is None else adata[adata.obs[batch_key] == label]
        score = get_reference(part, "seurat_v3", 10)["variances_norm"].round(11)
        out |= set(score.index[score.duplicated(keep=False)])
    return out


CASES = ["thp1", "thp1-batches", "papalexi", "papalexi-lanes", "pbmc", "bulb"]


@pytest.fixture(scope="module")
def load(request):
    cache = {}

    def get(case):
        if case in cache:
            return cache[case]
        if case.startswith("thp1"):
            path = need_data("papalexi_thp1_eccite/papalexi_thp1_20729x299.h5ad")
            out = path, None, ad.read_h5ad(path), "bio_rep" if "batches" in case else None, 100
        elif case.startswith("papalexi"):
            path = need_data("papalexi_h5mu/papalexi_7108_gene_guide.h5mu")
            both = mudata.read_h5mu(path)
            a = both.mod["gene"]
            a.obs["lane"] = both.obs.loc[a.obs_names, "lane"]
            out = path, "gene", a, "lane" if "lanes" in case else None, 100
        elif case == "pbmc":
            path = need_data("pbmc1k_citeseq_10x/pbmc_1k_citeseq.h5mu")
            out = path, "rna", mudata.read_h5mu(path).mod["rna"], None, 2000
        else:
            path = need_data("mouse_olfactory_bulb_spatial/mOB_262x15928.h5ad")
            out = path, None, ad.read_h5ad(path), None, 2000
        cache[case] = out
        return out

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat_v3_paper"])
def test_seurat_v3_on_real_data(case, flavor, load):
    path, modality, adata, batch_key, top = load(case)
    ours = vc.hvg(path, top=top, flavor=flavor, modality=modality, batch_key=batch_key)
    ref = get_reference(adata, flavor, top, batch_key)
    assert list(ours.index) == list(adata.var_names)
    np.testing.assert_array_equal(ours["means"], ref["means"])
    np.testing.assert_array_equal(ours["variances"], ref["variances"])
    np.testing.assert_allclose(ours["variances_norm"], ref["variances_norm"], rtol=1e-12, atol=0)
    assert_same_up_to_ties(ours, ref, adata, top, batch_key)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "pearson_residuals"])
def test_other_flavors_on_real_data(case, flavor, load):
    path, modality, adata, batch_key, top = load(case)
    ours = vc.hvg(path, top=top, flavor=flavor, modality=modality, batch_key=batch_key)
    try:
        ref = get_reference(adata, flavor, top, batch_key)
    except ValueError as e:
        assert "Bin edges must be unique" in str(e)  # scanpy raises where many genes have no counts; we answer
        assert ours["highly_variable"].sum() == top
        return
    if flavor == "pearson_residuals":
        key = ["highly_variable_rank", *(["highly_variable_nbatches"] if batch_key else [])]
        differ = ours["highly_variable"] != ref["highly_variable"].to_numpy()
        assert len(ours.loc[differ, key].drop_duplicates()) <= 1  # one sort key, several genes: an exact tie
        np.testing.assert_allclose(ours["residual_variances"], ref["residual_variances"], rtol=1e-9)
    else:
        assert set(ours.index[ours["highly_variable"]]) == set(ref.index[ref["highly_variable"]])


def test_scanpy_counts_in_every_layout_and_dtype():
    X = make_counts(300, 400, seed=11)
    ref = get_reference(make_adata(as_layout(X, "csr")), "seurat_v3", 50)
    for layout in ("csr", "csc", "dense"):
        for dtype in ("float32", "float64", "int64", "int16"):
            ours = vc.hvg(make_adata(as_layout(X, layout, dtype)), top=50)
            np.testing.assert_array_equal(ours["means"], ref["means"])
            np.testing.assert_allclose(ours["variances_norm"], ref["variances_norm"], rtol=1e-12)
            assert set(ours.index[ours["highly_variable"]]) == set(ref.index[ref["highly_variable"]])


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_counts_above_4096_in_float32_agree_with_scanpy_to_the_digit(layout):
    X = make_counts(300, 200, seed=12)
    X[:9, 3] = [5_194, 4_097, 9_001, 7_777, 5_195, 4_099, 12_345, 6_001, 8_191]
    adata = make_adata(as_layout(X, layout, "float32"))
    ref = get_reference(adata, "seurat_v3", 50)
    ours = vc.hvg(adata, top=50)
    np.testing.assert_array_equal(ours["variances"], ref["variances"])
    np.testing.assert_allclose(ours["variances_norm"], ref["variances_norm"], rtol=1e-12)
    exact = vc.hvg(make_adata(as_layout(X, layout, "int64")), top=50)
    assert (exact["variances"].iloc[3] == ref["variances"].iloc[3]) == (layout == "csc")
    assert exact.attrs["genes"] == ours.attrs["genes"]


def test_dense_uint8_does_not_overflow():
    X = np.minimum(make_counts(200, 100, seed=3) * 6, 255)
    ours = vc.hvg(make_adata(X.astype(np.uint8)), top=30)
    right = vc.hvg(make_adata(as_layout(X, "csr")), top=30)
    assert ours.attrs["genes"] == right.attrs["genes"]


def test_the_definition_itself():
    X = make_counts(150, 200, seed=6)
    ours = vc.hvg(make_adata(as_layout(X, "csr")), top=40)
    np.testing.assert_allclose(ours["variances_norm"], seurat_v3(X), rtol=1e-9)


def test_moments_of_normalised_values_and_residuals():
    from vcelltools.io import open_dataset
    from vcelltools.selection.flavors import Task
    from vcelltools.selection.flavors._values import get_normalised_mean_variance
    from vcelltools.selection.statistics import scan

    X = make_counts(120, 60, seed=8)
    X[5] = 0
    for layout in ("csr", "csc", "dense"):
        adata, none = make_adata(as_layout(X, layout)), np.zeros(0)
        with open_dataset(adata) as ds:
            stats = scan(ds)
        task = Task(
            stats=stats, flavor="seurat", top=1, mean=none, variance=none, options={}, threads=2,
            open_dataset=lambda adata=adata: open_dataset(adata),
        )  # fmt: skip
        for log in (False, True):
            mean, var = get_normalised_mean_variance(task, log=log)
            expected = normalised_moments(X, log=log)
            np.testing.assert_allclose(mean[0], expected[0], rtol=1e-9)
            np.testing.assert_allclose(var[0], expected[1], rtol=1e-8)
    ours = vc.hvg(make_adata(as_layout(X, "csr")), top=10, flavor="pearson_residuals")
    np.testing.assert_allclose(ours["residual_variances"], pearson_residual_variance(X), rtol=1e-9)


def test_small_batches_are_answered_and_reported():
    """Eight small batches make scanpy raise; a batch of one cell ends its process."""
    X = make_counts(400, 150, seed=2)
    adata = make_adata(as_layout(np.minimum(X, 2), "csr"), batches=8)
    adata.obs["batch"] = adata.obs["batch"].cat.add_categories("solo")
    adata.obs.loc[adata.obs.index[0], "batch"] = "solo"
    frame = vc.hvg(adata, top=30, batch_key="batch")
    assert frame["highly_variable"].sum() == 30
    said = " ".join(frame.attrs["warnings"])
    assert "one cell" in said and "'solo'" in said


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_or_constant_cells_are_answered(n):
    X = np.tile(np.arange(1, 7, dtype=np.float32), (n, 1))
    frame = vc.hvg(make_adata(sparse.csr_matrix(X)), top=3)
    assert frame["highly_variable"].sum() == 3
    assert np.isfinite(frame["variances_norm"]).all()


def test_duplicate_names_are_told_apart_by_position():
    X = make_counts(100, 40, seed=4)
    names = [f"g{j // 2}" for j in range(40)]
    adata = make_adata(as_layout(X, "csr"), names=names)
    frame = vc.hvg(adata, top=11)
    assert frame["highly_variable"].sum() == 11
    assert any("more than once" in w for w in frame.attrs["warnings"])


def test_files_are_merged_as_batches(tmp_path):
    X = make_counts(200, 60, seed=5)
    adata = make_adata(as_layout(X, "csr"))
    adata.obs["file"] = ["a.h5ad"] * 120 + ["b.h5ad"] * 80
    ref = get_reference(adata, "seurat_v3", 20, "file")
    adata[:120].copy().write_h5ad(tmp_path / "a.h5ad")
    adata[120:, ::-1].copy().write_h5ad(tmp_path / "b.h5ad")
    ours = vc.hvg([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], top=20)
    np.testing.assert_allclose(ours["variances_norm"], ref["variances_norm"], rtol=1e-11)
    assert set(ours.index[ours["highly_variable"]]) == set(ref.index[ref["highly_variable"]])
