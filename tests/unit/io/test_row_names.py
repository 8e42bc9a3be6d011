"""Which array of obs and var holds the names: the attribute says so; a writer that sets none means the usual one."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from tests.files import write_h5ad
from tests.unit.io.test_readers import write_zarr
from vcelltools.errors import DataError
from vcelltools.io import open_dataset

TABLES = ["obs", "var"]


def edit(path, table, change):
    with h5py.File(path, "a") as f:
        change(f[table])
    return path


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("empty", ["", b"", np.bytes_(b"")])
def test_an_empty_attribute_is_refused_and_the_remedy_named(tmp_path, table, empty):
    path = edit(write_h5ad(tmp_path / "f.h5ad"), table, lambda t: t.attrs.__setitem__("_index", empty))
    with pytest.raises(DataError) as e, open_dataset(path) as ds:
        _ = ds.obs.index, ds.var.index
    assert f"f.h5ad: {table}: the attribute _index, which names the array of row names, is empty" in str(e.value)
    assert f"set the attribute _index of {table} to '_index'" in str(e.value)


@pytest.mark.parametrize("table", TABLES)
def test_an_attribute_that_names_no_array_is_refused(tmp_path, table):
    path = edit(write_h5ad(tmp_path / "f.h5ad"), table, lambda t: t.attrs.__setitem__("_index", "barcode"))
    with pytest.raises(DataError) as e, open_dataset(path) as ds:
        _ = ds.obs.index, ds.var.index
    assert f"{table}/barcode is missing" in str(e.value)
    assert f"set the attribute _index of {table} to '_index'" in str(e.value)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ["_index", "index"])
def test_without_the_attribute_the_usual_array_names_the_rows(tmp_path, table, name):
    def change(t):
        del t.attrs["_index"]
        t.move("_index", name)

    with open_dataset(write_h5ad(tmp_path / "a.h5ad")) as ds:
        before = getattr(ds, table).index
    with open_dataset(edit(write_h5ad(tmp_path / "f.h5ad"), table, change)) as ds:
        assert np.array_equal(getattr(ds, table).index, before)
        assert name not in getattr(ds, table).columns


@pytest.mark.parametrize("table", TABLES)
def test_zarr_is_read_by_the_same_rule(tmp_path, table):
    zarr = pytest.importorskip("zarr")
    path = write_zarr(tmp_path / "f.zarr", "csr", 3)
    zarr.open_group(path)[table].attrs["_index"] = ""
    with (
        pytest.raises(DataError, match="the attribute _index, which names the array of row names, is empty"),
        open_dataset(path) as ds,
    ):
        _ = ds.obs.index, ds.var.index
