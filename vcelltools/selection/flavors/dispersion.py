"""dispersion: variance / mean of the counts."""

from __future__ import annotations

import numpy as np

from vcelltools.selection.flavors import Task
from vcelltools.selection.ranking import combine_ranks, get_least_cells, get_mean_variance


def rank(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rank by variance / mean of the counts (ddof 1) among genes expressed in at least ``min_share`` of the cells."""
    mean, variance, min_share = task.mean, task.variance, task.options["min_share"]
    h = task.stats.histograms
    score = np.full((h.n_batches, h.n_genes), -np.inf)
    for k in range(h.n_batches):
        m, v = get_mean_variance(h, k)
        ok = (h.expressing(k) >= get_least_cells(min_share, int(h.n_cells_k[k]))) & (m > 0)
        score[k, ok] = v[ok] / m[ok]
    eligible = np.isfinite(score).any(axis=0)
    if int(eligible.sum()) < task.top:
        task.notes.append(
            f"{int(eligible.sum()):,} genes are expressed in at least {min_share:.2%} of the cells; all of them were "
            "selected"
        )
    dispersions = np.divide(variance, mean, out=np.zeros_like(mean), where=mean > 0)
    columns, order = combine_ranks(task.stats.genes, score, task.top, "dispersion")
    return columns | {"dispersions": dispersions}, order[eligible[order]]
