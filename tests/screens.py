"""Small perturbation screens for the tests of stores, written in any layout, and what a store of them must hold."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

CONTROL = "non-targeting"


def make_screen(
    n: int = 400, g: int = 60, *, perts: int = 5, batches: int = 3, lines: int = 2, seed: int = 0, deep: bool = False
) -> ad.AnnData:
    """Return an AnnData of counts; ``deep`` puts counts above 255 and above 65,535 in."""
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.6, 2.0, g), (n, g))
    X[n // 2] = 0
    if deep:
        for value in (254, 255, 256, 65_534, 65_535, 65_536, 2_000_000_000):
            X[rng.integers(0, n, 3), rng.integers(0, g, 3)] = value
    names = np.array([CONTROL] * 2 + [f"P{i}" for i in range(perts)])
    obs = pd.DataFrame(
        {
            "target": pd.Categorical(names[rng.integers(0, len(names), n)]),
            "batch": pd.Categorical([f"b{i}" for i in rng.integers(0, batches, n)]),
            "line": [f"L{i}" for i in rng.integers(0, lines, n)],
            "score": rng.normal(size=n),
            "ok": rng.random(n) < 0.9,
            "dose": pd.Categorical(rng.choice(["low", "high"], n), categories=["low", "high"], ordered=True),
        },
        index=[f"CELL{i:05d}" for i in rng.permutation(n)],
    )
    var = pd.DataFrame({"gene_ids": [f"ENSG{i:011d}.{i % 7}" for i in range(g)]}, index=[f"GENE{i}" for i in range(g)])
    return ad.AnnData(X=sparse.csr_matrix(X.astype(np.int64)), obs=obs, var=var)


def write(adata: ad.AnnData, path: Path, layout: str = "csr", dtype: str = "float32", **options) -> Path:
    """Write an h5ad whose X is ``csr``, ``csc``, ``dense`` or ``dense-columns`` (chunked by column)."""
    out = adata.copy()
    X = adata.X.astype(dtype)
    out.X = {"csr": X.tocsr, "csc": X.tocsc}.get(layout, X.toarray)()
    out.write_h5ad(path, **options)
    if layout == "dense-columns":
        with h5py.File(path, "r+") as f:
            attrs = dict(f["X"].attrs)
            del f["X"]
            d = f.create_dataset("X", data=X.toarray(), chunks=(adata.n_obs, 4), compression="gzip")
            d.attrs.update(attrs)
    return path


def normalise(counts: np.ndarray, libsize: np.ndarray, target: float = 1e4, dtype=np.float32) -> np.ndarray:
    """CP10K+log1p in the order of scanpy's operations, rounded to float16; the oracle ``store_rows``."""
    size = libsize.astype(dtype) / dtype(target)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = counts.astype(dtype) / size[:, None]
    return np.log1p(np.nan_to_num(q).astype(np.float64)).astype(dtype).astype(np.float16)


BUILD = {"pert_col": "target", "control": CONTROL, "group_by": ["batch"], "cell_line_col": "line"}
