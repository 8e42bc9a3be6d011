"""``normalize``: normalise counts to CP10K and log1p, and stream them to a new h5ad."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, NotCountsError, UsageError, check_number, checked, spell
from vcelltools.files.relayout import rewrite_matrix
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.chunks import Chunk, CscChunk, CsrChunk, DenseChunk
from vcelltools.io.faults import raise_fault
from vcelltools.io.library import check_library, read_library, suggest_library
from vcelltools.io.matrix import CscMatrix, Matrix, Span
from vcelltools.io.results import Result
from vcelltools.io.stream import map_spans, run_spans
from vcelltools.io.survey import require_counts
from vcelltools.io.write.extras import carry_extras
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.io.write.h5ad import H5adWriter, get_storable
from vcelltools.kernels.faults import Fault
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    from anndata import AnnData

_MAX_COUNT = float(1 << 53)


@dataclass(frozen=True, kw_only=True)
class NormalizeResult(Result):
    """The file that was written.

    Attributes
    ----------
    out
        The new h5ad.
    n_cells, n_genes, n_empty
        Its shape, and the number of cells without counts (whose values stay zero).
    target_sum
        The sum to which every cell was scaled.
    seconds
        Wall time.
    notes, warnings
        Decisions of the reader, and messages for the user.
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


