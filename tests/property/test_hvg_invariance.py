"""Nothing but the counts decides: not chunks, threads, cell order, gene order, layout, dtype or file splits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.make import as_layout, make_adata, make_counts
from vcelltools.io import open_dataset
from vcelltools.selection.hvg import compute_hvg
from vcelltools.selection.statistics import load_statistics, merge, save_statistics, scan

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(X, *, batches=0, names=None, obs_order=None, flavor="seurat_v3", **options):
    adata = make_adata(X, batches=batches, names=names)
    if obs_order is not None:
        adata = adata[obs_order].copy()
    return compute_hvg(adata, top=20, flavor=flavor, batch_key="batch" if batches else None, **options)


@QUICK
@given(
    seed=st.integers(0, 50),
    max_values=st.integers(1, 5_000),
    threads=st.integers(1, 3),
    layout=st.sampled_from(["csr", "csc", "dense"]),
    dtype=st.sampled_from(["float32", "float64", "int32", "int64", "uint16"]),
    batches=st.sampled_from([0, 2, 5]),
)
def test_chunks_threads_layout_and_dtype_change_nothing(seed, max_values, threads, layout, dtype, batches):
    X = make_counts(90, 70, seed=seed)
    plain = run(as_layout(X, "csr"), batches=batches, threads=1)
    other = run(as_layout(X, layout, dtype), batches=batches, threads=threads, max_values=max_values)
    assert plain.selected == other.selected
    for name, values in plain.columns.items():
        np.testing.assert_array_equal(values, other.columns[name], err_msg=name)


@QUICK
@given(seed=st.integers(0, 50), batches=st.sampled_from([0, 3]), shuffle=st.randoms(use_true_random=False))
def test_cell_order_changes_nothing(seed, batches, shuffle):
    X = make_counts(80, 60, seed=seed)
    order = list(range(80))
    shuffle.shuffle(order)
    plain = run(as_layout(X, "csr"), batches=batches)
    other = run(as_layout(X, "csr"), batches=batches, obs_order=order)
    assert plain.selected == other.selected
    np.testing.assert_array_equal(plain.columns["variances_norm"], other.columns["variances_norm"])


@QUICK
@given(seed=st.integers(0, 50), batches=st.sampled_from([0, 3]), shuffle=st.randoms(use_true_random=False))
def test_gene_order_changes_no_list(seed, batches, shuffle):
    X = make_counts(80, 60, seed=seed)
    X[:, 7] = X[:, 3]  # exact ties
    order = list(range(60))
    shuffle.shuffle(order)
    plain = run(as_layout(X, "csr"), batches=batches)
    other = run(as_layout(X[:, order], "csr"), batches=batches, names=[f"g{j}" for j in order])
    assert plain.selected == other.selected


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "pearson_residuals", "vcell_lowess", "dispersion"])
def test_the_other_flavors_do_not_depend_on_chunks_threads_or_layout(flavor):
    X = make_counts(120, 80, seed=9)
    results = [
        run(as_layout(X, layout), batches=2, flavor=flavor, threads=threads, max_values=size)
        for layout, threads, size in [("csr", 1, None), ("csr", 2, 97), ("csc", 2, 211), ("dense", 2, 500)]
    ]
    for other in results[1:]:
        assert results[0].selected == other.selected
        for name, values in results[0].columns.items():
            np.testing.assert_array_equal(values, other.columns[name], err_msg=name)


@QUICK
@given(cut=st.integers(1, 89), seed=st.integers(0, 20))
def test_row_ranges_merge_to_the_whole(cut, seed, tmp_path_factory):
    X = as_layout(make_counts(90, 40, seed=seed), "csr")
    adata = make_adata(X, batches=2)
    with open_dataset(adata) as ds:
        whole = scan(ds, batch_key=None)
    parts = []
    for rows in (slice(0, cut), slice(cut, 90)):
        with open_dataset(adata[rows].copy()) as ds:
            parts.append(scan(ds))
    both = merge(parts)
    for k in range(2):
        np.testing.assert_array_equal(whole.histograms.moments(0)[k], both.histograms.moments(0)[k])
    np.testing.assert_array_equal(whole.library_size, both.library_size)
    folder = tmp_path_factory.mktemp("stats") / "s"
    save_statistics(both, folder)
    again = load_statistics(folder)
    np.testing.assert_array_equal(again.histograms.counts, both.histograms.counts)
    np.testing.assert_array_equal(again.library_size, both.library_size)
