"""Energy distances of every perturbation to the controls, by blocked matrix products in bounded memory.

E = 2·mean d(x, c) − mean d(x, x') − mean d(c, c'), with d Euclidean (not squared) and self-pairs included
(Székely & Rizzo 2013). |x − y|² = |x|² + |y|² − 2x·y, of cells less their common mean. Cost cells × controls × genes.
Large data is multiplied in float32, twice as fast; a block in which a pair is so close that the subtraction would
leave little is done again in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vcelltools.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.io import CsrMatrix, Dataset, DenseMatrix
from vcelltools.kernels.distance import csr_fill_rows, sum_distances
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.sides import Cells, Scale, make_transform
from vcelltools.stream import run_spans

if TYPE_CHECKING:
    from vcelltools.scoring.evaluate import Opened

BLOCK_BYTES = 128 << 20
SINGLE_FROM = 1e11
"""Multiplications (cells × controls × genes) from which on they are done in float32."""
NEAR = 0.02


class Rows:
    """The transformed cells of a matrix, to be had in dense float64 blocks of any rows."""

    def __init__(self, dataset: Dataset, scale: Scale, *, raw: bool, cp10k: bool, threads: int | None) -> None:
        matrix = dataset.matrix
        self.n_genes = matrix.shape[1]
        transform = make_transform(matrix, scale, raw=raw and scale.kind == "counts", cp10k=cp10k)
        self._dense: np.ndarray | None = None
        if isinstance(matrix, DenseMatrix):
            kind = np.float32 if matrix.chunk_dtype == np.float32 else np.float64
            dense = self._dense = np.empty(matrix.shape, kind)

            def place(_: None, chunk: object, span: object) -> None:
                assert isinstance(chunk, DenseChunk)
                b, w = chunk.block.shape
                r, c = chunk.row_start, chunk.col_start
                dense[r : r + b, c : c + w] = transform(chunk).reshape(b, w)
        else:
            kind = np.float32 if matrix.chunk_dtype in (np.float32, np.int32, np.int64) and not raw else np.float64
            self._indices = np.empty(matrix.nnz, np.int32)
            self._data = np.empty(matrix.nnz, kind)

            def place(_: None, chunk: object, span: object) -> None:
                assert isinstance(chunk, CsrChunk | CscChunk)
                at = int(matrix.indptr[chunk.start])
                self._indices[at : at + len(chunk.indices)] = chunk.indices
                self._data[at : at + len(chunk.data)] = transform(chunk)

        run_spans(matrix, matrix.plan(), lambda: None, place, threads=threads)
        if isinstance(matrix, CsrMatrix):
            self._indptr = matrix.indptr
        elif not isinstance(matrix, DenseMatrix):
            from scipy import sparse

            csr = sparse.csc_array((self._data, self._indices, matrix.indptr), shape=matrix.shape).tocsr()
            self._indptr, self._indices, self._data = csr.indptr, csr.indices, csr.data

    def reorder(self, order: np.ndarray) -> None:
        """Bring the genes into the order of ``order``, their positions so far."""
        if self._dense is not None:
            self._dense = self._dense[:, order]
        else:
            place = np.empty(self.n_genes, np.int32)
            place[order] = np.arange(self.n_genes, dtype=np.int32)
            self._indices = place[self._indices]

    def centre(self) -> np.ndarray:
        """Return (g,) the mean over all cells."""
        if self._dense is not None:
            return self._dense.mean(axis=0, dtype=np.float64)
        return np.bincount(self._indices, self._data, self.n_genes) / max(len(self._indptr) - 1, 1)

    def take(
        self, rows: np.ndarray, centre_g: np.ndarray | None = None, dtype: type[np.floating] = np.float64
    ) -> np.ndarray:
        """Return the rows, less ``centre_g``, as a dense (len(rows), g) block; duplicate entries are summed."""
        centre = np.zeros(self.n_genes) if centre_g is None else centre_g
        if self._dense is not None:
            return (self._dense[rows] - centre).astype(dtype)
        out = np.empty((len(rows), self.n_genes), dtype)
        csr_fill_rows(self._indptr, self._indices, self._data, np.ascontiguousarray(rows, np.int64), centre, out)
        return out


def _block_rows(n_genes: int, itemsize: int) -> int:
    return max(64, min(2048, BLOCK_BYTES // (itemsize * max(n_genes, 1))))


class _Blocks:
    """Some cells of a matrix, a block at a time, with their squared lengths."""

    def __init__(self, cells: Rows, rows: np.ndarray, centre_g: np.ndarray, size: int, dtype: type) -> None:
        self._cells, self._centre, self._dtype = cells, centre_g, dtype
        self.parts = [rows[i : i + size] for i in range(0, len(rows), size)]

    def get(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the (b, g) block and its (b,) squared lengths."""
        a = self._cells.take(self.parts[i], self._centre, self._dtype)
        return a, np.einsum("ij,ij->i", a, a, dtype=np.float64)


