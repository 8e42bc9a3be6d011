"""Blocks of a tissue to hold out: cells near a held-out block are excluded from training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

N_BLOCKS = 6


@dataclass(frozen=True)
class Fold:
    """Held-out rows and training rows."""

    test: np.ndarray
    train: np.ndarray


def cut_blocks(xy: np.ndarray, n_blocks: int = N_BLOCKS) -> np.ndarray:
    """Return (n,) the block of every cell, by recursive bisection along the longer side into equal shares.

    The result does not depend on the order of the cells, because the other coordinates break ties.
    """
    out = np.zeros(len(xy), np.int64)
    todo = [(np.arange(len(xy)), 0, n_blocks)]
    while todo:
        rows, first, k = todo.pop()
        if k == 1 or len(rows) < 2:
            out[rows] = first
            continue
        part = xy[rows]
        axis = int(np.argmax(np.ptp(part, axis=0)))
        keys = [part[:, a] for a in range(xy.shape[1]) if a != axis] + [part[:, axis]]
        order = rows[np.lexsort(keys)]
        left = k // 2
        cut = round(len(rows) * left / k)
        todo += [(order[:cut], first, left), (order[cut:], first + left, k - left)]
    return out


def make_folds(xy: np.ndarray, radius: float, n_blocks: int = N_BLOCKS) -> list[Fold]:
    """Return a fold per block. Training excludes cells within ``radius`` of it, but at most half of the others."""
    from scipy.spatial import cKDTree

    block = cut_blocks(xy, n_blocks)
    folds = []
    for b in range(n_blocks):
        test = np.flatnonzero(block == b)
        rest = np.flatnonzero(block != b)
        if not len(test) or not len(rest):
            continue
        distance, _ = cKDTree(xy[test]).query(xy[rest])
        near = np.flatnonzero(distance <= radius)
        most = len(rest) // 2
        if len(near) > most:
            near = near[np.argsort(distance[near], kind="stable")[:most]]
        folds.append(Fold(test, np.delete(rest, near)))
    return folds


def make_joint_folds(xy: np.ndarray, groups: np.ndarray, radius: float, n_blocks: int = N_BLOCKS) -> list[Fold]:
    """Return folds for a model that all groups share; every group has its own blocks, as in :func:`make_folds`.

    Training excludes the cells within ``radius`` of a held-out cell of any group, but at most half of the others of
    each group.
    """
    from scipy.spatial import cKDTree

    block = np.full(len(xy), -1, np.int64)
    for g in np.unique(groups):
        rows = np.flatnonzero(groups == g)
        block[rows] = cut_blocks(xy[rows], n_blocks)
    folds = []
    for b in range(n_blocks):
        test = np.flatnonzero(block == b)
        if not len(test) or len(test) == len(xy):
            continue
        distance, _ = cKDTree(xy[test]).query(xy)
        drop = block == b
        for g in np.unique(groups):
            rest = np.flatnonzero((groups == g) & (block != b))
            near = rest[distance[rest] <= radius]
            near = near[np.argsort(distance[near], kind="stable")[: len(rest) // 2]]
            drop[near] = True
        folds.append(Fold(test, np.flatnonzero(~drop)))
    return folds
