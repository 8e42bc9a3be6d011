"""What rounding must not decide: sums of float64 are rounded once, and float32 differences are taken in float64."""

from __future__ import annotations

import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import vcelltools as vc
from vcelltools.differential.ranks import GeneBuckets
from vcelltools.kernels.distance import effect_distances
from vcelltools.kernels.groupmoments import sparse_group_moments


def test_float64_means_are_rounded_once():
    value = np.array([0.1, 2.302585092994046, 0.7, 3.3])
    sizes = np.array([9, 13, 7, 101])
    codes = np.repeat(np.arange(4, dtype=np.int32), sizes)
    buckets = GeneBuckets(n_genes=4, n_groups=4, capacity=4 * len(codes), dtype="float64", n_blocks=1)
    buckets.count_cells(codes)
    buckets.add_dense(0, 0, np.tile(value, (len(codes), 1)), codes)
    sum_kg = buckets.rank_sum(0, test=False).sum_kg
    assert sum_kg.tolist() == [[math.fsum([v] * n) for v in value] for n in sizes]


def test_energy_distances_that_differ_by_float32_rounding_have_no_correlation():
    """Every perturbed cell is one profile, but for the last bit that dividing by the library leaves."""
    rng = np.random.default_rng(0)
    same = np.tile([3.0, 1.0, 0.0], (12, 1)) * rng.integers(1, 40, (12, 1))
    counts = np.concatenate([rng.poisson(4.0, (20, 3)) + 1, same]).astype(np.float32)
    obs = pd.DataFrame({"target_gene": ["non-targeting"] * 20 + ["A"] * 4 + ["B"] * 3 + ["C"] * 5})
    obs.index = [f"c{i}" for i in range(len(counts))]
    real = ad.AnnData(sparse.csr_matrix(counts), obs, pd.DataFrame(index=list("xyz")))
    pred = ad.AnnData(
        sparse.csr_matrix(np.roll(counts, 1, axis=1)[::-1] + 1), obs[::-1], pd.DataFrame(index=list("xyz"))
    )
    frame = vc.score(pred, real, profile="anndata", compat="cell-eval", skip=("clustering_agreement",)).to_frame()
    assert frame["pearson_edistance"].isna().all()


def test_float32_effects_are_subtracted_in_float64():
    a = np.array([[1.0, 1e-4]], np.float32)
    b = np.array([[1e-8, -1.0]], np.float32)
    l1, squared = np.empty((1, 1)), np.empty((1, 1))
    effect_distances(a, b, np.array([-1]), 0, 1, l1, squared)
    d = np.abs(a.astype(np.float64) - b.astype(np.float64))
    assert l1[0, 0] == d[0].sum()
    assert squared[0, 0] == (d[0] ** 2).sum()


def test_large_float32_counts_have_exact_squares():
    counts = np.array([4097.0, 100_003.0], np.float32)
    out = [np.zeros((1, 2)) for _ in range(3)]
    codes, library = np.zeros(1, np.int32), np.array([104_100.0])
    sparse_group_moments(np.array([0, 2]), np.array([0, 1]), counts, True, 0, codes, library, *out)
    assert out[1].tolist() == [[4097.0**2, 100_003.0**2]]
    assert out[2].tolist() == [[4097.0 * 104_100, 100_003.0 * 104_100]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_means_of_fold_changes_are_added_up_as_the_peers_do(dtype, layout):
    """A sparse matrix adds shares, a dense one values, cell by cell; the sign of a tiny fold change hangs on it."""
    values = np.array([0.1, 0.3, 0.7, 1.1, 2.3, 0.01], dtype)
    counts = {"non-targeting": 9, "A": 7, "B": 13, "C": 3}
    labels = [k for k, n in counts.items() for _ in range(n)]
    data = ad.AnnData(
        layout(np.tile(values, (len(labels), 1))),
        obs=pd.DataFrame({"target_gene": labels}, index=[f"c{i}" for i in range(len(labels))]),
        var=pd.DataFrame(index=list("uvwxyz")),
    )
    got = vc.score(data, data, profile="de", compat="cell-eval").pair.real_de.log2fc_pg

    def get_mean(value: np.floating, n: int) -> np.floating:
        total = dtype(0)
        for _ in range(n):
            total += value if layout is np.asarray else value * (dtype(1) / dtype(n))
        return np.expm1(total / dtype(n) if layout is np.asarray else total)

    want = [[np.log2(np.float64(get_mean(v, counts[k])) / np.float64(get_mean(v, 9))) for v in values] for k in "ABC"]
    assert np.array_equal(np.sign(got), np.sign(want))
    assert np.allclose(got, want, rtol=0, atol=1e-6 if dtype is np.float32 else 1e-15)
    assert np.any(got != 0)
