"""``normalize``: CP10K and log1p of counts, streamed to a new h5ad."""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.chunks import Chunk, CscChunk, CsrChunk, DenseChunk
from vcelltools.errors import DataError, UsageError
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.atomic import check_output
from vcelltools.io.counts import require_counts
from vcelltools.io.extras import carry_extras
from vcelltools.io.matrix import CscMatrix, Matrix, Span
from vcelltools.io.write import H5adWriter
from vcelltools.pipelines.rewrite import rewrite_matrix
from vcelltools.progress import SILENT, Progress
from vcelltools.results import Result
from vcelltools.stream import run_spans

if TYPE_CHECKING:
    from anndata import AnnData

_FAULTS = {
    1: "an index is outside the matrix",
    2: "a count is negative",
    3: "a value is NaN, infinite or beyond any count",
    4: "a value is not a whole number",
}


@dataclass(frozen=True, kw_only=True)
class NormalizeResult(Result):
    """What was written.

    Attributes
    ----------
    out
        The new h5ad.
    n_cells, n_genes, n_empty
        Its shape, and the cells without counts (their values stay zero).
    target_sum
        What every cell was scaled to.
    seconds
        Wall time.
    notes, warnings
        What the reader decided; what the user should know.
    """

    out: Path
    n_cells: int
    n_genes: int
    n_empty: int
    target_sum: float
    layout: str
    seconds: float
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def normalize(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike,
    *,
    target_sum: float | None = 1e4,
    log: bool = True,
    base: float | None = None,
    library_size: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    keep_counts: bool = False,
    compression: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> NormalizeResult:
    """Scale every cell to ``target_sum``, take log1p, and write an h5ad of the same layout in float32.

    Equal to scanpy's ``normalize_total(target_sum=...)`` and ``log1p(base=...)``; memory does not grow with the
    file.

    Parameters
    ----------
    source
        Any file that :func:`vcelltools.io.open_dataset` opens, or an AnnData.
    target_sum
        Counts a cell (10,000: CP10K); None for the median library size of the cells with counts.
    log, base
        Whether to take log1p; its base (e by default).
    library_size
        An obs column with the library sizes (of the whole transcriptome, where the matrix is a part of it). By
        default they are counted, which costs CSC files one more pass.
    keep_counts
        Keep the counts as the layer ``counts``.

    Raises
    ------
    NotCountsError, DataError
        When the matrix does not hold counts; with the cell and gene of a bad value.
    UsageError
        For an existing output without ``force``.
    """
    began = time.monotonic()
    if target_sum is not None and not (target_sum > 0 and math.isfinite(target_sum)):
        raise UsageError(f"target sum {target_sum} is not a positive number")
    if base is not None and (base <= 0 or base == 1 or not math.isfinite(base)):
        raise UsageError(f"base {base} is not a base of logarithms", hint="2, 10, or leave it out for e")
    if base is not None and not log:
        raise UsageError("--base is of the logarithm, and --no-log takes none", hint="leave one of the two out")
    path = check_output(out, force=force, sources=[source])
    if path.suffix != ".h5ad":
        raise UsageError(f"{path}: the name does not end in .h5ad", hint="name it so")
    with open_dataset(source, modality=modality, layer=layer) as ds:
        require_counts(ds)
        m = ds.matrix
        notes: list[str] = []
        sizes = _get_library_size(ds, library_size, target_sum, threads, progress)
        target = float(np.median(sizes[sizes > 0])) if target_sum is None and sizes is not None else target_sum
        assert target is not None
        work = _Normaliser(ds, sizes, target, log, base, library_size)
        cells = m.shape[0]
        need = (cells * m.shape[1] * 4 if m.nnz is None else m.nnz * (4 + m.index_dtype.itemsize)) * (
            2 if keep_counts else 1
        )
        uns: dict[str, Any] = {"log1p": {} if base is None else {"base": float(base)}} if log else {}
        with H5adWriter(
            path,
            n_genes=m.shape[1],
            n_cells=cells,
            obs=ds.obs,
            var=ds.var,
            layout=m.layout,
            dtype="float32",
            index_dtype=_get_index_dtype(m),
            compression=compression,
            force=force,
            need_bytes=need if compression in (None, "none") else need // 6,
            threads=threads,
            uns=uns,
        ) as w:
            carry_extras(ds, w.main, notes)
            progress.start("normalize", m.stored_bytes * (2 if keep_counts else 1), "bytes")
            rewrite_matrix(m, w.X, change=work, threads=threads, progress=progress)
            work.finish()
            if keep_counts:
                counts = w.add_layer("counts", dtype=m.dtype.newbyteorder("="))
                rewrite_matrix(m, counts, threads=threads, progress=progress)
            progress.finish()
        if work.n_repeated:
            notes.append(f"{work.n_repeated:,} values repeated a position and were summed")
    return NormalizeResult(
        out=path,
        n_cells=cells,
        n_genes=m.shape[1],
        n_empty=int(np.count_nonzero(work.seen_n == 0)),
        target_sum=target,
        layout=m.layout,
        seconds=time.monotonic() - began,
        notes=tuple(ds.notes),
        warnings=tuple(notes),
    )


def parse_target_sum(text: str) -> float | None:
    """Return the number that a user typed, or None for ``median``."""
    if text == "median":
        return None
    try:
        return float(text)
    except ValueError as e:
        raise UsageError(f"target sum {text!r} is neither a number nor median", hint="for example 10000") from e


def _get_index_dtype(m: Matrix) -> str:
    return "int64" if m.index_dtype is not None and m.index_dtype.itemsize == 8 else "int32"


def _get_library_size(
    ds: Dataset, column: str | None, target_sum: float | None, threads: int | None, progress: Progress
) -> np.ndarray | None:
    """Return (n,) library sizes where they are needed before the pass (or given by ``column``), else None."""
    if column is not None:
        values = ds.obs.column(column).values
        if values is None or values.dtype.kind not in "iuf":
            raise DataError(f"{ds.label}: obs/{column} does not hold numbers")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"{ds.label}: obs/{column} holds a missing or negative library size")
        return values.astype(np.float64)
    if isinstance(ds.matrix, CscMatrix) or target_sum is None:
        return count_library_size(ds.matrix, threads=threads, progress=progress)
    return None


