"""The negative binomial test of every group's counts against those expected from the controls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcelltools.io import Dataset
from vcelltools.io.chunks import Chunk
from vcelltools.io.faults import raise_fault
from vcelltools.io.matrix import Span
from vcelltools.io.remote import Part, choose_groups, get_place
from vcelltools.io.stream import run_spans
from vcelltools.kernels.groupmoments import dense_group_moments, sparse_group_moments
from vcelltools.runtime.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class CountMoments:
    """Sums over the cells of each group; sizes are total counts.

    Attributes
    ----------
    sum_kg, square_kg, cross_kg
        Σy, Σy² and Σ(y · size).
    size_k, size2_k, n_k
        Σ size, Σ size², and the number of cells.
    """

    sum_kg: np.ndarray
    square_kg: np.ndarray
    cross_kg: np.ndarray
    size_k: np.ndarray
    size2_k: np.ndarray
    n_k: np.ndarray


def get_moments(
    dataset: Dataset,
    codes: np.ndarray,
    n_groups: int,
    library_n: np.ndarray,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> CountMoments:
    """Stream the matrix once and sum the moments; ``codes`` are the groups of the cells (-1: left out)."""
    matrix = dataset.matrix
    if dataset.remote is not None:
        total = np.zeros((3, n_groups, dataset.n_genes))
        task = codes, n_groups, library_n
        for part, (some, found) in dataset.remote.run(matrix, _add_part, task, "counting", progress):
            total[(slice(None), *get_place(matrix, some, part))] += found  # whole numbers, so the order does not matter
    else:
        progress.start("counting", matrix.stored_bytes, "bytes")
        total = _add_spans(dataset, matrix.plan(), codes, n_groups, library_n, threads, progress)
        progress.finish()
    used = codes >= 0
    return CountMoments(
        sum_kg=total[0],
        square_kg=total[1],
        cross_kg=total[2],
        size_k=np.bincount(codes[used], library_n[used], n_groups),
        size2_k=np.bincount(codes[used], library_n[used] ** 2, n_groups),
        n_k=np.bincount(codes[used], minlength=n_groups),
    )


def _add_part(dataset: Dataset, part: Part, task: tuple[np.ndarray, int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups that occur in a part of the matrix, and their sums over it (on a worker)."""
    matrix, (codes, n_groups, library_n) = dataset.matrix, task
    some, place = choose_groups(codes if matrix.by_gene else codes[slice(*part)], n_groups)
    spans = matrix.plan(start=part[0], stop=part[1])
    total = _add_spans(dataset, spans, place[codes], len(some), library_n, 1, SILENT)
    return some, total[:, :, slice(*part)].copy() if matrix.by_gene else total


def _add_spans(
    dataset: Dataset,
    spans: list[Span],
    codes: np.ndarray,
    n_groups: int,
    library_n: np.ndarray,
    threads: int | None,
    progress: Progress,
) -> np.ndarray:
    """Return (3, k, g) sums of the counts, their squares, and their products with the sizes of the cells."""
    matrix = dataset.matrix
    shape = (n_groups, matrix.shape[1])

    def visit(state: tuple[np.ndarray, ...], chunk: Chunk, _: object) -> None:
        fault, at = chunk.run(sparse_group_moments, dense_group_moments, codes, library_n, *state)
        if fault:
            raise_fault(fault, chunk, at, dataset)

    states = run_spans(
        matrix, spans, lambda: tuple(np.zeros(shape) for _ in range(3)), visit, threads=threads, progress=progress
    )  # fmt: skip
    return np.array([np.sum([s[i] for s in states], axis=0) for i in range(3)])


def pool_samples(m: CountMoments, group_s: np.ndarray, n_groups: int) -> CountMoments:
    """Return the moments of groups whose units are samples (sums of cells), from the sums of the samples."""
    y, s, some = m.sum_kg, m.size_k, m.size_k > 0

    def add(values: np.ndarray) -> np.ndarray:
        out = np.zeros((n_groups, *values.shape[1:]), values.dtype)
        np.add.at(out, group_s[some], values[some])
        return out

    return CountMoments(
        sum_kg=add(y),
        square_kg=add(y**2),
        cross_kg=add(y * s[:, None]),
        size_k=add(s),
        size2_k=add(s**2),
        n_k=add(np.ones(len(s), np.int64)),
    )


