"""The flavours that look at normalised values or residuals: one more pass, with library sizes known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vcelltools.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.errors import DataError
from vcelltools.io.dataset import Dataset
from vcelltools.kernels import moments as m
from vcelltools.pipelines.hvg import combine_ranks, sort_genes
from vcelltools.pipelines.statistics import Statistics
from vcelltools.progress import Progress
from vcelltools.stream import get_threads, run_spans

TARGET_SUM = 10_000.0
LOWESS_FRACTION = 0.3
LOWESS_ITERATIONS = 3


def rank(
    dataset: Dataset,
    stats: Statistics,
    flavor: str,
    top: int,
    *,
    theta: float,
    threads: int | None,
    progress: Progress,
    notes: list[str],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return (columns, positions of the selected genes best first) of one of the flavours that need values."""
    if stats.n_duplicates:
        raise DataError(
            f"{dataset.label}: {stats.n_duplicates:,} entries repeat a cell and gene; {flavor} needs them summed",
            hint="vcelltools convert writes the file in canonical form",
        )
    if stats.n_cells > m.MAX_CELLS:
        raise DataError(f"{dataset.label}: flavor {flavor} takes at most {m.MAX_CELLS:,} cells")
    if flavor == "pearson_residuals":
        return _rank_pearson(dataset, stats, top, theta, threads=threads, progress=progress)
    mean_kg, var_kg = _get_normalised_mean_variance(
        dataset, stats, log=flavor == "cell_ranger", threads=threads, progress=progress
    )
    if flavor == "vcell_lowess":
        return _rank_lowess(stats, var_kg, top)
    return _rank_binned(stats, flavor, mean_kg, var_kg, top, notes)


def _sum_fixed(
    dataset: Dataset,
    stats: Statistics,
    call: Callable[[object, np.ndarray, np.ndarray], None],
    phase: str,
    threads: int | None,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Run a fixed-point kernel over the matrix; return both sums as (k, g) float64."""
    k, g = len(stats.batches), stats.n_genes
    spans = dataset.matrix.plan()
    progress.start(phase, sum(s.n_bytes for s in spans), "bytes")
    states = run_spans(
        dataset.matrix,
        spans,
        lambda: (np.zeros((k * g, 2), np.int64), np.zeros((k * g, 2), np.int64)),
        lambda sums, chunk, span: call(chunk, *sums),
        threads=threads,
        progress=progress,
    )
    progress.finish()
    out = []
    for i in range(2):
        total = states[0][i]
        for other in states[1:]:
            total += other[i]
        out.append((total[:, 0] + total[:, 1] / m.FRACTION).reshape(k, g))
    return out[0], out[1]


def _visit(
    kernels: tuple[Callable, Callable, Callable], chunk: object, batch: np.ndarray, library: np.ndarray, tail: tuple
) -> None:
    """Call the kernel for the chunk's layout (CSR, CSC, dense) with its cells' batches and library sizes."""
    if isinstance(chunk, CsrChunk):
        rows = slice(chunk.start, chunk.start + chunk.n_rows)
        kernels[0](chunk.indptr, chunk.indices, chunk.data, batch[rows], library[rows], *tail)
    elif isinstance(chunk, CscChunk):
        kernels[1](chunk.indptr, chunk.indices, chunk.data, chunk.start, batch, library, *tail)
    elif isinstance(chunk, DenseChunk):
        rows = slice(chunk.row_start, chunk.row_start + len(chunk.block))
        kernels[2](chunk.block, chunk.col_start, batch[rows], library[rows], *tail)


def _get_normalised_mean_variance(
    dataset: Dataset, stats: Statistics, *, log: bool, threads: int | None, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """(k, g) mean and variance (ddof 1) of CP10K values, or of their log1p."""
    batch, library, g = stats.batch_n.astype(np.int64), stats.library_size, stats.n_genes
    kernels = m.csr_normalised_moments, m.csc_normalised_moments, m.dense_normalised_moments

    def call(chunk: object, sum1: np.ndarray, sum2: np.ndarray) -> None:
        _visit(kernels, chunk, batch, library, (TARGET_SUM, log, g, sum1, sum2))

    s1, s2 = _sum_fixed(dataset, stats, call, "normalised moments", threads, progress)
    n = stats.histograms.n_cells_k.astype(np.float64)[:, None]
    mean = s1 / n
    var = np.maximum(s2 / n - mean * mean, 0.0) * (n / np.maximum(n - 1, 1))
    return mean, var


def _get_normalised_dispersion(
    mean_g: np.ndarray, var_g: np.ndarray, flavor: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(means, dispersions, dispersions_norm) of one batch: dispersion against the genes of a similar mean.

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


def _rank_binned(
    stats: Statistics, flavor: str, mean_kg: np.ndarray, var_kg: np.ndarray, top: int, notes: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Select by normalised dispersion; with batches by (number of batches, mean normalised dispersion)."""
    n_batches, g = mean_kg.shape
    if n_batches == 1:
        mean, dispersion, score = _get_normalised_dispersion(mean_kg[0], var_kg[0], flavor)
        order = sort_genes(stats.genes, -np.where(np.isnan(score), -np.inf, score))[:top]
        usable = int(np.count_nonzero(~np.isnan(score)))
        if usable < top:
            notes.append(f"only {usable:,} genes have a normalised dispersion; the rest were not selected")
            order = order[~np.isnan(score[order])]
        columns = {"means": mean, "dispersions": dispersion, "dispersions_norm": score}
        return columns | {"highly_variable_rank": _order_to_rank(order, g)}, order
    total = np.zeros((3, n_batches, g))
    n_in = np.zeros(g, np.int64)
    for k in range(n_batches):
        there = stats.histograms.expressing(k) > 0
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
        "highly_variable_rank": _order_to_rank(order, g),
        "highly_variable_nbatches": n_in,
        "highly_variable_intersection": n_in == n_batches,
    }
    return columns, order


