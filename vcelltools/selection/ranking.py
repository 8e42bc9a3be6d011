"""Rank genes: compute moments from exact counts, break ties, and combine batches like scanpy."""

from __future__ import annotations

import numpy as np

from vcelltools.selection.histograms import Histograms


def get_mean_variance(h: Histograms, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (g,) mean and variance (ddof 1) of batch ``k``, in scanpy's order of operations on exact sums."""
    n = float(h.n_cells_k[k])
    s1, s2 = h.moments(k)
    mean = s1 / n
    variance = s2 / n - mean * mean
    if n != 1:
        variance *= n / (n - 1)
    return mean, variance


def get_least_cells(min_share: float, n_cells: int) -> int:
    """Return the smallest number of cells that is at least ``min_share`` of all cells, so 2.4 becomes 3."""
    from fractions import Fraction  # with decimal, 10 ms that few commands need

    wanted = Fraction(repr(float(min_share))) * n_cells
    return -(-wanted.numerator // wanted.denominator)


def sort_genes(names: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Return positions sorted by ``keys`` ascending (NaN last), ties by gene name, then by position.

    Using the name makes the result independent of the order of genes in the file, of chunks and of threads.
    """
    by_name = np.argsort(names.astype(str), kind="stable")
    name_rank = np.empty(len(names), np.int64)
    name_rank[by_name] = np.arange(len(names))
    if len(names) and len(set(names.tolist())) != len(names):
        sorted_names = names[by_name]
        same = np.r_[False, sorted_names[1:] == sorted_names[:-1]]
        name_rank[by_name] = np.cumsum(~same)
    return np.lexsort((name_rank, *reversed(keys)))


def combine_ranks(
    names: np.ndarray, score_kg: np.ndarray, top: int, flavor: str, tie_kg: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rank genes in each batch by descending score, and combine the batches like scanpy.

    Ranks beyond ``top`` count as missing; the rank of a gene is the median over the batches that have one.
    ``seurat_v3`` sorts by (median rank, number of batches descending), every other flavour by (number of batches
    descending, median rank). Ties are broken by mean score descending, then by name.
    """
    n_batches, g = score_kg.shape
    ranks = np.full((n_batches, g), np.nan, np.float32)
    for k in range(n_batches):
        order = sort_genes(names, -score_kg[k])[:top]
        ranks[k, order] = np.arange(len(order), dtype=np.float32)
    n_in = np.sum(~np.isnan(ranks), axis=0)
    median = np.full(g, np.nan)
    some = n_in > 0
    median[some] = np.nanmedian(ranks[:, some], axis=0)
    score = score_kg.mean(axis=0)
    first, second = (median, -n_in) if flavor == "seurat_v3" else (-n_in, median)
    order = sort_genes(names, first, second, -score)
    columns = {"highly_variable_rank": median, "highly_variable_nbatches": n_in.astype(np.int64)}
    return columns, order[:top]


def order_to_rank(order: np.ndarray, g: int) -> np.ndarray:
    """Return (g,) the position of each gene in ``order``, or NaN for genes that are not in it."""
    out = np.full(g, np.nan)
    out[order] = np.arange(len(order))
    return out
