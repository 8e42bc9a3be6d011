"""pearson_residuals: variance of clipped residuals of a negative binomial."""

from __future__ import annotations

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.chunks import Chunk
from vcelltools.kernels import moments as m
from vcelltools.runtime.threads import get_threads
from vcelltools.selection.flavors import Task
from vcelltools.selection.flavors._values import open_matrix, sum_fixed
from vcelltools.selection.ranking import combine_ranks


def rank(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rank by the variance of clipped Pearson residuals (Lause, Berens & Kobak 2021), like scanpy.

    As in scanpy's experimental flavour, the clip for every batch is the square root of the number of cells in the
    *first* batch.
    """
    stats, theta = task.stats, task.options["theta"]
    if theta <= 0:
        raise DataError(f"theta is {theta}, but must be above 0")
    h = stats.histograms
    n_batches, g = h.n_batches, h.n_genes
    batch, library = stats.batch_n.astype(np.int64), stats.library_size.astype(np.float64)
    rate = np.zeros((n_batches, g))
    for k in range(n_batches):
        s1, _ = h.moments(k)
        rate[k] = s1 / max(s1.sum(), 1.0)
    clip = np.full(n_batches, np.sqrt(float(h.n_cells_k[0])))
    flat = rate.reshape(-1)
    kernels = m.sparse_residual_moments, m.dense_residual_moments

    def call(chunk: Chunk, sum1: np.ndarray, sum2: np.ndarray) -> None:
        chunk.run(*kernels, batch, library, flat, clip, theta, g, sum1, sum2)

    with open_matrix(task) as dataset:
        s1, s2 = sum_fixed(task, dataset, call, "residuals")
    score = np.zeros((n_batches, g))
    for k in range(n_batches):
        z1, z2 = _sum_zero_residuals(library[batch == k], rate[k], float(clip[k]), theta, get_threads(task.threads))
        n = float(h.n_cells_k[k])
        mean = (s1[k] + z1) / n
        score[k] = np.maximum((s2[k] + z2) / n - mean * mean, 0.0)
    columns, order = combine_ranks(stats.genes, score, task.top, "pearson_residuals")
    columns["residual_variances"] = score.mean(axis=0)
    columns["highly_variable_intersection"] = columns["highly_variable_nbatches"] == n_batches
    return columns, order


def _sum_zero_residuals(
    library: np.ndarray, rate_g: np.ndarray, clip: float, theta: float, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    from concurrent.futures import ThreadPoolExecutor

    size, weight = np.unique(library, return_counts=True)
    out = np.zeros((2, len(rate_g)))
    cuts = np.linspace(0, len(rate_g), 4 * threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        list(
            pool.map(
                lambda ab: m.zero_residual_moments(
                    size, weight.astype(np.float64), rate_g, clip, theta, ab[0], ab[1], out[0], out[1]
                ),
                zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True),
            )
        )
    return out[0], out[1]