def _order_to_rank(order: np.ndarray, g: int) -> np.ndarray:
    out = np.full(g, np.nan)
    out[order] = np.arange(len(order))
    return out


def _rank_lowess(stats: Statistics, var_kg: np.ndarray, top: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Residual of log10 CP10K variance from its lowess on log10 raw mean (no clipping), per batch."""
    from statsmodels.nonparametric.smoothers_lowess import lowess

    n_batches, g = var_kg.shape
    score = np.full((n_batches, g), -np.inf)
    for k in range(n_batches):
        s1, _ = stats.histograms.moments(k)
        varies = (var_kg[k] > 0) & (s1 > 0)
        if varies.sum() < 3:
            continue
        x = np.log10(s1[varies] / stats.histograms.n_cells_k[k])
        y = np.log10(var_kg[k, varies])
        fitted = lowess(y, x, frac=LOWESS_FRACTION, it=LOWESS_ITERATIONS, return_sorted=False)
        score[k, varies] = y - fitted
    columns, order = combine_ranks(stats.genes, score, top, "vcell_lowess")
    columns["variances_norm"] = np.where(np.isfinite(score).all(axis=0), score.mean(axis=0), np.nan)
    return columns, order


def _rank_pearson(
    dataset: Dataset, stats: Statistics, top: int, theta: float, *, threads: int | None, progress: Progress
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Variance of clipped Pearson residuals (Lause, Berens & Kobak 2021), as scanpy's experimental flavour.

    As there, the clip is the square root of the number of cells of the *first* batch for every batch.
    """
    if theta <= 0:
        raise DataError(f"theta is {theta}; it must be above 0")
    h = stats.histograms
    n_batches, g = h.n_batches, h.n_genes
    batch, library = stats.batch_n.astype(np.int64), stats.library_size.astype(np.float64)
    rate = np.zeros((n_batches, g))
    for k in range(n_batches):
        s1, _ = h.moments(k)
        rate[k] = s1 / max(s1.sum(), 1.0)
    clip = np.full(n_batches, np.sqrt(float(h.n_cells_k[0])))
    flat = rate.reshape(-1)
    kernels = m.csr_residual_moments, m.csc_residual_moments, m.dense_residual_moments

    def call(chunk: object, sum1: np.ndarray, sum2: np.ndarray) -> None:
        _visit(kernels, chunk, batch, library, (flat, clip, theta, g, sum1, sum2))

    s1, s2 = _sum_fixed(dataset, stats, call, "residuals", threads, progress)
    score = np.zeros((n_batches, g))
    for k in range(n_batches):
        z1, z2 = _sum_zero_residuals(library[batch == k], rate[k], float(clip[k]), theta, get_threads(threads))
        n = float(h.n_cells_k[k])
        mean = (s1[k] + z1) / n
        score[k] = np.maximum((s2[k] + z2) / n - mean * mean, 0.0)
    columns, order = combine_ranks(stats.genes, score, top, "pearson_residuals")
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
