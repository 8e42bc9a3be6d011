"""convert and sample against anndata's own reading and indexing."""

from __future__ import annotations

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from tests.conftest import need_data
from vcelltools.errors import DataError, UsageError
from vcelltools.files.chosen_cells import choose_rows, find_allowed, parse_where
from vcelltools.files.convert import convert, sample
from vcelltools.io import open_dataset
from vcelltools.io.hdf5.limits import get_filters

N, G = 230, 41


def make_adata(seed: int = 0) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    X = rng.poisson(0.5, (N, G)) * rng.integers(1, 50, (N, G))
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(["a", "b", "c"], N, p=[0.7, 0.2, 0.1])),
            "hole": pd.Categorical([None if i % 9 == 0 else "x" for i in range(N)]),
            "flag": rng.random(N) < 0.5,
            "n": pd.array([None if i % 4 == 0 else i for i in range(N)], dtype="Int64"),
        },
        index=[f"c{i}" for i in range(N)],
    )
    a = anndata.AnnData(
        sparse.csr_matrix(X.astype(np.int32)), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(G)])
    )
    a.layers["half"] = sparse.csc_matrix(X / 2)
    a.layers["dense"] = X.astype(np.float32)
    a.obsm["pca"] = rng.normal(size=(N, 3))
    a.obsm["sparse"] = sparse.random(N, 7, 0.3, format="csr", random_state=1)
    a.obsm["frame"] = pd.DataFrame({"x": rng.normal(size=N), "y": obs["batch"]}, index=obs.index)
    a.obsp["graph"] = sparse.random(N, N, 0.02, format="csr", random_state=2)
    a.obsp["dense"] = rng.normal(size=(N, N))
    a.varp["pairs"] = rng.normal(size=(G, G))
    a.varm["load"] = rng.normal(size=(G, 2))
    a.uns["nested"] = {"text": "täxt", "number": 3, "flag": True, "list": np.array(["p", "q"]), "none": None}
    a.uns["colors"] = np.array(["#fff", "#000"], dtype=object)
    return a


def as_dense(X) -> np.ndarray:
    return X.toarray() if sparse.issparse(X) else np.asarray(X)


def check_same(got: anndata.AnnData, want: anndata.AnnData) -> None:
    pd.testing.assert_frame_equal(got.obs, want.obs)
    pd.testing.assert_frame_equal(got.var, want.var)
    np.testing.assert_array_equal(as_dense(got.X), as_dense(want.X))
    for k in want.obsm:
        if k == "frame":
            pd.testing.assert_frame_equal(got.obsm[k], want.obsm[k])
        else:
            np.testing.assert_array_equal(as_dense(got.obsm[k]), as_dense(want.obsm[k]))
    for k in want.obsp:
        np.testing.assert_array_equal(as_dense(got.obsp[k]), as_dense(want.obsp[k]))
    np.testing.assert_array_equal(got.varp["pairs"], want.varp["pairs"])
    np.testing.assert_array_equal(got.varm["load"], want.varm["load"])
    assert got.uns["nested"].keys() == want.uns["nested"].keys()
    assert got.uns["nested"]["text"] == "täxt"
    assert got.uns["nested"]["none"] is None
    assert list(got.uns["colors"]) == list(want.uns["colors"])


@pytest.mark.parametrize("source", ["X", "half", "dense"])
@pytest.mark.parametrize("target", ["csr", "csc", "dense"])
def test_every_layout_to_every_layout(tmp_path, source, target):
    a = make_adata()
    a.write_h5ad(tmp_path / "a.h5ad")
    r = convert(tmp_path / "a.h5ad", tmp_path / "b.h5ad", layer=source, layout=target, layers=["all"], threads=2)
    b = anndata.read_h5ad(tmp_path / "b.h5ad")
    want = a.copy()
    want.X = a.X if source == "X" else a.layers[source]
    check_same(b, want)
    assert r.layout == target
    names = set(b.layers) - {None}  # anndata 0.13: X
    assert names == {"half", "dense"} - {source}
    for name in names:
        np.testing.assert_array_equal(as_dense(b.layers[name]), as_dense(a.layers[name]))
    if target != "dense":
        assert b.X.format == target
        assert b.X.has_sorted_indices
        assert r.nnz == want.X.nnz if sparse.issparse(want.X) else np.count_nonzero(want.X)
    assert r.warnings == (() if source == "X" else (f"X was not copied, because {source} replaces it",))


