"""The counting kernels against a dictionary, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from tests.make import as_layout, make_adata, make_counts
from tests.oracles import count_histograms, unpack_histograms
from vcelltools.errors import DataError, NotCountsError
from vcelltools.io import open_dataset
from vcelltools.selection import count_pass
from vcelltools.selection.statistics import scan


def scan_matrix(X, *, batches: int = 0, **options):
    adata = make_adata(X, batches=batches)
    with open_dataset(adata) as ds:
        stats = scan(ds, batch_key="batch" if batches else None, **options)
    return adata, stats


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint8"])
@pytest.mark.parametrize("batches", [0, 3])
def test_histograms_equal_the_dictionary(layout, dtype, batches):
    X = make_counts(60, 25, seed=1)
    if dtype != "uint8":
        X[3, 4], X[5, 4], X[7, 9] = 70_000, 5_000, 4_096  # beyond every gene's bins
    adata, stats = scan_matrix(as_layout(X, layout, dtype), batches=batches, threads=2, max_values=200)
    codes = adata.obs["batch"].cat.codes.to_numpy() if batches else np.zeros(60, int)
    assert unpack_histograms(stats.histograms) == count_histograms(X, codes)
    np.testing.assert_array_equal(stats.library_size, X.sum(axis=1))
    np.testing.assert_array_equal(stats.genes_per_cell, (X > 0).sum(axis=1))


def test_hand_checked():
    X = sparse.csr_matrix(np.array([[0, 1, 3], [2, 1, 0], [0, 1, 3]], np.float32))
    _, stats = scan_matrix(X)
    h = stats.histograms
    assert unpack_histograms(h) == {(0, 0, 2): 1, (0, 1, 1): 3, (0, 2, 3): 2}
    s1, s2 = h.moments(0)
    assert s1.tolist() == [2, 3, 6] and s2.tolist() == [4, 3, 18]
    c1, c2 = h.clipped_moments(0, np.array([1.5, 5.0, 2.5]))
    assert c1.tolist() == [1.5, 3, 5] and c2.tolist() == [2.25, 3, 12.5]
    assert h.expressing(0).tolist() == [1, 3, 2]


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_unsorted_and_duplicate_entries_are_summed_and_explicit_zeros_ignored(layout):
    n, g = 5, 4
    rows = np.array([0, 0, 0, 1, 2, 2, 3, 3])
    cols = np.array([2, 0, 2, 1, 3, 3, 1, 0])
    vals = np.array([1.0, 4, 2, 0, 4_000, 200, 5, 0], np.float32)
    dense = np.zeros((n, g))
    np.add.at(dense, (rows, cols), vals)
    major = rows if layout == "csr" else cols
    order = np.argsort(major, kind="stable")
    indptr = np.searchsorted(major[order], np.arange((n if layout == "csr" else g) + 1))
    minor = (cols if layout == "csr" else rows)[order]
    cls = sparse.csr_matrix if layout == "csr" else sparse.csc_matrix
    X = cls((vals[order], minor, indptr), shape=(n, g))
    assert not X.has_canonical_format
    _, stats = scan_matrix(X)
    assert unpack_histograms(stats.histograms) == count_histograms(dense, np.zeros(n, int))
    assert stats.n_duplicates == 2
    assert any("summed" in w for w in stats.warnings)
    np.testing.assert_array_equal(stats.genes_per_cell, (dense > 0).sum(axis=1))


def test_many_large_values_drain_the_overflow_list(monkeypatch):
    monkeypatch.setattr(count_pass, "_OVERFLOW_ROOM", 64)
    monkeypatch.setattr(count_pass, "_COMPRESS_ABOVE", 500)
    rng = np.random.default_rng(0)
    X = rng.integers(0, 60, (300, 30)).astype(np.float64)
    X[::2] *= 7_001
    for layout in ("csr", "csc", "dense"):
        _, stats = scan_matrix(as_layout(X, layout, "int32"), threads=2, max_values=400)
        assert unpack_histograms(stats.histograms) == count_histograms(X, np.zeros(300, int))
        s1, s2 = stats.histograms.moments(0)
        np.testing.assert_array_equal(s2, (X**2).sum(axis=0))
        np.testing.assert_array_equal(s1, X.sum(axis=0))


def test_more_batches_than_fit_take_more_passes(monkeypatch):
    X = as_layout(make_counts(80, 30, seed=3), "csr")
    _, one = scan_matrix(X, batches=6, threads=1)
    monkeypatch.setattr(count_pass, "HISTOGRAM_BUDGET", 4 * 30 * 40)
    _, many = scan_matrix(X, batches=6, threads=1)
    assert one.passes == 1 and many.passes > 1
    assert unpack_histograms(one.histograms) == unpack_histograms(many.histograms)


def test_squares_beyond_63_bits_are_exact():
    X = np.zeros((4, 2))
    X[:, 0] = 2_147_483_647
    X[0, 1] = 1
    _, stats = scan_matrix(as_layout(X, "csr", "int64"))
    _, s2 = stats.histograms.moments(0)
    assert s2[0] == float(4 * 2_147_483_647**2)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (1.5, NotCountsError, "not a whole number"),
        (-1.0, DataError, "negative"),
        (np.nan, DataError, "finite"),
        (np.inf, DataError, "finite"),
        (3e30, DataError, "not supported"),
    ],
)
def test_bad_values_name_cell_and_gene(layout, value, error, words):
    X = make_counts(40, 12, seed=2)
    X[17, 5] = value
    with pytest.raises(error) as e:
        scan_matrix(as_layout(X, layout, "float64"), threads=1)
    text = str(e.value)
    assert words in text and "cell17" in text and "g5" in text


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("bad", [-5, 99, 2_000_000_000])
@pytest.mark.parametrize("position", ["first", "last"])
def test_indices_out_of_range_are_refused(layout, bad, position):
    X = as_layout(make_counts(30, 20, seed=4), layout)
    at = X.indptr[3] if position == "first" else X.indptr[4] - 1
    X.indices[at] = bad
    with pytest.raises(DataError, match=f"{bad:,}"):
        scan_matrix(X)


def test_each_kernel_compiles_once_a_file():
    from vcelltools.kernels import histogram

    X = as_layout(make_counts(50, 20, seed=5), "csr", "float32")
    scan_matrix(X, max_values=100)
    before = len(histogram.csr_histogram.signatures)
    for chunk in (10, 1000):
        scan_matrix(X, max_values=chunk, threads=2, batches=2)
    X2 = X.copy()
    X2.data.flags.writeable = False  # a read-only input must not cost a compilation
    scan_matrix(X2)
    assert len(histogram.csr_histogram.signatures) == before


def test_missing_batch_labels_are_refused():
    import pandas as pd

    adata = make_adata(as_layout(make_counts(10, 8), "csr"))
    adata.obs["batch"] = pd.Categorical(["a"] * 9 + [None])
    with open_dataset(adata) as ds, pytest.raises(DataError, match="empty for 1 cells"):
        scan(ds, batch_key="batch")
    with open_dataset(adata) as ds, pytest.raises(DataError, match="no column 'lot'"):
        scan(ds, batch_key="lot")


def test_an_empty_matrix_is_refused():
    with pytest.raises(DataError, match="no cells"):
        open_dataset(AnnData(sparse.csr_matrix((0, 5), dtype=np.float32)))
