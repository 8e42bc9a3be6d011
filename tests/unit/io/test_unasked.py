"""Objects that nobody asked for: carried exactly where they can be, else left out with a word; never an error."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from tests.files import write_h5ad
from tests.make import as_layout, make_adata, make_counts
from vcelltools.files.convert import convert, sample
from vcelltools.files.normalize import normalize
from vcelltools.io import open_dataset
from vcelltools.stores.building.make import build_store
from vcelltools.stores.store import open_store

STR = h5py.string_dtype()


@pytest.fixture
def plain(tmp_path):
    adata = make_adata(as_layout(make_counts(60, 20, seed=2), "csr"), batches=3)
    adata.write_h5ad(tmp_path / "x.h5ad")
    return tmp_path / "x.h5ad"


def add(path, table, name, data, **options):
    """Add a column to a table of a file, as another writer might."""
    with h5py.File(path, "a") as f:
        made = f[table].create_dataset(name, data=data, **options)
        kind = "string-array" if h5py.check_string_dtype(made.dtype) else "array"
        made.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})
        order = [*f[table].attrs["column-order"], name]
        f[table].attrs.create("column-order", np.array(order, object), dtype=STR)


@pytest.mark.filterwarnings("ignore:.*slash.*:FutureWarning", "ignore:.*slash.*:DeprecationWarning")
@pytest.mark.parametrize(
    "write", [convert, normalize, lambda s, o: sample(s, o, n=9)], ids=["convert", "norm", "sample"]
)
def test_a_column_with_a_slash_is_used_and_carried(plain, tmp_path, write):
    add(plain, "obs", "dose/uM", np.arange(60.0))
    add(plain, "obs", "dose/mM", np.arange(60.0) / 1000)
    with open_dataset(plain) as ds:
        assert ds.obs.columns == ["batch", "dose/uM", "dose/mM"]
        assert ds.obs.column("dose/uM").values[7] == 7
    result = write(plain, tmp_path / "o.h5ad")
    assert not [w for w in result.warnings if "dose" in w]
    back = ad.read_h5ad(tmp_path / "o.h5ad").obs
    np.testing.assert_allclose(back["dose/uM"], 1000 * back["dose/mM"])


def test_text_of_any_declared_or_undeclared_character_set_is_read(plain, tmp_path):
    add(plain, "obs", "ascii", ["Zürich".encode()] * 60, dtype=h5py.string_dtype("ascii"))
    add(plain, "obs", "latin", ["3 µM".encode("latin-1")] * 60, dtype=STR)
    add(plain, "obs", "fixed", np.array(["3 µM".encode("latin-1")] * 60, "S4"))
    convert(plain, tmp_path / "o.h5ad")
    back = ad.read_h5ad(tmp_path / "o.h5ad").obs
    assert back["ascii"].iloc[0] == "Zürich" and back["latin"].iloc[0] == back["fixed"].iloc[0] == "3 µM"


@pytest.mark.parametrize(
    "data",
    [
        np.ones(60, complex),
        np.zeros(60, [("a", "i4"), ("b", "f8")]),
        np.ones((60, 2)),
        np.ones(59),
        np.full(60, h5py.Reference(), h5py.ref_dtype),
        np.array([np.arange(i % 3) for i in range(60)], h5py.vlen_dtype("i4")),
    ],
    ids=["complex", "record", "matrix", "short", "reference", "ragged"],
)
def test_a_column_of_an_odd_type_is_left_out_and_said(plain, tmp_path, data):
    add(plain, "obs", "odd", data)
    for write in (convert, normalize):
        result = write(plain, tmp_path / "o.h5ad", force=True)
        assert any("obs/odd" in w for w in result.warnings)
        assert list(ad.read_h5ad(tmp_path / "o.h5ad").obs) == ["batch"]


def test_a_store_keeps_long_doubles_and_leaves_out_references(plain, tmp_path):
    add(plain, "obs", "long", np.arange(60, dtype=np.longdouble) / 4)
    add(plain, "obs", "odd", np.full(60, h5py.Reference(), h5py.ref_dtype))
    build_store(plain, basis=["g0", "g1"], out=tmp_path, name="s", pert_col="batch", control="b0")
    obs = open_store(tmp_path / "s").obs
    assert "odd" not in obs
    assert obs["long"].tolist() == [int(name.removeprefix("cell")) / 4 for name in obs.index]


def test_repeated_and_missing_categories_are_merged(plain, tmp_path):
    with h5py.File(plain, "a") as f:
        del f["obs/batch/categories"]
        cats = f["obs/batch"].create_dataset("categories", data=np.array(["x", "y", "x"], object), dtype=STR)
        cats.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        codes = f["obs/batch/codes"][:]
    want = np.array(["x", "y", "x"], object)[codes]
    with open_dataset(plain) as ds:
        assert ds.obs.column("batch").labels().tolist() == want.tolist()
        found, labels = ds.obs.factorize("batch")
        assert labels == ["x", "y"] and np.array(labels, object)[found].tolist() == want.tolist()
    convert(plain, tmp_path / "o.h5ad")
    assert ad.read_h5ad(tmp_path / "o.h5ad").obs["batch"].astype(str).tolist() == want.tolist()


def test_a_named_datatype_and_references_are_left_out_and_their_neighbours_stay(plain, tmp_path):
    records = np.array([("TP53", 1.5)], [("name", STR), ("score", "f8")])
    with h5py.File(plain, "a") as f:
        group = f["uns"].create_group("t")
        group["named"] = np.dtype("f8")
        group["kept"] = 3.0
        group.create_dataset("refs", data=np.array([f["X"].ref], dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)
        f["uns"].create_dataset("records", data=records).attrs.update(
            {"encoding-type": "rec-array", "encoding-version": "0.2.0"}
        )
    result = convert(plain, tmp_path / "o.h5ad")
    assert any("uns/t/named" in w for w in result.warnings) and any("uns/t/refs" in w for w in result.warnings)
    with h5py.File(tmp_path / "o.h5ad") as f:
        assert f["uns/t/kept"][()] == 3.0 and list(f["uns/t"]) == ["kept"]
        assert f["uns/records"][0]["score"] == 1.5 and f["uns/records"][0]["name"] == b"TP53"


def test_what_cannot_be_written_of_an_anndata_leaves_its_neighbours(tmp_path):
    adata = make_adata(as_layout(make_counts(30, 8, seed=2), "csr"))
    frame = pd.DataFrame({"kept": [1, 2], "gap": pd.to_timedelta([1, 2], "D")}, index=["a", "b"])
    adata.uns["t"] = {"kept": 3.0, "deep": {"odd": {1, 2}, "kept": "x"}, "frame": frame}
    adata.uns["t"]["loop"] = adata.uns["t"]
    result = convert(adata, tmp_path / "o.h5ad")
    back = ad.read_h5ad(tmp_path / "o.h5ad").uns["t"]
    assert back["kept"] == 3.0 and back["deep"] == {"kept": "x"} and list(back["frame"]) == ["kept"]
    for lost in ("t/deep/odd", "gap", "loop"):
        assert any(lost in w for w in result.warnings)


def test_names_of_indexes_and_columns_that_share_them_come_back(tmp_path):
    adata = make_adata(as_layout(make_counts(30, 8, seed=2), "csr"))
    adata.obs.index.name = "barcode"
    adata.obs["barcode"] = adata.obs_names
    adata.var["symbol"] = [f"s{i}" for i in range(8)]
    adata.var.index.name = "gene_ids"
    adata.write_h5ad(tmp_path / "x.h5ad")
    for target in ("a.h5ad", "b.h5ad"):
        convert(tmp_path / "x.h5ad" if target == "a.h5ad" else adata, tmp_path / target)
        back = ad.read_h5ad(tmp_path / target)
        assert back.obs.index.name == "barcode" and back.obs["barcode"].tolist() == adata.obs_names.tolist()
        assert back.var.index.name == "gene_ids" and list(back.var) == ["symbol"]


def test_a_column_called_index_stays_beside_an_index_of_another_name(tmp_path):
    adata = make_adata(as_layout(make_counts(30, 8, seed=2), "csr"))
    adata.obs.index.name = "barcode"
    adata.write_h5ad(tmp_path / "x.h5ad")
    add(tmp_path / "x.h5ad", "obs", "_index", np.array([f"old{i}" for i in range(30)], object), dtype=STR)
    convert(tmp_path / "x.h5ad", tmp_path / "o.h5ad")
    back = ad.read_h5ad(tmp_path / "o.h5ad").obs
    assert back.index[3] == "cell3" and back["_index"].iloc[3] == "old3"


def test_outputs_open_in_anndata_whatever_pandas_held(tmp_path):
    adata = make_adata(as_layout(make_counts(30, 8, seed=2), "csr"))
    adata.obs["float"] = pd.array([1.5, None, *range(28)], "Float64")
    adata.obs["int"] = pd.array([1, None, *range(28)], "Int32")
    adata.obs["when"] = pd.date_range("2020-01-01", periods=30, tz="UTC")
    adata.obs["bytes"] = pd.Series([b"x"] * 30, index=adata.obs_names, dtype=object)
    convert(adata, tmp_path / "o.h5ad")
    back = ad.read_h5ad(tmp_path / "o.h5ad").obs
    assert np.isnan(back["float"].iloc[1]) and back["float"].iloc[0] == 1.5
    assert pd.isna(back["int"].iloc[1]) and back["bytes"].iloc[0] == "x" and "2020" in back["when"].iloc[0]


def test_frames_beside_the_cells_get_the_names_of_the_cells(plain, tmp_path):
    adata = ad.read_h5ad(plain)
    adata.obsm["scores"] = pd.DataFrame({"a": np.arange(60.0)}, index=adata.obs_names)
    adata.write_h5ad(plain)
    with h5py.File(plain, "a") as f:
        names = f["obsm/scores/_index"]  # a group in anndata 0.13
        (names["values"] if isinstance(names, h5py.Group) else names)[:] = np.array([str(i) for i in range(60)], object)
    result = convert(plain, tmp_path / "o.h5ad")
    assert any("obsm/scores" in w and "names" in w for w in result.warnings)
    assert ad.read_h5ad(tmp_path / "o.h5ad").obsm["scores"]["a"].iloc[5] == 5
    sample(plain, tmp_path / "s.h5ad", n=7)
    back = ad.read_h5ad(tmp_path / "s.h5ad")
    assert back.obsm["scores"].index.tolist() == back.obs_names.tolist()


def test_counts_in_half_precision_are_kept(tmp_path):
    path = write_h5ad(tmp_path / "x.h5ad", dtype="float16")
    normalize(path, tmp_path / "o.h5ad", keep_counts=True)
    back = ad.read_h5ad(tmp_path / "o.h5ad").layers["counts"]
    assert back.dtype == np.float32
    with open_dataset(path) as ds:
        assert back.sum() == ds.matrix.read(ds.matrix.plan()[0]).data.sum()
