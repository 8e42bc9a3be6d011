"""Energy distances of every perturbation to the controls, by blocked matrix products in bounded memory.

E = 2·mean d(x, c) − mean d(x, x') − mean d(c, c'), with d Euclidean (not squared) and self-pairs included
(Székely & Rizzo 2013). |x − y|² = |x|² + |y|² − 2x·y in float64. Cost cells × controls × genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vcelltools.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.io import CsrMatrix, Dataset, DenseMatrix
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.sides import Cells, Scale, make_transform
from vcelltools.stream import run_spans

if TYPE_CHECKING:
    from vcelltools.scoring.evaluate import Opened

BLOCK_BYTES = 128 << 20


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

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows as a dense (len(rows), g) float64 block; duplicate entries are summed."""
        if self._dense is not None:
            return self._dense[rows].astype(np.float64)
        out = np.zeros((len(rows), self.n_genes))
        for i, r in enumerate(rows.tolist()):
            part = slice(self._indptr[r], self._indptr[r + 1])
            out[i] = np.bincount(self._indices[part], self._data[part], self.n_genes)
        return out


def _block_rows(n_genes: int) -> int:
    return max(64, min(2048, BLOCK_BYTES // (8 * max(n_genes, 1))))


def _distance_sums(a: np.ndarray, a2: np.ndarray, b: np.ndarray, b2: np.ndarray, same: bool) -> np.ndarray:
    """Return (rows of a,) the sum of distances to every row of b."""
    d = a @ b.T
    d *= -2
    d += a2[:, None]
    d += b2
    np.maximum(d, 0, out=d)
    if same:
        np.fill_diagonal(d, 0)
    return np.sqrt(d, out=d).sum(axis=1)


def _norms(a: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", a, a)


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
    progress: Progress = SILENT,
) -> np.ndarray:
    """Return (p,) energy distances, perturbations sorted as text.

    Parameters
    ----------
    control_from
        Another file whose controls are to be used.
    """
    x = Rows(dataset, scale, raw=raw, cp10k=cp10k, threads=threads)
    c, c_codes, c_labels = x, cells.codes, cells.labels
    if control_from is not None:
        o = control_from
        c = Rows(o.dataset, o.scale, raw=raw, cp10k=cp10k, threads=threads)
        c_codes, c_labels = o.cells.codes, o.cells.labels
    controls = np.flatnonzero(c_codes == c_labels.index(control))
    groups = [np.flatnonzero(cells.codes == i) for i, v in enumerate(cells.labels) if v != control]
    size = _block_rows(x.n_genes)
    n_cells = sum(len(g) for g in groups)
    progress.start("energy distances", float(n_cells + len(controls)), "cells")

    control_blocks = [controls[i : i + size] for i in range(0, len(controls), size)]
    every = np.concatenate(groups) if groups else np.zeros(0, np.int64)
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    cross_p, own_p = np.zeros(len(groups)), np.zeros(len(groups))
    within_control = 0.0
    for i, rows in enumerate(control_blocks):
        b = c.take(rows)
        b2 = _norms(b)
        for j in range(i, len(control_blocks)):
            a = b if j == i else c.take(control_blocks[j])
            a2 = b2 if j == i else _norms(a)
            within_control += float(_distance_sums(a, a2, b, b2, i == j).sum()) * (1 if i == j else 2)
        for k in range(0, len(every), size):
            a = x.take(every[k : k + size])
            np.add.at(cross_p, owner[k : k + size], _distance_sums(a, _norms(a), b, b2, False))
        progress.advance(len(rows))
    for p, rows in enumerate(groups):
        blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
        for i, first in enumerate(blocks):
            b = x.take(first)
            b2 = _norms(b)
            for j in range(i, len(blocks)):
                a = b if j == i else x.take(blocks[j])
                a2 = b2 if j == i else _norms(a)
                own_p[p] += float(_distance_sums(a, a2, b, b2, i == j).sum()) * (1 if i == j else 2)
        progress.advance(len(rows))
    progress.finish()
    n_p, m = np.array([len(g) for g in groups], np.float64), float(len(controls))
    return 2 * cross_p / (n_p * m) - own_p / (n_p * n_p) - within_control / (m * m)