def test_from_memory(tmp_path):
    a = make_adata()
    a.raw = a[:, :30].copy()
    r = convert(a, tmp_path / "b.h5ad", layout="csc", layers=["half"])
    check_same(anndata.read_h5ad(tmp_path / "b.h5ad"), a)
    assert r.warnings == (
        "layers that were not copied: dense (copy them with layers='all')",
        "raw was not copied (write it as X with layer='raw')",
    )
    convert(a, tmp_path / "c.h5ad", layer="raw")
    c = anndata.read_h5ad(tmp_path / "c.h5ad")
    assert c.shape == (N, 30)
    np.testing.assert_array_equal(c.X.toarray(), a.X[:, :30].toarray())


def test_zarr(tmp_path):
    pytest.importorskip("zarr")
    import warnings

    a = make_adata()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr and anndata argue about format 2
        a.write_zarr(tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "b.h5ad", layout="csc")
    check_same(anndata.read_h5ad(tmp_path / "b.h5ad"), a)


@pytest.mark.parametrize(
    ("dtype", "index", "compression", "contiguous"),
    [("uint16", "int64", "gzip", False), ("float64", "int32", "none", True), ("int8", "int32", "zstd", False)],
)
def test_storage(tmp_path, dtype, index, compression, contiguous):
    a = make_adata()
    a.X.data = np.minimum(a.X.data, 100)
    convert(
        a,
        tmp_path / "b.h5ad",
        dtype=dtype,
        index_dtype=index,
        compression=compression,
        contiguous=contiguous,
        chunk_len=None if contiguous else 777,
    )
    with h5py.File(tmp_path / "b.h5ad") as f:
        X = f["X"]
        assert (X["data"].dtype, X["indices"].dtype) == (dtype, index)
        assert X["data"].chunks == (None if contiguous else (777,))
        assert get_filters(X["data"]) == {"gzip": [1], "zstd": [32015]}.get(compression, [])
    np.testing.assert_array_equal(as_dense(anndata.read_h5ad(tmp_path / "b.h5ad").X), a.X.toarray())


def test_values_that_do_not_fit(tmp_path):
    a = make_adata()
    a.X.data[50] = 300
    with pytest.raises(DataError, match="300 does not fit uint8"):
        convert(a, tmp_path / "b.h5ad", dtype="uint8")
    with pytest.raises(DataError, match=r"\.5 does not fit int32"):
        convert(a, tmp_path / "b.h5ad", layer="half", dtype="int32")
    assert list(tmp_path.iterdir()) == []


def test_index_outside_the_matrix(tmp_path):
    for layout in ("csr", "csc"):
        a = make_adata()
        a.X = a.X.asformat(layout)
        del a.layers["half"], a.layers["dense"]
        path = tmp_path / f"{layout}.h5ad"
        a.write_h5ad(path)
        with h5py.File(path, "r+") as f:
            f["X/indices"][100] = 9999
        for target in ("csr", "csc", "dense"):
            with pytest.raises(DataError, match="9,999"):
                convert(path, tmp_path / "b.h5ad", layout=target)


def test_what_cannot_be_carried_is_told(tmp_path):
    a = make_adata()
    a.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "secret.h5").write_bytes(b"")
    with h5py.File(tmp_path / "a.h5ad", "r+") as f:
        f["uns/link"] = h5py.ExternalLink("secret.h5", "/")
    r = convert(tmp_path / "a.h5ad", tmp_path / "b.h5ad", layers=["all"])
    assert len(r.warnings) == 1
    assert "uns/link" in r.warnings[0]
    assert "external" in r.warnings[0]
    check_same(anndata.read_h5ad(tmp_path / "b.h5ad"), a)


