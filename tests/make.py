"""Small matrices and files for tests."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse


def make_counts(n: int = 200, g: int = 120, seed: int = 0, *, dispersion: float = 0.5) -> np.ndarray:
    """(n, g) float64 gamma-Poisson counts with log-normal gene means and library sizes."""
    rng = np.random.default_rng(seed)
    mean = np.exp(rng.normal(-1, 1.6, g))
    depth = np.exp(rng.normal(0, 0.35, n))
    shape = 1 / (dispersion * rng.uniform(0.2, 3, g))
    rate = depth[:, None] * mean * rng.gamma(shape, 1 / shape, (n, g))
    return rng.poisson(rate).astype(np.float64)


def get_mudata():
    """mudata, which before 0.4 warns of its next version unless it is told to behave like it."""
    import mudata

    if hasattr(mudata, "set_options"):
        mudata.set_options(pull_on_update=False)
    return mudata


def make_adata(X, *, batches: int = 0, seed: int = 0, names: list[str] | None = None) -> AnnData:
    """An AnnData over ``X`` with gene names g0, g1, ... and, with ``batches``, an obs column ``batch``."""
    n, g = X.shape
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n)])
    if batches:
        codes = np.random.default_rng(seed).integers(0, batches, n)
        obs["batch"] = pd.Categorical([f"b{c}" for c in codes])
    var = pd.DataFrame(index=names or [f"g{j}" for j in range(g)])
    return AnnData(X, obs, var)


def as_layout(X: np.ndarray, layout: str, dtype: str = "float32"):
    """The matrix as ``csr``, ``csc`` or ``dense`` of a dtype."""
    X = X.astype(dtype)
    return {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.ascontiguousarray}[layout](X)
