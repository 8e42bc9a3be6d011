"""Compute the energy distance of every perturbation to the controls, by blocked matrix products in bounded memory.

E = 2·mean d(x, c) − mean d(x, x') − mean d(c, c'), with d Euclidean (not squared) and self-pairs included
(Székely & Rizzo 2013). |x − y|² = |x|² + |y|² − 2x·y, for cells minus their common mean. The cost is cells × controls ×
genes. Large data is multiplied in float32, which is twice as fast; a block with a pair so close that the subtraction
would lose precision is computed again in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vcelltools.differential.cell_labels import Cells
from vcelltools.differential.expression import Scale, make_transform
from vcelltools.io import CsrMatrix, Dataset, DenseMatrix
from vcelltools.io.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.io.stream import run_spans
from vcelltools.kernels.distance import add_columns, csr_fill_rows, sum_distances
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads

BLOCK_BYTES = 128 << 20
SINGLE_FROM = 1e11
"""Number of multiplications (cells × controls × genes) from which they are done in float32."""
NEAR = 0.02
_STRIP = 256


class DenseRows:
    """The transformed cells of a matrix, available as dense float64 blocks of any rows."""

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
        """Sort the genes into ``order``, their current positions."""
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
        sum_g = np.zeros(self.n_genes)
        add_columns(self._indices, self._data, sum_g)
        return sum_g / max(len(self._indptr) - 1, 1)

    def take(self, rows: np.ndarray, centre_g: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Return the rows minus ``centre_g`` as a dense (len(rows), g) block; duplicate entries are summed.

        ``out`` is filled instead of a new float64 array.
        """
        centre = np.zeros(self.n_genes) if centre_g is None else centre_g
        if out is None:
            out = np.empty((len(rows), self.n_genes))
        if self._dense is not None:
            np.subtract(self._dense[rows], centre, out=out, casting="same_kind")
        else:
            rows = np.ascontiguousarray(rows, np.int64)
            csr_fill_rows(self._indptr, self._indices, self._data, rows, centre, out)
        return out