def count_library_size(matrix: Matrix, *, threads: int | None = None, progress: Progress = SILENT) -> np.ndarray:
    """Return the (n,) int64 library sizes of a matrix of counts, in one pass.

    Raises
    ------
    DataError
        With the cell and gene of the first value that is no count.
    """
    from vcelltools.kernels.normalize import csc_library_size

    n = matrix.shape[0]

    def visit(sizes: np.ndarray, chunk: object, span: Span) -> None:
        if isinstance(chunk, CscChunk):
            _raise(matrix, chunk, *csc_library_size(chunk.indices, chunk.data, sizes))
        else:
            first = chunk.start if isinstance(chunk, CsrChunk) else chunk.row_start  # type: ignore[attr-defined]
            counted = _count_rows(matrix, chunk)  # type: ignore[arg-type]
            sizes[first : first + len(counted)] += counted

    progress.start("library sizes", matrix.stored_bytes, "bytes")
    parts = run_spans(matrix, matrix.plan(), lambda: np.zeros(n, np.int64), visit, threads=threads, progress=progress)
    progress.finish()
    return np.sum(parts, axis=0)


def _count_rows(matrix: Matrix, chunk: CsrChunk | DenseChunk) -> np.ndarray:
    from vcelltools.kernels.normalize import csr_library_size, dense_library_size

    if isinstance(chunk, DenseChunk):
        sizes = np.zeros(len(chunk.block), np.int64)
        _raise(matrix, chunk, *dense_library_size(chunk.block, sizes))
    else:
        sizes = np.empty(chunk.n_rows, np.int64)
        _raise(matrix, chunk, *csr_library_size(chunk.indptr, chunk.indices, chunk.data, chunk.n_genes, sizes))
    return sizes


def _check_size(given_b: np.ndarray, counted_b: np.ndarray, start: int, column: str) -> None:
    """Refuse given library sizes below what the cells' own counts add up to."""
    low = np.flatnonzero(given_b < counted_b)
    if len(low):
        i = int(low[0])
        raise DataError(
            f"obs/{column} says {given_b[i]:g} at cell {start + i:,}, whose counts here add up to {counted_b[i]:,}",
            hint="name the column of the raw library sizes",
        )


def _raise(matrix: Matrix, chunk: Chunk, status: int, at: int) -> None:
    """Raise a :class:`DataError` that names the cell and the gene of a kernel's fault."""
    if status not in _FAULTS:
        return
    if isinstance(chunk, DenseChunk):
        cell, gene = divmod(at, chunk.block.shape[1])
        cell, gene, value = cell + chunk.row_start, gene + chunk.col_start, chunk.block.flat[at]
    else:
        major = int(np.searchsorted(chunk.indptr, at, side="right")) - 1 + chunk.start
        minor = int(chunk.indices[at])
        cell, gene = (major, minor) if isinstance(chunk, CsrChunk) else (minor, major)
        value = chunk.data[at]
    raise DataError(f"{matrix.where}: {_FAULTS[status]} ({value} at cell {cell:,}, gene {gene:,})")


