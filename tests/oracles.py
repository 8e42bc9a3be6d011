"""Slow and obvious versions of what the kernels compute."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def count_histograms(X, batch_n: np.ndarray) -> dict[tuple[int, int, int], int]:
    """(batch, gene, value) -> cells, over the values above zero; duplicates summed; batch -1 left out."""
    dense = np.asarray(sparse.csr_matrix(X).todense() if sparse.issparse(X) else X)
    out: dict[tuple[int, int, int], int] = {}
    for i, row in enumerate(dense):
        for g in np.flatnonzero(row):
            if batch_n[i] >= 0:
                key = (int(batch_n[i]), int(g), int(row[g]))
                out[key] = out.get(key, 0) + 1
    return out


def unpack_histograms(h) -> dict[tuple[int, int, int], int]:
    """The same dictionary out of :class:`vcelltools.selection.histograms.Histograms`."""
    out: dict[tuple[int, int, int], int] = {}
    for k in range(h.n_batches):
        for g in range(h.n_genes):
            bins = h.counts[k, h.offsets[g] : h.offsets[g + 1]]
            assert bins[0] == 0
            for v in np.flatnonzero(bins):
                out[k, g, int(v)] = int(bins[v])
    over = zip(h.over_batch, h.over_gene, h.over_value, h.over_count, strict=True)
    for k, g, v, n in over:
        assert (int(k), int(g), int(v)) not in out
        out[int(k), int(g), int(v)] = int(n)
    return out


def seurat_v3(X: np.ndarray, span: float = 0.3) -> np.ndarray:
    """Normalised variance of one batch, by the text of the definition, on a dense matrix."""
    from skmisc.loess import loess

    X = np.asarray(X, np.float64)
    n = len(X)
    mean, var = X.mean(axis=0), X.var(axis=0, ddof=1)
    varies = var > 0
    log_var = np.zeros(X.shape[1])
    model = loess(np.log10(mean[varies]), np.log10(var[varies]), span=span, degree=2)
    model.fit()
    log_var[varies] = model.outputs.fitted_values
    std = np.sqrt(10**log_var)
    clipped = np.minimum(X, std * np.sqrt(n) + mean)
    return ((clipped - mean) ** 2).sum(axis=0) / ((n - 1) * std**2)


def normalised_moments(X: np.ndarray, *, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (ddof 1) per gene of CP10K values or their log1p."""
    X = np.asarray(X, np.float64)
    total = X.sum(axis=1, keepdims=True)
    Y = X * 10_000 / np.where(total == 0, 1, total)
    Y = np.log1p(Y) if log else Y
    return Y.mean(axis=0), Y.var(axis=0, ddof=1)


def pearson_residual_variance(X: np.ndarray, theta: float = 100.0) -> np.ndarray:
    """Variance per gene of clipped Pearson residuals."""
    X = np.asarray(X, np.float64)
    mu = X.sum(axis=1, keepdims=True) * X.sum(axis=0, keepdims=True) / X.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.where(mu > 0, (X - mu) / np.sqrt(mu + mu**2 / theta), 0.0)
    clip = np.sqrt(len(X))
    return np.clip(r, -clip, clip).var(axis=0)
