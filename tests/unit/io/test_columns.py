"""Some genes of a matrix: the same values, at about the cost of those genes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.files import make_counts, read_all, write_h5ad
from vcelltools.errors import DataError
from vcelltools.io import get_count_evidence, open_dataset, read_columns, select_columns

COUNTS = make_counts(50, 64)
LAYOUTS = {
    "csr": {"layout": "csr"},
    "csc": {"layout": "csc"},
    "csc-gzip": {"layout": "csc", "compression": "gzip", "chunks": (64,)},
    "dense": {"layout": "dense"},
    "dense-by-columns": {"layout": "dense", "chunks": (50, 4)},
    "dense-by-rows": {"layout": "dense", "chunks": (4, 64)},
    "dense-tiles-gzip": {"layout": "dense", "chunks": (16, 8), "compression": "gzip"},
}
CHOICES = {"one": [7], "run": [10, 11, 12, 13], "scattered": [3, 30, 4, 63, 0, 9], "all": list(range(64))}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("max_values", [1, 100, 1 << 20])
def test_a_selection_is_the_matrix_with_those_columns(tmp_path, name, choice, max_values):
    columns = np.array(CHOICES[choice])
    with open_dataset(write_h5ad(tmp_path / "f.h5ad", COUNTS, **LAYOUTS[name])) as ds:
        chosen = select_columns(ds.matrix, columns)
        assert chosen.layout == ds.matrix.layout
        np.testing.assert_array_equal(read_all(chosen, max_values=max_values), COUNTS[:, columns])
        np.testing.assert_array_equal(read_columns(ds.matrix, columns), COUNTS[:, columns])
        np.testing.assert_array_equal(read_all(ds.matrix), COUNTS)  # the whole is not touched
        assert get_count_evidence(chosen).is_counts


@pytest.mark.parametrize("bad", [[64], [-1], [1, 1], []])
def test_wrong_columns_are_refused(tmp_path, bad):
    with open_dataset(write_h5ad(tmp_path / "f.h5ad", COUNTS)) as ds, pytest.raises(DataError):
        select_columns(ds.matrix, np.array(bad, dtype=int))


def get_bytes_read() -> int:
    try:
        with open("/proc/self/io", encoding="ascii") as f:
            return int(f.readline().split()[1])
    except OSError:
        pytest.skip("this system does not count the bytes that a process reads")


@pytest.mark.parametrize(
    ("options", "slack"),
    [
        ({"layout": "csc"}, 1.01),
        ({"layout": "csc", "chunks": (4096,)}, 1.01),
        ({"layout": "csc", "chunks": (4096,), "compression": "gzip"}, 1.6),
        ({"layout": "dense", "chunks": (2000, 1)}, 1.01),
        ({"layout": "dense", "chunks": (500, 10), "compression": "gzip"}, 1.6),
    ],
    ids=["csc", "csc-chunked", "csc-gzip", "dense-columns", "dense-tiles-gzip"],
)
def test_k_genes_cost_about_k_genes_bytes(tmp_path, options, slack):
    counts = make_counts(2000, 200, density=0.4)
    columns = np.arange(40, 60)
    with open_dataset(write_h5ad(tmp_path / "f.h5ad", counts, dtype="int32", **options)) as ds:
        before = get_bytes_read()
        block = read_columns(ds.matrix, columns)
        read = get_bytes_read() - before
        stored = ds.matrix.stored_bytes
    np.testing.assert_array_equal(block, counts[:, columns])
    assert 0 < read <= stored * len(columns) / 200 * slack + 4096  # reading the counter costs bytes too


def test_a_damaged_index_is_refused_with_its_position(tmp_path):
    import h5py

    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout="csr")
    with h5py.File(path, "a") as f:
        f["X/indices"][5] = 64
    with open_dataset(path) as ds, pytest.raises(DataError, match="holds 64 at position 5"):
        read_columns(ds.matrix, np.array([0]))
    path = write_h5ad(tmp_path / "g.h5ad", COUNTS, layout="csc")
    with h5py.File(path, "a") as f:
        f["X/indices"][0] = -3
    with open_dataset(path) as ds, pytest.raises(DataError, match="-3"):
        read_columns(ds.matrix, np.array([0]))