def test_modalities(tmp_path, papalexi, pbmc):
    for path, modality in ((papalexi, "gene"), (papalexi, "guide"), (pbmc, "rna")):
        m = mudata.read_h5ad(path, modality)
        out = tmp_path / f"{modality}.h5ad"
        convert(path, out, modality=modality, layout="csc", layers=["all"])
        b = anndata.read_h5ad(out)
        np.testing.assert_array_equal(as_dense(b.X), as_dense(m.X))
        assert list(b.obs_names) == list(m.obs_names)
        assert list(b.var_names) == list(m.var_names)
        assert set(m.obs.columns) <= set(b.obs.columns)
        assert set(b.layers) == set(m.layers)


def test_tenx(tmp_path):
    for name in ("10x_data/3.0.0/filtered_feature_bc_matrix.h5", "10x_data/3.0.0/filtered_feature_bc_matrix"):
        path = need_data(f"reader_fixtures/scanpy/{name}")
        convert(path, tmp_path / "b.h5ad", force=True)
        b = anndata.read_h5ad(tmp_path / "b.h5ad")
        with open_dataset(path) as ds:
            assert b.shape == ds.matrix.shape
            assert list(b.obs_names) == list(ds.obs.index)
        assert b.X.sum() > 0


def test_real_screen(tmp_path, thp1):
    a = anndata.read_h5ad(thp1)
    r = convert(thp1, tmp_path / "b.h5ad", layout="csc", compression="gzip", dtype="uint16")
    b = anndata.read_h5ad(tmp_path / "b.h5ad")
    assert (b.X != a.X).nnz == 0
    pd.testing.assert_frame_equal(b.obs, a.obs)
    np.testing.assert_array_equal(as_dense(b.obsm["guide_counts"]), as_dense(a.obsm["guide_counts"]))
    assert list(b.uns["guide_names"]) == list(a.uns["guide_names"])
    assert r.nnz == a.X.nnz