def _block_rows(n_genes: int, itemsize: int) -> int:
    return max(64, min(2048, BLOCK_BYTES // (itemsize * max(n_genes, 1))))


Block = tuple[np.ndarray, np.ndarray]
"""Some cells as a dense (b, g) array, and their (b,) squared lengths."""


class _Workshop:
    """Dense blocks and the distances between them, computed by all threads in reusable memory.

    New memory for every block would cost a fifth of the time, because the system clears each page. A product is divided
    into strips of ``_STRIP`` rows regardless of the number of threads, so that its last digits do not depend on it.
    """

    def __init__(self, n_genes: int, size: int, dtype: type[np.floating], threads: int) -> None:
        self.size, self._threads = size, threads
        self._rooms = [np.empty((size, n_genes), dtype) for _ in range(2)]
        self._dot = np.empty(size * size, dtype)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> _Workshop:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the rows divided into blocks."""
        return [rows[i : i + self.size] for i in range(0, len(rows), self.size)]

    def fill(self, room: int, cells: DenseRows, rows: np.ndarray, centre_g: np.ndarray) -> Block:
        """Return the block of some rows, valid until the next block in the same buffer (0 or 1)."""
        block, squares = self._rooms[room][: len(rows)], np.empty(len(rows))

        def work(at: slice) -> None:
            cells.take(rows[at], centre_g, block[at])
            np.einsum("ij,ij->i", block[at], block[at], dtype=np.float64, out=squares[at])

        self._share(work, len(rows))
        return block, squares

    def add_up(self, a: Block, b: Block, same: bool = False) -> np.ndarray:
        """Return (rows of a,) the sum of distances to all rows of b."""
        out = np.empty(len(a[0]))
        single = a[0].dtype == np.float32
        dot = self._dot[: len(a[0]) * len(b[0])].reshape(len(a[0]), len(b[0]))
        close = 0

        def work(at: slice) -> None:
            nonlocal close
            np.matmul(a[0][at], b[0].T, out=dot[at])
            n = sum_distances(dot[at], a[1][at], b[1], at.start if same else -1, NEAR if single else 0.0, out[at])
            with lock:
                close += n

        lock = threading.Lock()
        self._share(work, len(dot), _STRIP)
        if close and single:
            wide = [x[0].astype(np.float64) for x in (a, b)]
            squares = [np.einsum("ij,ij->i", x, x) for x in wide]
            sum_distances(wide[0] @ wide[1].T, *squares, 0 if same else -1, 0.0, out)
        return out

    def _share(self, work: Callable[[slice], None], n: int, step: int = 0) -> None:
        """Divide ``n`` rows among the threads, ``step`` at a time, or in one part per thread."""
        step = step or max(1, -(-n // self._threads))
        list(self._pool.map(work, [slice(i, min(i + step, n)) for i in range(0, n, step)]))

    def within(self, cells: DenseRows, rows: np.ndarray, centre_g: np.ndarray) -> float:
        """Return the sum of distances over all ordered pairs of some cells."""
        total = 0.0
        parts = self.cut(rows)
        for i, part in enumerate(parts):
            b = self.fill(0, cells, part, centre_g)
            total += float(self.add_up(b, b, True).sum())
            for other in parts[i + 1 :]:
                total += 2 * float(self.add_up(self.fill(1, cells, other, centre_g), b).sum())
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
    control_from: tuple[Dataset, Cells, Scale] | None = None,
    gene_order: np.ndarray | None = None,
    progress: Progress = SILENT,
) -> np.ndarray:
    """Return (p,) energy distances, with perturbations sorted as text.

    Parameters
    ----------
    control_from
        Another data set, with its cells and scale, whose controls are used.
    gene_order
        Positions of the genes of that file in this one, or None for the same order.
    """
    x = DenseRows(dataset, scale, raw=raw, cp10k=cp10k, threads=threads)
    if gene_order is not None:
        x.reorder(gene_order)
    c, c_codes, c_labels = x, cells.codes, cells.labels
    if control_from is not None:
        other, its_cells, its_scale = control_from
        c = DenseRows(other, its_scale, raw=raw, cp10k=cp10k, threads=threads)
        c_codes, c_labels = its_cells.codes, its_cells.labels
    controls = np.flatnonzero(c_codes == c_labels.index(control))
    groups = [np.flatnonzero(cells.codes == i) for i, v in enumerate(cells.labels) if v != control]
    every = np.concatenate(groups) if groups else np.zeros(0, np.int64)
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    large = float(len(every) + len(controls)) * len(controls) * x.n_genes >= SINGLE_FROM
    dtype = np.float32 if large else np.float64
    size = min(_block_rows(x.n_genes, np.dtype(dtype).itemsize), max(len(controls), len(every), 1))
    centre_g = c.centre()
    progress.start("energy distances", float(len(every) + len(controls)), "cells")
    cross_p, own_p = np.zeros(len(groups)), np.empty(len(groups))
    with _Workshop(x.n_genes, size, dtype, get_threads(threads)) as shop:
        for part in shop.cut(controls):
            b = shop.fill(0, c, part, centre_g)
            for moving, of in zip(shop.cut(every), shop.cut(owner), strict=True):
                sums = shop.add_up(shop.fill(1, x, moving, centre_g), b)
                cross_p += np.bincount(of, sums, len(groups))
            progress.advance(len(part))
        for p, rows in enumerate(groups):
            own_p[p] = shop.within(x, rows, centre_g)
            progress.advance(len(rows))
        within_control = shop.within(c, controls, centre_g)
    progress.finish()
    n_p, m = np.array([len(g) for g in groups], np.float64), float(len(controls))
    return 2 * cross_p / (n_p * m) - own_p / (n_p * n_p) - within_control / (m * m)
