"""Control cells made into perturbed ones: their mean moves by an effect, their sparsity stays that of cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GROWTH = 1.25  # expressing cells grow at most so much (in log1p); beyond it, further cells begin to express
_LARGEST = float(np.log1p(10_000.0))  # log1p CP10K of a cell with one gene


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlStats:
    """What moving needs to know of a line's control cells, log1p CP10K by gene (m,).

    Attributes
    ----------
    mean_m
        Mean over all cells.
    share_m
        Share of cells that express the gene.
    level_m
        Mean over the cells that express it; one molecule in a median cell where none does.
    """

    mean_m: np.ndarray
    share_m: np.ndarray
    level_m: np.ndarray


def make_stats(total_m: np.ndarray, expressing_m: np.ndarray, n_cells: int, one_molecule: float) -> ControlStats:
    """Return the stats from the sum of the values and the number of expressing cells of each gene."""
    level = np.where(expressing_m > 0, total_m / np.maximum(expressing_m, 1), one_molecule)
    return ControlStats(mean_m=total_m / n_cells, share_m=expressing_m / n_cells, level_m=level)


def move_cells(
    control_bm: np.ndarray, effect_m: np.ndarray, stats: ControlStats, rng: np.random.Generator
) -> np.ndarray:
    """Return control cells moved so that their expected mean changes by ``effect_m``; (b, m), never negative.

    Down: values are scaled by ``(mean + effect) / mean``; no cell begins to express the gene, and the mean is exact.
    Up: values are scaled, by at most a quarter; what is missing comes from cells that did not express the gene and
    begin to, drawn at random, at the level of those that do; and only beyond that from a shift of all cells.
    """
    wanted = np.clip(stats.mean_m + effect_m, 0.0, _LARGEST)
    has = stats.mean_m > 0
    factor = np.where(has, np.minimum(wanted / np.where(has, stats.mean_m, 1.0), _GROWTH), 1.0)
    rest = np.maximum(wanted - factor * stats.mean_m, 0.0)
    rest[rest < 1e-9] = 0.0
    level = np.minimum(stats.level_m * np.maximum(factor, 1.0), _LARGEST)
    silent = 1.0 - stats.share_m
    begin = np.where(silent > 0, np.minimum(rest / np.maximum(level * silent, 1e-12), 1.0), 0.0)
    shift = np.maximum(rest - begin * level * silent, 0.0)
    out = control_bm * factor
    up = np.flatnonzero(begin > 0)
    if len(up):
        block = out[:, up]
        starts = (control_bm[:, up] == 0) & (rng.random(block.shape) < begin[up])
        out[:, up] = np.where(starts, level[up], block)
    return np.minimum(out + shift, _LARGEST)