# ---- sample


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_sample_is_anndatas_subset(tmp_path, layout):
    a = make_adata()
    a.X = a.X.asformat(layout) if layout != "dense" else a.X.toarray()
    a.write_h5ad(tmp_path / "a.h5ad")
    sample(tmp_path / "a.h5ad", tmp_path / "b.h5ad", n=60, seed=3, layers=["all"])
    b = anndata.read_h5ad(tmp_path / "b.h5ad")
    rows = [int(v[1:]) for v in b.obs_names]
    assert rows == sorted(rows)
    want = a[rows].copy()
    for k in want.obs.columns:  # anndata drops categories that the subset lacks; we keep the file's
        if isinstance(want.obs[k].dtype, pd.CategoricalDtype):
            want.obs[k] = want.obs[k].cat.set_categories(a.obs[k].cat.categories)
    want.obsm["frame"]["y"] = want.obsm["frame"]["y"].cat.set_categories(["a", "b", "c"])
    check_same(b, want)
    np.testing.assert_array_equal(as_dense(b.layers["half"]), as_dense(want.layers["half"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, N), seed=st.integers(0, 5), by=st.sampled_from([None, "batch", "hole", "flag"]))
def test_proportions(n, seed, by):
    with open_dataset(make_adata()) as ds:
        rows, groups = choose_rows(ds, n=n, frac=None, per_group=None, by=by, seed=seed)
        assert len(rows) == len(set(rows.tolist())) == n
        assert (np.diff(rows) > 0).all()
        if by is None:
            assert groups is None
            return
        labels = np.array([v if v is not None else "no label" for v in ds.obs.column(by).labels()])
        for label, k in groups.items():
            assert np.count_nonzero(labels[rows] == label) == k
            assert abs(k - n * np.count_nonzero(labels == label) / N) < 1


def test_choices_are_nested_and_seeded():
    with open_dataset(make_adata()) as ds:

        def get(**k):
            return set(
                choose_rows(ds, **{"n": None, "frac": None, "per_group": None, "by": None, "seed": 0, **k})[0].tolist()
            )

        assert get(n=40) == get(n=40)
        assert get(n=40) != get(n=40, seed=1)
        assert get(n=40) < get(n=90)
        assert get(per_group=3, by="batch") < get(per_group=8, by="batch")
        assert len(get(frac=0.5)) == N // 2
        assert get(per_group=10_000, by="batch") == set(range(N))
        _, groups = choose_rows(ds, n=None, frac=None, per_group=5, by="hole", seed=0)
        assert groups == {"x": 5, "no label": 5}


def test_cells_chosen_by_their_labels(tmp_path):
    """As pandas would choose them; then at random among these."""
    a = make_adata()
    other = a[a.obs["batch"].isin(["b"])].copy()
    label = a.obs["batch"].astype(str).to_numpy()
    with open_dataset(a) as ds:
        for where, matching, want in (
            ({"batch": ["b"]}, None, label == "b"),
            ({"batch": ["b,c"]}, None, np.isin(label, ["b", "c"])),
            ({"batch": ["b", "c"], "flag": ["True"]}, None, np.isin(label, ["b", "c"]) & (a.obs["flag"] == True)),  # noqa: E712
            ({}, other, label == "b"),
        ):
            allowed = find_allowed(ds, where, "batch", matching)
            np.testing.assert_array_equal(allowed, np.asarray(want, bool))
            rows, _ = choose_rows(ds, n=None, frac=None, per_group=None, by=None, seed=0, allowed_n=allowed)
            np.testing.assert_array_equal(rows, np.flatnonzero(allowed))
            some, groups = choose_rows(ds, n=5, frac=None, per_group=None, by="batch", seed=0, allowed_n=allowed)
            assert len(some) == sum(groups.values()) == 5
            assert set(some) < set(rows)
        with pytest.raises(DataError, match="no cell has obs/batch = 'nowhere'"):
            find_allowed(ds, {"batch": ["nowhere"]}, None, None)
        with pytest.raises(UsageError, match="the obs column to match was not given"):
            find_allowed(ds, {}, None, other)
    sample(a, tmp_path / "s.h5ad", by="batch", matching=other)
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "s.h5ad").obs_names, other.obs_names)


@pytest.mark.parametrize("text", ["batch", "=3", "batch="])
def test_where_says_which_cells(text):
    with pytest.raises(UsageError, match="is not a valid condition"):
        parse_where([text])


@pytest.mark.parametrize(
    "bad", [{}, {"n": 5, "frac": 0.5}, {"n": 0}, {"n": N + 1}, {"frac": 0.0}, {"frac": 1.5}, {"per_group": 3}]
)
def test_choices_that_cannot_be(tmp_path, bad):
    with pytest.raises(UsageError):
        sample(make_adata(), tmp_path / "b.h5ad", **bad)


def test_commands(tmp_path, cli):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    b, c = tmp_path / "b.h5ad", tmp_path / "c.h5ad"
    r = cli("convert", tmp_path / "a.h5ad", "--out", b, "--layout", "csc", "--layers", "half", "--json")
    assert r.code == 0, r.stderr
    assert (r.json["layout"], r.json["layers"]) == ("csc", ["half"])
    assert cli("convert", tmp_path / "a.h5ad", "--out", b).code == 2
    assert cli("convert", tmp_path / "a.h5ad", "--out", c, "--layout", "coo").code == 2
    assert cli("convert", tmp_path / "a.h5ad", "--out", c, "--layers", "nothing").code == 3
    r = cli("sample", tmp_path / "a.h5ad", "--out", c, "--per-group", 7, "--by", "batch", "--json")
    assert r.code == 0, r.stderr
    assert r.json["groups"] == {"a": 7, "b": 7, "c": 7}
    assert cli("sample", tmp_path / "a.h5ad", "--out", c, "--n", 5).code == 2
    assert cli("sample", tmp_path / "a.h5ad", "--out", tmp_path / "d.h5ad", "--n", 5, "--by", "nothing").code == 3