class _Normaliser:
    """Changes chunks of counts into chunks of normalised values; safe in threads.

    Attributes
    ----------
    seen_n
        (n,) library sizes used.
    n_repeated
        Values that repeated a position and were summed.
    """

    def __init__(
        self,
        ds: Dataset,
        sizes: np.ndarray | None,
        target_sum: float,
        log: bool,
        base: float | None,
        column: str | None,
    ) -> None:
        from vcelltools.kernels.normalize import CELL_TABLE, make_cell_table, make_scale

        self.matrix, self.target_sum, self.log = ds.matrix, target_sum, log
        self.unit = 1.0 if base is None else 1.0 / math.log(base)
        self.given = sizes
        self.seen_n = np.zeros(ds.n_cells) if sizes is None else sizes
        self.n_repeated = 0
        self._lock = threading.Lock()
        self.column = column
        if isinstance(ds.matrix, CscMatrix):
            self.counted_n = np.zeros(ds.n_cells, np.int64)
            self.scale_n = make_scale(self.seen_n, target_sum)
            self.table_nt = np.empty((ds.n_cells, CELL_TABLE), np.float32)
            make_cell_table(self.scale_n, log, self.unit, self.table_nt)

    def __call__(self, chunk: Chunk) -> Chunk:
        from vcelltools.kernels import normalize as k

        if isinstance(chunk, DenseChunk):
            scale = self._get_scale(chunk, chunk.row_start, len(chunk.block))
            block = np.empty(chunk.block.shape, np.float32)
            _raise(self.matrix, chunk, *k.dense_normalise(chunk.block, scale, self.log, self.unit, block))
            return replace(chunk, block=block)
        out = np.empty(len(chunk.data), np.float32)
        if isinstance(chunk, CscChunk):
            if self.column is not None:
                with self._lock:
                    _raise(self.matrix, chunk, *k.csc_library_size(chunk.indices, chunk.data, self.counted_n))
            status, at = k.csc_normalise(
                chunk.indptr, chunk.indices, chunk.data, self.scale_n, self.table_nt, self.log, self.unit, out
            )
        else:
            scale = self._get_scale(chunk, chunk.start, chunk.n_rows)
            status, at = k.csr_normalise(
                chunk.indptr, chunk.indices, chunk.data, scale, self.log, self.unit, chunk.n_genes, out
            )
        if status == k.NOT_SORTED:
            if isinstance(chunk, CscChunk) and self.column is not None:
                with self._lock:  # the second visit counts it
                    np.subtract.at(self.counted_n, chunk.indices, chunk.data.astype(np.int64))
            return self(self._sum_repeated(chunk))
        _raise(self.matrix, chunk, status, at)
        return replace(chunk, indices=chunk.indices.copy(), data=out)

    def finish(self) -> None:
        """Check what only the whole pass knows: that given library sizes cover the counts."""
        if self.column is not None and isinstance(self.matrix, CscMatrix):
            _check_size(self.seen_n, self.counted_n, 0, self.column)

    def _get_scale(self, chunk: CsrChunk | DenseChunk, start: int, b: int) -> np.ndarray:
        from vcelltools.kernels.normalize import make_scale

        if self.given is None:
            self.seen_n[start : start + b] = _count_rows(self.matrix, chunk)
        elif self.column is not None:
            _check_size(self.seen_n[start : start + b], _count_rows(self.matrix, chunk), start, self.column)
        return make_scale(self.seen_n[start : start + b], self.target_sum)

    def _sum_repeated(self, chunk: CsrChunk | CscChunk) -> CsrChunk | CscChunk:
        """Return the chunk in canonical form: positions in order, each once."""
        from scipy import sparse

        n_minor = chunk.n_genes if isinstance(chunk, CsrChunk) else chunk.n_cells
        if int(chunk.indices.min()) < 0 or int(chunk.indices.max()) >= n_minor:
            at = int(np.flatnonzero((chunk.indices < 0) | (chunk.indices >= n_minor))[0])
            _raise(self.matrix, chunk, 1, at)
        data = chunk.data.astype(np.float64)  # a sum of int32 may not be one
        m = sparse.csr_matrix((data, chunk.indices.copy(), chunk.indptr), shape=(len(chunk.indptr) - 1, n_minor))
        m.sum_duplicates()
        with self._lock:
            self.n_repeated += len(chunk.data) - m.nnz
        return replace(
            chunk,
            indptr=m.indptr.astype(np.int64),
            indices=m.indices.astype(chunk.indices.dtype, copy=False),
            data=m.data,
        )
