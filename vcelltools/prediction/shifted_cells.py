"""Shift the mean of control cells by an effect, and keep the sparsity of cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GROWTH = 1.25  # maximum factor on expressing cells (in log1p); beyond it, further cells begin to express
_LARGEST = float(np.log1p(10_000.0))  # log1p CP10K of a cell with one gene


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlStats:
    """Statistics of a line's control cells, log1p CP10K by gene (m,).

    Attributes
    ----------
    mean_m
        Mean over all cells.
    share_m
        Share of cells that express the gene.
    level_m
        Mean over the cells that express the gene, or one molecule in a median cell if none does.
    """

    mean_m: np.ndarray
    share_m: np.ndarray
    level_m: np.ndarray


def make_stats(total_m: np.ndarray, expressing_m: np.ndarray, n_cells: int, one_molecule: float) -> ControlStats:
    """Return the statistics, from the sum of the values and the number of expressing cells of each gene."""
    level = np.where(expressing_m > 0, total_m / np.maximum(expressing_m, 1), one_molecule)
    return ControlStats(mean_m=total_m / n_cells, share_m=expressing_m / n_cells, level_m=level)


def move_cells(
    control_bm: np.ndarray, effect_m: np.ndarray, stats: ControlStats, rng: np.random.Generator
) -> np.ndarray:
    """Return control cells (b, m) shifted so that their expected mean changes by ``effect_m``, never below zero.

    For a decrease, values are scaled by ``(mean + effect) / mean``; no further cell expresses the gene, and the mean is
    exact. For an increase, values are scaled up by at most a quarter. If this is not enough, randomly drawn cells
    without the gene begin to express it at the level of the expressing cells, and finally all cells are shifted.
    """
    wanted = np.clip(stats.mean_m + effect_m, 0.0, _LARGEST)
    has = stats.mean_m > 0
    factor = np.where(has, np.minimum(wanted / np.where(has, stats.mean_m, 1.0), _GROWTH), 1.0)
    rest = np.maximum(wanted - factor * stats.mean_m, 0.0)
    rest[rest < 1e-9] = 0.0
    level = np.minimum(stats.level_m * np.maximum(factor, 1.0), _LARGEST)
    silent = 1.0 - stats.share_m
    begin = np.where(silent > 0, np.minimum(rest / np.maximum(level * silent, 1e-12), 1.0), 0.0)
    every = (silent <= 0) | (begin >= 1.0)  # otherwise a rounding error would make every cell express the gene
    shift = np.where(every, np.maximum(rest - begin * level * silent, 0.0), 0.0)
    out = control_bm * factor
    up = np.flatnonzero(begin > 0)
    if len(up):
        block = out[:, up]
        starts = (control_bm[:, up] == 0) & (rng.random(block.shape) < begin[up])
        out[:, up] = np.where(starts, level[up], block)
    return np.minimum(out + shift, _LARGEST)
