"""seurat and cell_ranger: dispersion of normalised values relative to genes with a similar mean."""

from __future__ import annotations

import numpy as np

from vcelltools.selection.flavors import Task
from vcelltools.selection.flavors._values import get_normalised_mean_variance
from vcelltools.selection.ranking import order_to_rank, sort_genes


def _get_normalised_dispersion(
    mean_g: np.ndarray, var_g: np.ndarray, flavor: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (means, dispersions, dispersions_norm) of one batch, normalised by genes with a similar mean.

    seurat (Satija et al. 2015): 20 bins of equal width of log1p mean; mean and standard deviation of the log
    dispersion in the bin. cell_ranger (Zheng et al. 2017): bins at the percentiles 10, 15 .. 100 of the mean;
    median and scaled median absolute deviation.
    """
    import pandas as pd
    from scipy.stats import norm

    mean = np.where(mean_g == 0, 1e-12, mean_g)
    dispersion = var_g / mean
    if flavor == "seurat":
        with np.errstate(divide="ignore"):
            dispersion = np.where(dispersion == 0, np.nan, np.log(dispersion))
        mean = np.log1p(mean)
        bins = pd.cut(mean, bins=20, labels=False)
    else:
        edges = np.r_[-np.inf, np.percentile(mean, np.arange(10, 105, 5)), np.inf]
        bins = pd.cut(mean, bins=edges, labels=False, duplicates="drop")
    grouped = pd.Series(dispersion).groupby(np.asarray(bins))
    if flavor == "seurat":
        centre, spread = grouped.transform("mean").to_numpy(), grouped.transform("std").to_numpy()
        alone = np.isnan(spread)
        spread = np.where(alone, centre, spread)
        centre = np.where(alone, 0.0, centre)
    else:
        centre = grouped.transform("median").to_numpy()
        away = pd.Series(np.abs(dispersion - centre)).groupby(np.asarray(bins))
        spread = away.transform("median").to_numpy() / norm.ppf(0.75)
    with np.errstate(divide="ignore", invalid="ignore"):
        normalised = (dispersion - centre) / spread
    return mean, dispersion, normalised


def rank(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Select by normalised dispersion, or with batches by (number of batches, mean normalised dispersion)."""
    stats, flavor, top = task.stats, task.flavor, task.top
    mean_kg, var_kg = get_normalised_mean_variance(task, log=flavor == "cell_ranger")
    n_batches, g = mean_kg.shape
    if n_batches == 1:
        mean, dispersion, score = _get_normalised_dispersion(mean_kg[0], var_kg[0], flavor)
        order = sort_genes(stats.genes, -np.where(np.isnan(score), -np.inf, score))[:top]
        usable = int(np.count_nonzero(~np.isnan(score)))
        if usable < top:
            task.notes.append(f"only {usable:,} genes have a normalised dispersion, so fewer genes were selected")
            order = order[~np.isnan(score[order])]
        columns = {"means": mean, "dispersions": dispersion, "dispersions_norm": score}
        return columns | {"highly_variable_rank": order_to_rank(order, g)}, order
    total = np.zeros((3, n_batches, g))
    n_in = np.zeros(g, np.int64)
    for k in range(n_batches):
        there = stats.histograms.expressing(k) > 0
        if not there.any():  # as in scanpy, a gene without counts has dispersion 0 in its batch
            task.notes.append(f"batch {stats.batches[k]!r} has no counts")
            continue
        mean, dispersion, score = _get_normalised_dispersion(mean_kg[k, there], var_kg[k, there], flavor)
        total[:, k, there] = mean, dispersion, score
        chosen = np.flatnonzero(there)[sort_genes(stats.genes[there], -np.where(np.isnan(score), -np.inf, score))[:top]]
        n_in[chosen] += ~np.isnan(total[2, k, chosen])
    count = np.maximum(np.sum(~np.isnan(total), axis=1), 1)
    mean, dispersion, score = np.where(np.isnan(total).all(axis=1), np.nan, np.nansum(total, axis=1) / count)
    order = sort_genes(stats.genes, -n_in, -np.where(np.isnan(score), -np.inf, score))[:top]
    columns = {
        "means": mean,
        "dispersions": dispersion,
        "dispersions_norm": score,
        "highly_variable_rank": order_to_rank(order, g),
        "highly_variable_nbatches": n_in,
        "highly_variable_intersection": n_in == n_batches,
    }
    return columns, order
