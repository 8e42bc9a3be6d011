"""Stochastic rounding of fractional counts, up or down at random, so that the expected value does not change.

The direction depends only on the seed, the cell and the gene, not on the layout of the file or on threads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vcelltools.io.chunks import DenseChunk
from vcelltools.io.matrix import Matrix


class _Rounded:
    """Rounds what a matrix reads; mixed into the class of the matrix."""

    seed: int
    found: np.ndarray

    @property
    def rounded(self) -> bool:
        """Whether a value that was read, by this matrix or by a copy of it, was no whole number."""
        return bool(self.found[0])

    def read(self, *args: Any, **kwargs: Any) -> Any:
        """Return the chunk with whole values."""
        return _round_chunk(super().read(*args, **kwargs), self.seed, self.found)  # type: ignore[misc]

    def read_block(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block with whole values."""
        return _round_chunk(super().read_block(*args, **kwargs), self.seed, self.found)  # type: ignore[misc]

    def read_values(self, *args: Any, **kwargs: Any) -> Any:
        """Return values without their positions, rounded down, because the direction depends on the position."""
        return np.floor(super().read_values(*args, **kwargs))  # type: ignore[misc]


def round_matrix(matrix: Matrix, seed: int = 0) -> Matrix:
    """Return a matrix like ``matrix`` with values rounded to whole numbers."""
    if matrix.dtype.kind != "f":
        return matrix
    kind = type("Rounded", (_Rounded, type(matrix)), {"__doc__": _Rounded.__doc__})
    out: Any = object.__new__(kind)
    out.__dict__.update(matrix.__dict__, seed=seed, found=np.zeros(1, bool))
    return out


def _round_chunk(chunk: Any, seed: int, found: np.ndarray) -> Any:
    if isinstance(chunk, DenseChunk):
        cells, genes = np.ogrid[chunk.cells, chunk.genes]
        return replace(chunk, block=_round(chunk.block, seed, cells, genes, found))
    cells, genes, values = chunk.get_entries()
    return replace(chunk, data=_round(values, seed, cells, genes, found))


def _round(values: np.ndarray, seed: int, cells: np.ndarray, genes: np.ndarray, found: np.ndarray) -> np.ndarray:
    low = np.floor(values)
    part = values - low
    up = part > 0
    if not up.any():
        return low
    found[0] = True
    return low + (up & (_draw(seed, cells, genes) < part))


def _draw(seed: int, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Return a number in [0, 1) for each cell and gene (SplitMix64; Steele, Lea & Flood, OOPSLA 2014)."""
    x = cells.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + genes.astype(np.uint64)
    x = x + np.uint64(seed * 0xD1342543DE82EF95 % (1 << 64))
    for _ in range(2):  # mix twice, because neighbours differ in few bits
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
