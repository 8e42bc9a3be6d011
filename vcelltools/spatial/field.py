"""Transition vectors: the direction in which a perturbation moves every cell on an embedding."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.frame import write_frame
from vcelltools.io.obsm import read_obsm
from vcelltools.io.stream import get_threads
from vcelltools.io.write.atomic import write_json
from vcelltools.kernels.transition import correlate_steps
from vcelltools.runtime.threads import share_work
from vcelltools.spatial.betadata import CELL

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.spatial._opened import Perturbation

FIELD_OPTIONS = ("n_neighbors", "temperature", "keep_null", "unit_directions")
_GRID = 30  # nodes of the longer side
_LEAST = 0.5  # a node stays empty if the weight of the cells around it is smaller


@dataclass(frozen=True)
class Field:
    """Transition vectors of all cells.

    Attributes
    ----------
    cells
        Names of the cells.
    embedding, vectors
        (n, 2) coordinates and transition vectors.
    """

    cells: np.ndarray
    embedding: np.ndarray
    vectors: np.ndarray

    def to_frame(self) -> pd.DataFrame:
        """Return ``dx, dy`` by cell."""
        import pandas as pd

        return pd.DataFrame(self.vectors, index=[str(c) for c in self.cells], columns=["dx", "dy"])

    def write(self, path: str | os.PathLike, *, force: bool = False) -> Path:
        """Write ``CellID, dx, dy`` as feather, Parquet or CSV."""
        return write_frame(
            path, {CELL: [str(c) for c in self.cells], "dx": self.vectors[:, 0], "dy": self.vectors[:, 1]}, force=force
        )

    def make_grid(self) -> dict[str, Any]:
        """Return ``grid_x, grid_y, u, v``: vectors averaged around the nodes of a grid; None without near cells."""
        low, side = self.embedding.min(0), np.ptp(self.embedding, axis=0)
        step = max(float(side.max()) / (_GRID - 1), 1e-12)
        xs, ys = (low[a] + step * np.arange(int(side[a] / step) + 1) for a in (0, 1))
        u, v = np.full((len(ys), len(xs)), np.nan), np.full((len(ys), len(xs)), np.nan)
        for i, y in enumerate(ys):
            for j, x in enumerate(xs):
                w = np.exp(-0.5 * ((self.embedding - (x, y)) ** 2).sum(1) / step**2)
                if w.sum() >= _LEAST:
                    u[i, j], v[i, j] = w @ self.vectors / w.sum()
        return {"grid_x": xs, "grid_y": ys, "u": u.tolist(), "v": v.tolist()}

    def write_grid(self, path: str | os.PathLike, *, force: bool = False) -> Path:
        """Write :meth:`make_grid` as JSON."""
        return write_json(path, self.make_grid(), force=force)


def make_field(
    p: Perturbation,
    *,
    basis: str,
    n_neighbors: int = 150,
    temperature: float = 0.05,
    keep_null: bool = False,
    unit_directions: bool = False,
    threads: int | None = None,
) -> Field:
    """Return the direction in which a perturbation moves every cell on an embedding.

    The correlations of a cell's change with the differences to its neighbours become transition probabilities, minus
    the probability by chance. They weight the mean of the steps to the neighbours (the scheme of RNA velocity: La Manno
    et al. 2018, doi:10.1038/s41586-018-0414-6).

    Parameters
    ----------
    basis
        Array of obsm, whose first two columns are used.
    n_neighbors
        Number of neighbours on the embedding.
    temperature
        Temperature of the softmax over correlations.
    keep_null
        Do not subtract the uniform probability ``1/k``.
    unit_directions
        Average unit directions instead of steps.
    """
    from scipy.spatial import cKDTree

    tissue = p.run.tissue
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature}; a number above 0 is expected")
    n_stored = tissue.n_cells if tissue.rows is None else int(tissue.rows.max()) + 1
    e = read_obsm(tissue.source, basis, n_stored)
    e = np.ascontiguousarray(e[:, :2] if tissue.rows is None else e[tissue.rows][:, :2])
    if e.shape[1] != 2 or not np.isfinite(e).all():
        raise DataError(f"{tissue.where}: obsm/{basis} is not a finite embedding in two dimensions")
    n = len(e)
    k = min(n_neighbors, n - 1)
    if k < 1:
        raise UsageError(f"n_neighbors is {n_neighbors}; at least 1 is expected")
    _, near = cKDTree(e).query(e, k=k + 1)
    itself = near == np.arange(n)[:, None]
    itself[~itself.any(1), -1] = True  # with cells at the same place, the last one is dropped
    near = near[~itself].reshape(n, k).astype(np.int64)
    r = np.empty((n, k))
    x, delta = np.ascontiguousarray(p.change.before), np.ascontiguousarray(p.delta)
    step = 512
    starts = list(range(0, n, step))
    n_threads = min(get_threads(threads), len(starts))
    share_work(starts, [lambda a: correlate_steps(x, delta, near, a, min(a + step, n), r)] * n_threads)
    z = r / temperature
    z = np.exp(z - z.max(1, keepdims=True))
    prob = z / z.sum(1, keepdims=True)
    if not keep_null:
        prob = np.maximum(prob - 1.0 / k, 0.0)
        total = prob.sum(1, keepdims=True)
        prob = np.divide(prob, total, out=np.zeros_like(prob), where=total > 0)
    steps = e[near] - e[:, None, :]
    if unit_directions:
        length = np.linalg.norm(steps, axis=2, keepdims=True)
        steps = np.divide(steps, length, out=np.zeros_like(steps), where=length > 0)
    return Field(tissue.cells, e, np.einsum("ij,ijk->ik", prob, steps))
