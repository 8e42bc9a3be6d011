"""vcell_lowess: residual of the log variance of normalised values from its lowess trend over the mean."""

from __future__ import annotations

import numpy as np

from vcelltools.selection.flavors import Task
from vcelltools.selection.flavors._values import get_normalised_mean_variance
from vcelltools.selection.ranking import combine_ranks

LOWESS_FRACTION = 0.3
LOWESS_ITERATIONS = 3


def rank(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rank by the residual of log10 CP10K variance from its lowess on log10 raw mean, without clipping, per batch."""
    from statsmodels.nonparametric.smoothers_lowess import lowess

    stats = task.stats
    _, var_kg = get_normalised_mean_variance(task, log=False)
    n_batches, g = var_kg.shape
    score = np.full((n_batches, g), -np.inf)
    for k in range(n_batches):
        s1, _ = stats.histograms.moments(k)
        varies = (var_kg[k] > 0) & (s1 > 0)
        if varies.sum() < 3:
            continue
        x = np.log10(s1[varies] / stats.histograms.n_cells_k[k])
        y = np.log10(var_kg[k, varies])
        with np.errstate(invalid="ignore", divide="ignore"):  # for neighbourhoods whose means are all equal
            fitted = lowess(y, x, frac=LOWESS_FRACTION, it=LOWESS_ITERATIONS, return_sorted=False)
        score[k, varies] = y - fitted
    columns, order = combine_ranks(stats.genes, score, task.top, "vcell_lowess")
    columns["variances_norm"] = np.where(np.isfinite(score).all(axis=0), score.mean(axis=0), np.nan)
    return columns, order
