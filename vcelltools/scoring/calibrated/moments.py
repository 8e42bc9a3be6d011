"""Means and variances of groups of cells, Welch's test between them, and weights derived from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vcelltools.differential.expression import make_transform
from vcelltools.differential.groupsums import GroupSums, sum_groups
from vcelltools.differential.reduce import check_log1p
from vcelltools.kernels.pvalues import adjust_bh
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import share_work
from vcelltools.scoring.cell_eval.options import Opened


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and sample variance of every gene, with a row for each group.

    Attributes
    ----------
    size_k
        (k,) number of cells.
    mean_kg, var_kg
        (k, g) float64; both are zero for a group without cells, and the variance of one cell is zero.
    """

    size_k: np.ndarray
    mean_kg: np.ndarray
    var_kg: np.ndarray

    def __getitem__(self, rows: np.ndarray | slice) -> Moments:
        """Return some of the groups."""
        return replace(self, size_k=self.size_k[rows], mean_kg=self.mean_kg[rows], var_kg=self.var_kg[rows])


def make_moments(size_k: np.ndarray, sum_kg: np.ndarray, square_kg: np.ndarray) -> Moments:
    """Return the moments of sums and sums of squares."""
    n = np.maximum(size_k, 1)[:, None].astype(np.float64)
    mean = sum_kg / n
    var = np.maximum((square_kg / n - mean * mean) * (n / np.maximum(n - 1, 1)), 0.0)
    return Moments(size_k=size_k, mean_kg=mean, var_kg=var)


def read_sums(
    opened: Opened, codes: np.ndarray, n_groups: int, *, gene_order: np.ndarray | None = None,
    progress: Progress = SILENT, phase: str = "cells",
) -> tuple[GroupSums, list[str]]:  # fmt: skip
    """Stream an open file, and return the sums of its groups and notes on the file."""
    data, scale, o = opened.dataset, opened.scale, opened.options
    transform = make_transform(data.matrix, scale, cp10k=o.to_cp10k)
    sums = sum_groups(
        data, codes, n_groups, transform, squares=True, threads=o.threads, progress=progress, phase=phase
    )  # fmt: skip
    if not o.to_cp10k:
        check_log1p(data.label, scale, sums.max_value)
    notes = list(scale.notes)
    if sums.n_merged:
        notes.append(f"{data.label}: {sums.n_merged:,} duplicate entries were summed")
    return sums if gene_order is None else sums.take(gene_order), notes


@dataclass(frozen=True, kw_only=True)
class Welch:
    """Welch's t-test of each group against a reference; rows are groups, columns genes.

    Attributes
    ----------
    t_pg
        t, or zero if neither group varies.
    padj_pg
        Two-sided p, adjusted within each row by Benjamini and Hochberg.
    """

    t_pg: np.ndarray
    padj_pg: np.ndarray


def compare_means(target: Moments, reference: Moments, *, with_p: bool = True, threads: int = 1) -> Welch:
    """Test each group of ``target`` against the row of ``reference`` at the same position (or its only row).

    The test is that of Welch 1947, with Satterthwaite's degrees of freedom.
    """
    from scipy.special import stdtr

    t_pg = np.empty_like(target.mean_kg)
    padj = np.ones_like(t_pg) if with_p else np.empty((0, 0))

    def compare(i: int) -> None:
        r = i if len(reference.mean_kg) > 1 else 0
        n, m = float(target.size_k[i]), float(reference.size_k[r])
        a, b = target.var_kg[i] / max(n, 1), reference.var_kg[r] / max(m, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (target.mean_kg[i] - reference.mean_kg[r]) / np.sqrt(a + b)
            df = (a + b) ** 2 / (a**2 / max(n - 1, 1) + b**2 / max(m - 1, 1))
        t_pg[i] = np.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0)
        if with_p:
            df = np.where(np.isfinite(df) & (df > 0), df, 1.0)
            padj[i] = adjust_bh(np.minimum(2 * stdtr(df, -np.abs(t_pg[i])), 1.0))

    share_work(range(len(t_pg)), [compare] * threads)
    return Welch(t_pg=t_pg, padj_pg=padj)


def get_weights(t_g: np.ndarray) -> np.ndarray:
    """Return (g,) weights that sum to one: the squares of the min-max scaled abs(t) (Mejia et al. 2025).

    All genes have the same weight if all have the same abs(t).
    """
    size = np.abs(t_g)
    low, high = size.min(), size.max()
    if not high > low:
        return np.full(len(size), 1.0 / len(size))
    w = ((size - low) / (high - low)) ** 2
    return w / w.sum()