def _distance_sums(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], same: bool = False
) -> np.ndarray:
    """Return (rows of a,) the sum of distances to every row of b."""
    out = np.empty(len(a[0]))
    single = a[0].dtype == np.float32
    close = sum_distances(a[0] @ b[0].T, a[1], b[1], same, NEAR if single else 0.0, out)
    if close and single:
        wide = [x[0].astype(np.float64) for x in (a, b)]
        squares = [np.einsum("ij,ij->i", x, x) for x in wide]
        sum_distances(wide[0] @ wide[1].T, *squares, same, 0.0, out)
    return out


def _within(blocks: _Blocks) -> float:
    """Return the sum of distances of all ordered pairs."""
    total = 0.0
    for i in range(len(blocks.parts)):
        b = blocks.get(i)
        total += float(_distance_sums(b, b, True).sum())
        for j in range(i + 1, len(blocks.parts)):
            total += 2 * float(_distance_sums(blocks.get(j), b).sum())
    return total


def energy_distances(
    dataset: Dataset,
    cells: Cells,
    scale: Scale,
    control: str,
    *,
    raw: bool = False,
    cp10k: bool = False,
    threads: int | None = None,
    control_from: Opened | None = None,
    gene_order: np.ndarray | None = None,
    progress: Progress = SILENT,
) -> np.ndarray:
    """Return (p,) energy distances, perturbations sorted as text.

    Parameters
    ----------
    control_from
        Another file whose controls are to be used.
    gene_order
        Where that file's genes stand in this one, or None for the same order.
    """
    x = Rows(dataset, scale, raw=raw, cp10k=cp10k, threads=threads)
    if gene_order is not None:
        x.reorder(gene_order)
    c, c_codes, c_labels = x, cells.codes, cells.labels
    if control_from is not None:
        o = control_from
        c = Rows(o.dataset, o.scale, raw=raw, cp10k=cp10k, threads=threads)
        c_codes, c_labels = o.cells.codes, o.cells.labels
    controls = np.flatnonzero(c_codes == c_labels.index(control))
    groups = [np.flatnonzero(cells.codes == i) for i, v in enumerate(cells.labels) if v != control]
    every = np.concatenate(groups) if groups else np.zeros(0, np.int64)
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    large = float(len(every) + len(controls)) * len(controls) * x.n_genes >= SINGLE_FROM
    dtype = np.float32 if large else np.float64
    size = _block_rows(x.n_genes, np.dtype(dtype).itemsize)
    centre_g = c.centre()
    fixed = _Blocks(c, controls, centre_g, size, dtype)
    moving = _Blocks(x, every, centre_g, size, dtype)
    progress.start("energy distances", float(len(every) + len(controls)), "cells")
    cross_p = np.zeros(len(groups))
    for i, rows in enumerate(fixed.parts):
        b = fixed.get(i)
        for j in range(len(moving.parts)):
            at = slice(j * size, (j + 1) * size)
            cross_p += np.bincount(owner[at], _distance_sums(moving.get(j), b), len(groups))
        progress.advance(len(rows))
    own_p = np.empty(len(groups))
    for p, rows in enumerate(groups):
        own_p[p] = _within(_Blocks(x, rows, centre_g, size, dtype))
        progress.advance(len(rows))
    within_control = _within(fixed)
    progress.finish()
    n_p, m = np.array([len(g) for g in groups], np.float64), float(len(controls))
    return 2 * cross_p / (n_p * m) - own_p / (n_p * n_p) - within_control / (m * m)
