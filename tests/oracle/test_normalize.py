"""normalize against scanpy's normalize_total and log1p, in every layout."""

from __future__ import annotations

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from vcelltools.errors import DataError, NotCountsError, UsageError
from vcelltools.files.normalize import normalize


def scanpy_normalised(adata: anndata.AnnData, target_sum: float | None = 1e4, base: float | None = None) -> np.ndarray:
    import scanpy as sc

    a = adata.copy()
    a.X = a.X.astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some cells have zero counts", UserWarning)
        sc.pp.normalize_total(a, target_sum=target_sum)
    sc.pp.log1p(a, base=base)
    return a.X.toarray() if sparse.issparse(a.X) else np.asarray(a.X)


def make_adata(n: int = 120, g: int = 60, dtype="int32", seed: int = 0) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    X = rng.poisson(0.4, (n, g)) * rng.integers(1, 90, (n, g))
    X[7] = 0
    X[8, 3] = 70_000
    obs = pd.DataFrame({"batch": pd.Categorical(rng.choice(["a", "b"], n))}, index=[f"c{i}" for i in range(n)])
    var = pd.DataFrame({"gene_ids": [f"E{i}" for i in range(g)]}, index=[f"g{i}" for i in range(g)])
    return anndata.AnnData(sparse.csr_matrix(X.astype(dtype)), obs=obs, var=var)


def as_layout(adata: anndata.AnnData, layout: str) -> anndata.AnnData:
    a = adata.copy()
    a.X = {"csr": a.X.tocsr, "csc": a.X.tocsc, "dense": a.X.toarray}[layout]()
    return a


def check(path, want: np.ndarray) -> anndata.AnnData:
    got = anndata.read_h5ad(path)
    X = got.X.toarray() if sparse.issparse(got.X) else got.X
    assert X.dtype == np.float32
    np.testing.assert_allclose(X, want, rtol=1e-6, atol=1e-6)
    return got


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float64", "uint16"])
def test_equals_scanpy(tmp_path, layout, dtype):
    a = make_adata(dtype="int64" if dtype == "uint16" else dtype)
    if dtype == "uint16":
        a.X.data = np.minimum(a.X.data, 60_000).astype(np.uint16)
    as_layout(a, layout).write_h5ad(tmp_path / "a.h5ad")
    r = normalize(tmp_path / "a.h5ad", tmp_path / "b.h5ad")
    got = check(tmp_path / "b.h5ad", scanpy_normalised(a))
    assert (r.n_empty, r.layout) == (1, layout)
    pd.testing.assert_frame_equal(got.obs, a.obs)
    pd.testing.assert_frame_equal(got.var, a.var)
    if layout != "dense":
        assert got.X.format == layout
    assert not np.any(got.X[7].toarray() if layout != "dense" else got.X[7])


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("options", [{"base": 2.0}, {"target_sum": None}, {"target_sum": 100.0, "base": 10.0}])
def test_options(tmp_path, layout, options):
    a = make_adata()
    as_layout(a, layout).write_h5ad(tmp_path / "a.h5ad")
    normalize(tmp_path / "a.h5ad", tmp_path / "b.h5ad", **options)
    want = scanpy_normalised(a, options.get("target_sum", 1e4), options.get("base"))
    if options.get("target_sum", 0) is None:  # scanpy takes the median over all cells with counts
        sums = np.asarray(a.X.sum(axis=1)).ravel()
        want = scanpy_normalised(a, float(np.median(sums[sums > 0])))
    check(tmp_path / "b.h5ad", want)


def test_without_log_keeps_counts_aside(tmp_path):
    a = make_adata()
    r = normalize(a, tmp_path / "b.h5ad", log=False, keep_counts=True, compression="gzip")
    got = anndata.read_h5ad(tmp_path / "b.h5ad")
    sums = np.asarray(got.X.sum(axis=1)).ravel()
    np.testing.assert_allclose(sums[sums > 0], 1e4, rtol=1e-6)
    assert np.count_nonzero(sums) == a.n_obs - 1
    np.testing.assert_array_equal(got.layers["counts"].toarray(), a.X.toarray())
    assert got.layers["counts"].dtype == np.int32
    assert "log1p" not in got.uns
    assert r.target_sum == 1e4


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_repeated_and_unsorted_positions(tmp_path, layout):
    """A position stored twice is summed before the logarithm, as scipy's canonical form has it."""
    a = make_adata(n=40, g=30)
    a.X = a.X.tocsc() if layout == "csc" else a.X
    X = a.X
    j = int(X.indptr[5])
    a.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as f:
        group = f["X"]
        data, indices, indptr = (group[k][:] for k in ("data", "indices", "indptr"))
        split = np.insert(data, j, 2)
        twice = np.insert(indices, j, indices[j])
        twice[[j + 1, j + 2]] = twice[[j + 2, j + 1]]
        split[[j + 1, j + 2]] = split[[j + 2, j + 1]]
        indptr[6:] += 1
        for k, v in (("data", split), ("indices", twice), ("indptr", indptr)):
            del group[k]
            group[k] = v
    want = a.X.tolil()
    where = (5, a.X.indices[j]) if layout == "csr" else (a.X.indices[j], 5)
    want[where] = want[where] + 2
    b = a.copy()
    b.X = want.tocsr()
    r = normalize(tmp_path / "a.h5ad", tmp_path / "b.h5ad")
    check(tmp_path / "b.h5ad", scanpy_normalised(b))
    assert any("1 duplicate entries" in w for w in r.warnings)