def estimate_dispersion(m: CountMoments) -> np.ndarray:
    """Return (g,) dispersions of the negative binomial by the method of moments, pooled over groups.

    Each group has its own rate μ. E Σ(y − sμ)² = Σ(sμ + α s²μ²), with a factor n/(n − 1) for the estimated rate.
    Negative estimates are set to zero (Poisson).
    """
    some = (m.n_k > 1) & (m.size_k > 0)
    size, size2, n = (v[some].astype(np.float64)[:, None] for v in (m.size_k, m.size2_k, m.n_k))
    rate = m.sum_kg[some] / size
    squares = m.square_kg[some] - 2 * rate * m.cross_kg[some] + rate**2 * size2
    over = (squares * n / (n - 1) - rate * size).sum(axis=0)
    scale = (rate**2 * size2).sum(axis=0)
    return np.maximum(np.divide(over, scale, out=np.zeros_like(over), where=scale > 0), 0.0)


def compare_counts(m: CountMoments, control: int, *, rest: bool = False) -> dict[str, np.ndarray]:
    """Test each group's total count against that expected from the controls (``rest``: the other perturbed groups).

    For y ~ NB(s·μ, dispersion α), where s is the size of the cell, and a total Y₀ of the controls over sizes S₀, a
    group of sizes S has the expected total m = S·(Y₀ + ½)/S₀ and the variance

        v = m + α μ² Σs² + S² (μ/S₀ + α μ² Σs₀²/S₀²),   where μ is the rate of both together.

    The first two terms are the noise of the group, and the last is that of the controls. The two-sided mid-p comes from
    a negative binomial of this mean and variance. It respects discreteness and skewness of few counts, and equals a
    z-test for many. α comes from :func:`estimate_dispersion`. The half count is Jeffreys' prior, for genes without
    counts in the controls.
    """
    from scipy.special import betainc

    alpha = estimate_dispersion(m)
    size, size2 = m.size_k[:, None], m.size2_k[:, None]
    if rest:
        used = np.arange(len(m.size_k)) != control
        y0 = m.sum_kg[used].sum(axis=0) - m.sum_kg
        s0, q0 = (np.maximum(v[used].sum() - v, 0)[:, None] for v in (m.size_k, m.size2_k))
    else:
        y0, s0, q0 = m.sum_kg[control], float(m.size_k[control]), float(m.size2_k[control])
    mean = size * (y0 + 0.5) / s0
    both = size + s0
    rate = (m.sum_kg + y0 + 0.5) / np.maximum(both, 1)
    var = mean + alpha * rate**2 * size2 + size**2 * (rate / s0 + alpha * rate**2 * q0 / s0**2)
    y = m.sum_kg
    with np.errstate(divide="ignore", invalid="ignore"):
        shape = mean**2 / (var - mean)
        chance = mean / var
        below = np.where(y > 0, betainc(shape, np.maximum(y, 1), chance), 0.0)  # P(Y < y)
        upto = betainc(shape, y + 1, chance)  # P(Y <= y)
        above = np.where(y > 0, betainc(np.maximum(y, 1), shape, 1 - chance), 1.0)  # P(Y >= y)
        beyond = betainc(y + 1, shape, 1 - chance)  # P(Y > y)
        p = np.minimum(1.0, (np.minimum(below + upto, above + beyond)))  # twice the mean of the strict and wide tails
        z = (y - mean) / np.sqrt(var)
    nothing = (y + y0 == 0) | (size == 0)
    p, z = np.where(nothing, 1.0, p), np.where(nothing, 0.0, z)
    p[control], z[control] = np.nan, np.nan
    return {"p_kg": p, "statistic_kg": z, "dispersion_g": alpha}