@checked
def normalize(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike | None = None,
    *,
    target_sum: float | None = 1e4,
    log: bool = True,
    base: float | None = None,
    library_size: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    keep_counts: bool = False,
    compression: str | None = None,
    inplace: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> NormalizeResult | AnnData | None:
    """Scale every cell to ``target_sum``, apply log1p, and write an h5ad with the same layout in float32.

    An AnnData without ``out`` is changed in memory, as in scanpy.

    The result equals scanpy's ``normalize_total(target_sum=...)`` and ``log1p(base=...)``; memory does not grow with
    the file. Fractional counts are used unchanged, with a warning.

    Parameters
    ----------
    source
        Any file that :func:`vcelltools.io.open_dataset` opens, or an AnnData.
    out
        The h5ad to write; not needed for an AnnData in memory.
    inplace
        Without ``out``, whether to change the AnnData and return None, or to return a changed copy.
    target_sum
        Counts per cell (10,000 for CP10K), or None for the median library size of the cells with counts.
    log, base
        Whether to apply log1p, and its base (e by default).
    library_size
        An obs column with the library sizes (of the whole transcriptome, if the matrix is only a part of it). By
        default, they are computed, which takes another pass for CSC files.
    keep_counts
        Whether to keep the counts as the layer ``counts``.

    Raises
    ------
    NotCountsError, DataError
        If the matrix does not hold counts; the message names the cell and gene of an invalid value.
    UsageError
        If the output exists and ``force`` is off, or a file is given without ``out``.

    Examples
    --------
    >>> import vcelltools as vc
    >>> result = vc.normalize("atlas.h5ad", "atlas.log1p.h5ad")
    >>> result.n_cells, result.target_sum
    (200, 10000.0)
    >>> import anndata
    >>> adata = anndata.read_h5ad("atlas.h5ad")
    >>> vc.normalize(adata, keep_counts=True)
    >>> adata.uns["log1p"], "counts" in adata.layers
    ({'base': None}, True)
    """
    began = time.monotonic()
    if target_sum is not None and not target_sum > 0:
        raise UsageError(f"the target sum is {target_sum}, but must be a positive number", field="target_sum")
    check_number("target_sum", target_sum)
    check_number("base", base)
    if base is not None and (base <= 0 or base == 1 or not math.isfinite(base)):
        raise UsageError(f"base {base} is not a valid base of a logarithm", hint="use 2 or 10, or remove it for e")
    if base is not None and not log:
        raise UsageError(
            f"{spell('base')} sets the base of the logarithm, which {spell('log', False)} turns off",
            hint="remove one of the two",
        )
    part: dict[str, Any] = {"modality": modality, "layer": layer, "feature_type": feature_type, "genome": genome}
    if out is None:
        if not hasattr(source, "n_vars") or getattr(source, "isbacked", False):
            raise UsageError("no output file was given", hint=f"give {spell('out')}", field="out")
        return _normalize_adata(
            source, part, target_sum, log, base, library_size, keep_counts, inplace, threads, progress
        )
    path = Path(out)
    guard_outputs([Target(path, "hdf5")], reads=[source], force=force)
    if path.suffix != ".h5ad":
        raise UsageError(f"{path}: the name does not end in .h5ad", hint="end the name in .h5ad")

    def write(ds: Dataset, *, whole: bool) -> NormalizeResult:
        m = ds.matrix
        sizes = _get_library_size(ds, library_size, target_sum, whole, threads, progress)
        target = float(np.median(sizes[sizes > 0])) if target_sum is None and sizes is not None else target_sum
        assert target is not None
        work = (_Normaliser if whole else _FractionNormaliser)(ds, sizes, target, log, base, library_size)
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
            carry_extras(ds, w.main)
            progress.start("normalize", m.stored_bytes * (2 if keep_counts else 1), "bytes")
            rewrite_matrix(m, w.X, change=work, threads=threads, progress=progress)
            work.finish()
            if keep_counts:
                counts = w.add_layer("counts", dtype=get_storable(m.dtype))
                rewrite_matrix(m, counts, threads=threads, progress=progress)
            progress.finish()
        warnings = w.main.notes
        if not whole:
            warnings.append("some counts are fractional (corrected or estimated); they are used unchanged")
        if library_size is None:
            warnings += suggest_library(ds, work.seen_n)
        if work.n_repeated:
            warnings.append(f"{work.n_repeated:,} duplicate entries were summed")
        return NormalizeResult(
            out=path,
            n_cells=cells,
            n_genes=m.shape[1],
            n_empty=int(np.count_nonzero(work.seen_n == 0)),
            target_sum=target,
            layout=m.layout,
            seconds=time.monotonic() - began,
            notes=tuple(ds.notes),
            warnings=tuple(warnings),
        )

    with open_dataset(source, **part) as ds:
        return _run_exactly(ds, write, progress)


def _run_exactly(ds: Dataset, run: Callable[..., Any], progress: Progress) -> Any:
    """Call ``run(ds, whole=True)`` for whole counts, and with ``whole=False`` for fractional ones."""
    if require_counts(ds, whole=False).is_counts:
        try:
            return run(ds, whole=True)
        except NotCountsError:  # too rare to appear in a sample
            progress.finish()
    return run(ds, whole=False)


class _MemoryMatrix:
    """Collects the blocks of a matrix in memory, with the interface of a file writer."""

    def __init__(self, matrix: Matrix) -> None:
        self.layout, self.shape = matrix.layout, matrix.shape
        self.part, self.nnz, self.n_rows = SimpleNamespace(n_genes=matrix.shape[1]), 0, matrix.shape[0]
        self.blocks: list[Any] = []

    def append_csr(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Add rows, or columns of a CSC matrix."""
        self.blocks.append((indptr[1:] - indptr[0], indices.copy(), data.astype(np.float32)))

    append_csc = append_csr

    def append_dense(self, block: np.ndarray) -> None:
        """Add rows of a dense matrix."""
        self.blocks.append(block.astype(np.float32))

    def build(self) -> Any:
        """Return the matrix, as a scipy matrix or an array."""
        if self.layout == "dense":
            return np.concatenate(self.blocks)
        from scipy import sparse

        ends = np.cumsum([0, *(b[0][-1] if len(b[0]) else 0 for b in self.blocks)])
        indptr = np.concatenate([[0], *(b[0] + e for b, e in zip(self.blocks, ends[:-1], strict=True))])
        indices, data = (np.concatenate([b[i] for b in self.blocks]) for i in (1, 2))
        kind = sparse.csr_matrix if self.layout == "csr" else sparse.csc_matrix
        return kind((data, indices, indptr), shape=self.shape)


def _normalize_adata(
    adata: AnnData,
    part: dict[str, str | None],
    target_sum: float | None,
    log: bool,
    base: float | None,
    library_size: str | None,
    keep_counts: bool,
    inplace: bool,
    threads: int | None,
    progress: Progress,
) -> AnnData | None:
    def change(ds: Dataset, *, whole: bool) -> tuple[Any, int]:
        m = ds.matrix
        sizes = _get_library_size(ds, library_size, target_sum, whole, threads, progress)
        target = float(np.median(sizes[sizes > 0])) if target_sum is None and sizes is not None else target_sum
        assert target is not None
        work = (_Normaliser if whole else _FractionNormaliser)(ds, sizes, target, log, base, library_size)
        out: Any = _MemoryMatrix(m)
        rewrite_matrix(m, out, change=work, threads=threads, progress=progress)
        work.finish()
        return out.build(), ds.n_genes

    layer = part["layer"]
    with open_dataset(adata, **part) as ds:
        values, n_genes = _run_exactly(ds, change, progress)
    if n_genes != adata.n_vars:
        raise DataError(
            f"the matrix has {n_genes:,} genes, but the AnnData has {adata.n_vars:,} variables",
            hint=f"remove antibodies and guides from the AnnData, write a file, or set {spell('feature_type', 'all')}",
        )
    target_adata = adata if inplace else adata.copy()
    if keep_counts:
        counts = adata.X if layer in (None, "X") else adata.layers[layer]
        target_adata.layers["counts"] = counts.copy()
    target_adata.X = values
    if log:
        target_adata.uns["log1p"] = {"base": base}
    return None if inplace else target_adata


def parse_target_sum(text: str) -> float | None:
    """Parse a target sum; None for ``median``."""
    if text == "median":
        return None
    try:
        return float(text)
    except ValueError as e:
        raise UsageError(f"the target sum {text!r} is neither a number nor median", hint="for example 10000") from e


def _get_index_dtype(m: Matrix) -> str:
    return "int64" if m.index_dtype is not None and m.index_dtype.itemsize == 8 else "int32"


def _get_library_size(
    ds: Dataset, column: str | None, target_sum: float | None, whole: bool, threads: int | None, progress: Progress
) -> np.ndarray | None:
    """Return (n,) library sizes if they are needed before the pass (or given by ``column``), otherwise None."""
    if column is not None:
        return read_library(ds, column)
    if isinstance(ds.matrix, CscMatrix) or target_sum is None:
        return count_library_size(ds, whole=whole, threads=threads, progress=progress)
    return None


def count_library_size(
    ds: Dataset, *, whole: bool = True, threads: int | None = None, progress: Progress = SILENT
) -> np.ndarray:
    """Return the (n,) library sizes of a matrix of counts from one pass, as int64 if ``whole`` and else as float64.

    Raises
    ------
    DataError
        If a value is not a count; the message names the cell and gene of the first one.
    """
    from vcelltools.kernels.normalize import csc_library_size

    matrix, n = ds.matrix, ds.n_cells
    if not whole:
        progress.start("library sizes", matrix.stored_bytes, "bytes")
        total = np.zeros(n)
        sums = map_spans(matrix, matrix.plan(), lambda c, _: _sum_cells(ds, c), threads=threads, progress=progress)
        for first, part in sums:  # in the order of the spans, on which sums of fractions depend
            total[first : first + len(part)] += part
        progress.finish()
        return total

    def visit(sizes: np.ndarray, chunk: Chunk, span: Span) -> None:
        if isinstance(chunk, CscChunk):
            _check(ds, chunk, *csc_library_size(chunk.indices, chunk.data, sizes))
        else:
            sizes[chunk.cells] += _count_rows(ds, chunk)

    progress.start("library sizes", matrix.stored_bytes, "bytes")
    parts = run_spans(matrix, matrix.plan(), lambda: np.zeros(n, np.int64), visit, threads=threads, progress=progress)
    progress.finish()
    return np.sum(parts, axis=0)


def _check(ds: Dataset, chunk: Chunk, fault: int, position: int) -> None:
    if fault:
        raise_fault(fault, chunk, position, ds)


def _count_rows(ds: Dataset, chunk: CsrChunk | DenseChunk) -> np.ndarray:
    from vcelltools.kernels.normalize import csr_library_size, dense_library_size

    if isinstance(chunk, DenseChunk):
        sizes = np.zeros(len(chunk.block), np.int64)
        _check(ds, chunk, *dense_library_size(chunk.block, sizes))
    else:
        sizes = np.empty(chunk.n_rows, np.int64)
        _check(ds, chunk, *csr_library_size(chunk.indptr, chunk.indices, chunk.data, chunk.n_genes, sizes))
    return sizes


def _sum_cells(ds: Dataset, chunk: Chunk) -> tuple[int, np.ndarray]:
    """Return (first cell, float64 sums of the cells) of a chunk of possibly fractional counts."""
    bad = np.flatnonzero(~((chunk.values >= 0) & (chunk.values <= _MAX_COUNT)))
    if len(bad):
        value = chunk.values[bad[0]]
        fault = Fault.NOT_FINITE if not np.isfinite(value) else Fault.NEGATIVE if value < 0 else Fault.TOO_LARGE
        raise_fault(fault, chunk, int(bad[0]), ds)
    if isinstance(chunk, DenseChunk):
        return chunk.row_start, chunk.block.sum(axis=1, dtype=np.float64)
    if (outside := chunk.find_outside()) is not None:
        raise_fault(Fault.BAD_INDEX, chunk, outside, ds)
    first = chunk.cells.start
    return first, np.bincount(chunk.get_entries()[0] - first, chunk.data, chunk.cells.stop - first)


class _Normaliser:
    """Converts chunks of counts to chunks of normalised values; thread-safe.

    Attributes
    ----------
    seen_n
        (n,) library sizes used.
    n_repeated
        Number of duplicate entries that were summed.
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

        self.ds, self.matrix, self.target_sum, self.log = ds, ds.matrix, target_sum, log
        self.unit = 1.0 if base is None else 1.0 / math.log(base)
        self.given = sizes
        self.seen_n = np.zeros(ds.n_cells) if sizes is None else sizes
        self.n_repeated = 0
        self._lock = threading.Lock()
        self.column = column
        if isinstance(ds.matrix, CscMatrix):
            self.counted_n = np.zeros(ds.n_cells, np.int64 if type(self) is _Normaliser else np.float64)
            self.scale_n = make_scale(self.seen_n, target_sum)
            self.table_nt = np.empty((ds.n_cells, CELL_TABLE), np.float32)
            make_cell_table(self.scale_n, log, self.unit, self.table_nt)

    def __call__(self, chunk: Chunk) -> Chunk:
        from vcelltools.kernels import normalize as k

        if isinstance(chunk, DenseChunk):
            scale = self._get_scale(chunk)
            block = np.empty(chunk.block.shape, np.float32)
            _check(self.ds, chunk, *k.dense_normalise(chunk.block, scale, self.log, self.unit, block))
            return replace(chunk, block=block)
        out = np.empty(len(chunk.data), np.float32)
        if isinstance(chunk, CscChunk):
            if self.column is not None:
                with self._lock:
                    _check(self.ds, chunk, *k.csc_library_size(chunk.indices, chunk.data, self.counted_n))
            fault, at = k.csc_normalise(
                chunk.indptr, chunk.indices, chunk.data, self.scale_n, self.table_nt, self.log, self.unit, out
            )
        else:
            scale = self._get_scale(chunk)
            fault, at = k.csr_normalise(
                chunk.indptr, chunk.indices, chunk.data, scale, self.log, self.unit, chunk.n_genes, out
            )
        if fault == Fault.NOT_SORTED:
            if isinstance(chunk, CscChunk) and self.column is not None:
                with self._lock:  # counted in the second pass
                    np.subtract.at(self.counted_n, chunk.indices, chunk.data.astype(np.int64))
            return self(self._sum_repeated(chunk))
        _check(self.ds, chunk, fault, at)
        return replace(chunk, indices=chunk.indices.copy(), data=out)

    def finish(self) -> None:
        """Check, after the whole pass, that given library sizes cover the counts."""
        if self.column is not None and isinstance(self.matrix, CscMatrix):
            check_library(self.seen_n, self.counted_n, self.column)

    def _get_scale(self, chunk: CsrChunk | DenseChunk) -> np.ndarray:
        from vcelltools.kernels.normalize import make_scale

        cells = chunk.cells
        if self.given is None:
            self.seen_n[cells] = _count_rows(self.ds, chunk)
        elif self.column is not None:
            check_library(self.seen_n[cells], _count_rows(self.ds, chunk), self.column, cells.start)
        return make_scale(self.seen_n[cells], self.target_sum)

    def _sum_repeated(self, chunk: CsrChunk | CscChunk) -> CsrChunk | CscChunk:
        """Return the chunk in canonical form, with sorted and unique positions."""
        from scipy import sparse

        if (outside := chunk.find_outside()) is not None:
            _check(self.ds, chunk, Fault.BAD_INDEX, outside)
        data = chunk.data.astype(np.float64)  # a sum of int32 may overflow
        m = sparse.csr_matrix((data, chunk.indices.copy(), chunk.indptr), shape=(chunk.n_major, chunk.n_minor))
        m.sum_duplicates()
        with self._lock:
            self.n_repeated += len(chunk.data) - m.nnz
        return replace(
            chunk,
            indptr=m.indptr.astype(np.int64),
            indices=m.indices.astype(chunk.indices.dtype, copy=False),
            data=m.data,
        )


class _FractionNormaliser(_Normaliser):
    """The same for fractional counts, without a table of small counts and with sums of floats."""

    def __call__(self, chunk: Chunk) -> Chunk:
        from vcelltools.kernels.normalize import make_scale

        first, sums_b = _sum_cells(self.ds, chunk)
        if not isinstance(chunk, DenseChunk) and _has_repeats(chunk):
            chunk = self._sum_repeated(chunk)
        if isinstance(chunk, CscChunk):
            scale = self.scale_n[chunk.indices]
            with self._lock:
                self.counted_n += sums_b
        else:
            cells = slice(first, first + len(sums_b))
            if self.given is None:
                self.seen_n[cells] = sums_b
            elif self.column is not None:
                check_library(self.seen_n[cells], sums_b, self.column, first)
            scale = make_scale(self.seen_n[cells], self.target_sum)
        if isinstance(chunk, DenseChunk):
            return replace(chunk, block=self._change(chunk.block, scale[:, None]))
        if isinstance(chunk, CsrChunk):
            scale = np.repeat(scale, np.diff(chunk.indptr))
        return replace(chunk, indices=chunk.indices.copy(), data=self._change(chunk.data, scale))

    def _change(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        out = values.astype(np.float64) * scale
        return (np.log1p(out) * self.unit if self.log else out).astype(np.float32)


def _has_repeats(chunk: CsrChunk | CscChunk) -> bool:
    """Return whether positions are unsorted or repeated within a row or column."""
    falls = np.diff(chunk.indices) <= 0
    falls[chunk.indptr[(chunk.indptr > 0) & (chunk.indptr < len(chunk.indices))] - 1] = False
    return bool(falls.any())