def test_dense_chunked_by_columns(tmp_path):
    a = make_adata()
    as_layout(a, "dense").write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as f:
        X = f["X"][:]
        attrs = dict(f["X"].attrs)
        del f["X"]
        f.create_dataset("X", data=X, chunks=(120, 4), compression="gzip").attrs.update(attrs)
    normalize(tmp_path / "a.h5ad", tmp_path / "b.h5ad")
    check(tmp_path / "b.h5ad", scanpy_normalised(a))


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_library_size_column(tmp_path, layout):
    """With the library sizes of the whole transcriptome, a part of it is normalised as the whole is."""
    a = make_adata()
    sizes = np.asarray(a.X.sum(axis=1)).ravel()
    part = a[:, 10:40].copy()
    part.obs["total"] = sizes
    as_layout(part, layout).write_h5ad(tmp_path / "a.h5ad")
    normalize(tmp_path / "a.h5ad", tmp_path / "b.h5ad", library_size="total")
    check(tmp_path / "b.h5ad", scanpy_normalised(a)[:, 10:40])


def test_library_size_column_that_is_too_small(tmp_path):
    a = make_adata()
    a.obs["total"] = 3.0
    for layout in ("csr", "csc", "dense"):
        as_layout(a, layout).write_h5ad(tmp_path / f"{layout}.h5ad")
        with pytest.raises(DataError, match="obs/total"):
            normalize(tmp_path / f"{layout}.h5ad", tmp_path / "b.h5ad", library_size="total")


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize(("value", "message"), [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_bad_values_name_cell_and_gene(tmp_path, layout, value, message):
    a = make_adata(n=3000, g=50, dtype="float32")
    a.X[2917, 13] = 5
    a = as_layout(a, layout)
    if layout == "dense":
        a.X[2917, 13] = value
    else:
        row = a.X.tocoo()
        a.X = sparse.coo_matrix(
            (np.where((row.row == 2917) & (row.col == 13), value, row.data), (row.row, row.col)), shape=row.shape
        ).asformat(layout)
    a.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match=rf"cell 2,917 .*, gene 13 .*{message}"):
        normalize(tmp_path / "a.h5ad", tmp_path / "b.h5ad")
    assert not (tmp_path / "b.h5ad").exists()


def to_fractions(X, share, seed=5):
    """Counts corrected for ambient RNA: a share of them becomes fractional."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(X.shape) < share, X * rng.uniform(0.8, 1.0, X.shape), X).astype("float32")


@pytest.mark.parametrize("share", [1.0, 0.3, 1e-5])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("target", [1e4, None])
def test_fractional_counts_are_taken_as_scanpy_takes_them(tmp_path, layout, share, target):
    a = make_adata(n=400, g=50, dtype="float32")
    X = to_fractions(a.X.toarray(), share)
    X[11], X[399, 49] = 0, 0.5
    a.X = sparse.csr_matrix(X)
    as_layout(a, layout).write_h5ad(tmp_path / "a.h5ad")
    result = normalize(tmp_path / "a.h5ad", tmp_path / "b.h5ad", target_sum=target, keep_counts=True)
    assert any("some counts are fractional" in w for w in result.warnings)
    sums = X.sum(axis=1, dtype=float)
    want = scanpy_normalised(a, target or float(np.median(sums[sums > 0])))
    kept = check(tmp_path / "b.h5ad", want).layers["counts"]
    np.testing.assert_array_equal(kept.toarray() if sparse.issparse(kept) else kept, X)


def test_normalised_input_is_refused(tmp_path):
    a = make_adata(dtype="float32")
    normalize(a, tmp_path / "b.h5ad")
    with pytest.raises(NotCountsError, match="log1p"):
        normalize(tmp_path / "b.h5ad", tmp_path / "c.h5ad")


@pytest.mark.parametrize("options", [{"target_sum": -1.0}, {"base": 1.0}, {"log": False, "base": 2.0}])
def test_options_that_cannot_be(tmp_path, options):
    with pytest.raises(UsageError):
        normalize(make_adata(), tmp_path / "b.h5ad", **options)


def test_real_files(tmp_path, thp1, papalexi, pbmc):
    import mudata

    a = anndata.read_h5ad(thp1)
    normalize(thp1, tmp_path / "thp1.h5ad")
    check(tmp_path / "thp1.h5ad", scanpy_normalised(a))
    for path, modality in ((papalexi, "gene"), (pbmc, "rna")):
        m = mudata.read_h5ad(path, modality)
        normalize(path, tmp_path / f"{modality}.h5ad", modality=modality)
        check(tmp_path / f"{modality}.h5ad", scanpy_normalised(m))


def test_command(tmp_path, cli):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    r = cli("normalize", tmp_path / "a.h5ad", "--out", tmp_path / "b.h5ad", "--target-sum", "median", "--json")
    assert r.code == 0, r.stderr
    assert (r.json["n_cells"], r.json["n_genes"], r.json["n_empty"]) == (120, 60, 1)
    assert cli("normalize", tmp_path / "a.h5ad", "--out", tmp_path / "b.h5ad").code == 2
    assert cli("normalize", tmp_path / "a.h5ad", "--out", tmp_path / "b.h5ad", "--force").code == 0
    assert cli("normalize", tmp_path / "b.h5ad", "--out", tmp_path / "c.h5ad").code == 3
    assert cli("normalize", tmp_path / "a.h5ad", "--out", tmp_path / "c.h5ad", "--target-sum", "many").code == 2
