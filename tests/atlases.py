"""Atlases for tests: the stand-in buckets where they are, and small ones made on the spot."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tests.conftest import DATA

STANDIN = DATA / "scbasecount_standin"
RELEASE = STANDIN / "bucket" / "arc-institute-virtual-cell-atlas" / "scbasecount" / "2026-01-12"
OLD_RELEASE = STANDIN / "bucket" / "arc-scbasecount" / "2025-02-25"
TAHOE = STANDIN / "bucket" / "arc-institute-virtual-cell-atlas" / "tahoe100M" / "2025-02-25"
needs_standin = pytest.mark.skipif(not STANDIN.is_dir(), reason="the stand-in buckets are not here")


def make_experiment(
    seed: int, n: int, genes: list[str], *, layout: str = "csr", top: int | None = None, dtype: str = "float32"
) -> ad.AnnData:
    """Counts of ``n`` cells with barcodes that other experiments share."""
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.5, 2.0, len(genes)), (n, len(genes))).astype(dtype)
    if top is not None:
        X[0, 0] = top
    obs = pd.DataFrame({"gene_count": (X > 0).sum(1), "umi_count": X.sum(1)}, index=[f"BC{i:04d}" for i in range(n)])
    var = pd.DataFrame({"gene_symbols": [f"S{g[-3:]}" for g in genes]}, index=genes)
    form = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[layout]
    return ad.AnnData(form(X), obs, var)


def make_ids(n: int, start: int = 0) -> list[str]:
    """Ensembl ids."""
    return [f"ENSG{i:011d}" for i in range(start, start + n)]


def write_atlas(
    dpath: Path,
    experiments: dict[str, ad.AnnData],
    *,
    bucket: str = "gs://a-bucket/atlas",
    compression: str | None = None,
) -> Path:
    """Write the layout of scBaseCount under ``dpath``; the table names files of a bucket. Return ``dpath``."""
    folder = dpath / "h5ad" / "GeneFull_Ex50pAS" / "Homo_sapiens"
    folder.mkdir(parents=True)
    meta = dpath / "metadata" / "GeneFull_Ex50pAS" / "Homo_sapiens"
    meta.mkdir(parents=True)
    rows = []
    for i, (name, adata) in enumerate(experiments.items()):
        adata.write_h5ad(folder / f"{name}.h5ad", compression=compression)
        path = f"{bucket}/h5ad/GeneFull_Ex50pAS/Homo_sapiens/{name}.h5ad"
        tissue = ["lung", "blood", None][i % 3]
        rows.append({"srx_accession": name, "file_path": path, "obs_count": adata.n_obs, "tissue": tissue,
                     "tech_10x": "3_prime_gex", "cell_prep": "single_cell", "disease": "unsure",
                     "perturbation": "not applicable", "cell_line": "none"})  # fmt: skip
    pd.DataFrame(rows).to_parquet(meta / "sample_metadata.parquet")
    return dpath


def make_atlas(dpath: Path, n: int = 6, *, cells: int = 20, genes: int = 50) -> Path:
    """Write a small atlas of ``n`` experiments with different gene sets and layouts."""
    out = {}
    for k in range(n):
        ids = make_ids(genes - k % 3)[:: -1 if k % 2 else 1]
        out[f"SRX{k:04d}"] = make_experiment(k, cells + k, ids, layout=("csr", "csc", "dense")[k % 3])
    return write_atlas(dpath, out)
