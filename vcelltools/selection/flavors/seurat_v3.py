"""seurat_v3 and seurat_v3_paper: variance of clipped counts, normalised by a trend over the mean."""

from __future__ import annotations

import numpy as np

from vcelltools.selection.flavors import Task
from vcelltools.selection.histograms import Histograms
from vcelltools.selection.ranking import combine_ranks, get_mean_variance
from vcelltools.selection.trend import fit_trend


def rank(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rank by normalised variance after clipping (Stuart et al., Cell 2019), in scanpy 1.11.5's order of operations."""
    stats, span, notes = task.stats, task.options["span"], task.notes
    h = stats.histograms
    norm_kg = np.zeros((h.n_batches, h.n_genes))
    for k in range(h.n_batches):
        norm_kg[k], reason = _get_normalised_variance(h, k, span)
        if reason:
            where = f"batch {stats.batches[k]!r} ({h.n_cells_k[k]:,} cells): " if stats.batches[k] else ""
            notes.append(f"{where}{reason}; a quadratic trend was used instead of loess")
        if h.n_cells_k[k] < 2:
            notes.append(
                f"batch {stats.batches[k]!r} has only one cell and thus no variance, so its genes are ranked by name"
            )
    columns, order = combine_ranks(stats.genes, norm_kg, task.top, task.flavor)
    columns["variances_norm"] = norm_kg.mean(axis=0)
    return columns, order


def _get_normalised_variance(h: Histograms, k: int, span: float) -> tuple[np.ndarray, str | None]:
    n = float(h.n_cells_k[k])
    if n < 2:
        return np.zeros(h.n_genes), None
    mean, variance = get_mean_variance(h, k)
    varies = variance > 0
    log_variance = np.zeros(h.n_genes)
    log_variance[varies], reason = fit_trend(mean[varies], variance[varies], span=span)
    reg_std = np.sqrt(10**log_variance)
    clip = reg_std * np.sqrt(n) + mean
    s1, s2 = h.clipped_moments(k, clip)
    norm = (1 / ((n - 1) * np.square(reg_std))) * ((n * np.square(mean)) + s2 - 2 * s1 * mean)
    return norm, reason
