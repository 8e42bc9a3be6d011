"""Kernels, warm and in one process, against scanpy, fast-array-utils and vcell's row algorithm (pytest-benchmark).

    python -m pytest benchmarks/bench_kernels.py --benchmark-json FILE

Every case asserts equality before it is timed. ``make bench`` runs this and folds the ratios into
``benchmarks/results/kernels.json``.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from vcelltools.io import open_dataset
from vcelltools.selection.statistics import scan

pytestmark = pytest.mark.filterwarnings("ignore")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import scanpy as sc
    from fast_array_utils import stats as fau

N_CELLS, N_GENES = 8_000, 12_000


@pytest.fixture(scope="module")
def counts():
    """8,000 × 12,000 simulated counts, about 7 % non-zero."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.h5ad"
        vc.simulate(path, cells=N_CELLS, genes=N_GENES, perturbations=20, density=0.07)
        return ad.read_h5ad(path).X


def make_anndata(X) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(X.shape[0])])
    return ad.AnnData(X, obs, pd.DataFrame(index=[f"g{j}" for j in range(X.shape[1])]))


def ours_moments(adata):
    with open_dataset(adata) as ds:
        return scan(ds)


@pytest.mark.benchmark(group="mean and variance, CSR")
class TestMeanVariance:
    def test_ours(self, benchmark, counts):
        adata = make_anndata(counts)
        stats = benchmark(ours_moments, adata)
        s1, _ = stats.histograms.moments(0)
        np.testing.assert_array_equal(s1, np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel())

    def test_fast_array_utils(self, benchmark, counts):
        mean, _ = benchmark(fau.mean_var, counts, axis=0, correction=1)
        sums = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
        np.testing.assert_allclose(mean, sums / counts.shape[0], rtol=1e-12)

    def test_vcell_rows(self, benchmark, counts):
        """vcell's row algorithm re-expressed: dense blocks of 2,048 cells, moments of counts and of CP10K."""

        def run():
            g = counts.shape[1]
            raw, raw2, norm, norm2, seen = (np.zeros(g) for _ in range(5))
            for a in range(0, counts.shape[0], 2048):
                block = counts[a : a + 2048].toarray()
                weighted = block * (10_000 / np.maximum(block.sum(axis=1, keepdims=True), 1))
                raw += block.sum(axis=0)
                raw2 += (block * block).sum(axis=0)
                norm += weighted.sum(axis=0)
                norm2 += (weighted * weighted).sum(axis=0)
                seen += (block > 0).sum(axis=0)
            return raw

        raw = benchmark.pedantic(run, rounds=3, iterations=1)
        np.testing.assert_array_equal(raw, np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel())


@pytest.mark.benchmark(group="seurat_v3, in memory")
@pytest.mark.parametrize("layout", ["csr", "csc"])
class TestSeuratV3:
    def test_ours(self, benchmark, counts, layout):
        adata = make_anndata(counts if layout == "csr" else counts.tocsc())
        ours = benchmark(vc.hvg, adata, top=2000)
        ref = sc.pp.highly_variable_genes(adata, n_top_genes=2000, flavor="seurat_v3", inplace=False)
        np.testing.assert_allclose(ours["variances_norm"], ref["variances_norm"], rtol=1e-12)

    def test_scanpy(self, benchmark, counts, layout):
        adata = make_anndata(counts if layout == "csr" else counts.tocsc())
        run = lambda: sc.pp.highly_variable_genes(adata, n_top_genes=2000, flavor="seurat_v3", inplace=False)  # noqa: E731
        benchmark.pedantic(run, rounds=3, iterations=1, warmup_rounds=1)


@pytest.mark.benchmark(group="CP10K and log1p, CSR")
class TestNormalise:
    def test_ours(self, benchmark, counts):
        from vcelltools.kernels.normalize import csr_normalise, make_scale

        X = counts.copy()
        library = np.asarray(X.sum(axis=1, dtype=np.float64)).ravel()
        scale = make_scale(library, 10_000.0)
        out = np.empty(X.nnz, np.float32)
        indptr = X.indptr.astype(np.int64)
        half = X.shape[0] // 2  # two threads, as the pipelines run it

        def part(rows):
            a, b = indptr[rows[0]], indptr[rows[1]]
            here = indptr[rows[0] : rows[1] + 1] - a
            sizes = scale[rows[0] : rows[1]]
            return csr_normalise(here, X.indices[a:b], X.data[a:b], sizes, True, 1.0, X.shape[1], out[a:b])

        def run():
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(part, [(0, half), (half, X.shape[0])]))

        benchmark(run)
        ref = make_anndata(counts.astype(np.float32))
        sc.pp.normalize_total(ref, target_sum=1e4)
        sc.pp.log1p(ref)
        np.testing.assert_allclose(out, ref.X.data, rtol=1e-6, atol=1e-6)

    def test_scanpy(self, benchmark, counts):
        def setup():
            return (make_anndata(counts.astype(np.float32)),), {}

        def run(adata):
            sc.pp.normalize_total(adata, target_sum=1e4)
            sc.pp.log1p(adata)

        benchmark.pedantic(run, setup=setup, rounds=3, iterations=1, warmup_rounds=1)
