"""One pass over a data set: gene histograms per batch, library sizes, genes per cell. Mergeable, saved, reused."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.chunks import Chunk, CscChunk, CsrChunk, DenseChunk
from vcelltools.errors import DataError, NotCountsError, VcellError
from vcelltools.histograms import Histograms, add, make_histograms, stack_batches
from vcelltools.io.dataset import Dataset
from vcelltools.io.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix, Span
from vcelltools.progress import SILENT, Progress
from vcelltools.stream import get_threads, run_spans

MAX_WIDTH = 4096
MIN_WIDTH = 4
CSC_WIDTH = 1024
DENSE_COLUMN_WIDTH = 64
# Histograms of all threads together stay below this; more batches than fit take another pass over the file.
HISTOGRAM_BUDGET = 192 << 20
_OVERFLOW_ROOM = 1 << 16
_COMPRESS_ABOVE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one pass over a data set yields.

    Attributes
    ----------
    genes
        (g,) gene names, in the file's order.
    batches
        Batch labels, sorted; ``[""]`` where there are no batches.
    histograms
        Per batch and gene.
    library_size
        (n,) int64: total counts of each cell.
    genes_per_cell
        (n,) int32: genes with a non-zero count.
    batch_n
        (n,) int32 batch of each cell.
    n_duplicates, n_unsorted
        Entries that were summed into another of the same cell and gene; rows or columns out of order.
    bytes_read, passes
        What the pass cost.
    source
        What it was computed from.
    """

    genes: np.ndarray
    batches: list[str]
    histograms: Histograms
    library_size: np.ndarray
    genes_per_cell: np.ndarray
    batch_n: np.ndarray
    n_duplicates: int = 0
    n_unsorted: int = 0
    bytes_read: int = 0
    passes: int = 1
    source: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def n_cells(self) -> int:
        """Cells."""
        return len(self.library_size)

    @property
    def n_genes(self) -> int:
        """Genes."""
        return len(self.genes)


@dataclass
class _Worker:
    """One thread's accumulators."""

    hist: np.ndarray
    state: np.ndarray
    over_key: np.ndarray
    over_value: np.ndarray
    overflow: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    loose: int = 0
    scratch: dict[str, np.ndarray] = field(default_factory=dict)
    columns: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)  # CSC: gene, widths, bins
    library_size: np.ndarray | None = None
    genes_per_cell: np.ndarray | None = None
    n_duplicates: int = 0
    n_unsorted: int = 0

    def room(self, n: int) -> None:
        """Give the overflow list room for ``n`` entries."""
        if len(self.over_key) < n:
            self.drain()
            self.over_key = np.empty(n, np.int64)
            self.over_value = np.empty(n, np.int64)

    def drain(self) -> None:
        """Empty the overflow list into ``overflow``, adding up equal entries now and then."""
        n = int(self.state[3])
        if n:
            self.overflow.append((self.over_key[:n].copy(), self.over_value[:n].copy(), np.ones(n, np.int64)))
            self.loose += n
            self.state[3] = 0
        if self.loose > _COMPRESS_ABOVE:
            key, value, count = (np.concatenate(p) for p in zip(*self.overflow, strict=True))
            order = np.lexsort((value, key))
            key, value, count = key[order], value[order], count[order]
            new = np.flatnonzero(np.r_[True, (np.diff(key) != 0) | (np.diff(value) != 0)])
            self.overflow = [(key[new], value[new], np.add.reduceat(count, new))]
            self.loose = 0

    def get_scratch(self, name: str, n: int, dtype: type, *, zero: bool = False) -> np.ndarray:
        """Return a scratch array of at least ``n`` entries that keeps its content between calls."""
        have = self.scratch.get(name)
        if have is None or len(have) < n:
            have = self.scratch[name] = np.zeros(n, dtype) if zero else np.empty(n, dtype)
        return have


def raise_violation(dataset: Dataset, chunk: Chunk, state: np.ndarray) -> None:
    """Raise the error that a kernel's ``state`` tells of, with cell, gene and value.

    Raises
    ------
    NotCountsError
        For values that are not whole numbers.
    DataError
        For everything else.
    """
    from vcelltools.kernels import histogram as h

    status, major, at = int(state[0]), int(state[1]), int(state[2])
    where = dataset.matrix.where
    if status == h.BAD_INDEX:
        assert isinstance(chunk, CsrChunk | CscChunk)
        csr = isinstance(chunk, CsrChunk)
        index = int(chunk.indices[at])
        said = (
            f"cell {chunk.start + major:,} points at column {index:,}; there are {dataset.n_genes:,} genes"
            if csr
            else f"gene {major:,} points at row {index:,}; there are {dataset.n_cells:,} cells"
        )
        raise DataError(
            f"{where}/indices: {said}",
            hint="the file is damaged; write it again",
        )
    if isinstance(chunk, CsrChunk):
        cell, gene, value = chunk.start + major, int(chunk.indices[at]), chunk.data[at]
    elif isinstance(chunk, CscChunk):
        cell, gene, value = int(chunk.indices[at]), major, chunk.data[at]
    else:
        cell, gene, value = chunk.row_start + major, chunk.col_start + at, chunk.block[major, at]
    place = f"{where}: cell {cell:,} ({dataset.obs.index[cell]}), gene {gene:,} ({dataset.var.index[gene]})"
    if status == h.NOT_WHOLE:
        raise NotCountsError(
            f"{place} holds {float(value):.6g}, not a whole number: this is not a matrix of counts",
            hint="name the counts with --layer or --modality",
        )
    if status == h.NEGATIVE:
        raise DataError(f"{place} holds {value}: counts cannot be negative", hint="name the counts with --layer")
    if status == h.TOO_LARGE:
        raise DataError(f"{place} holds {float(value):.6g}: counts above {h.MAX_COUNT:,} are refused")
    raise DataError(f"{place} holds {value}", hint="repair the matrix: every value must be finite")


def _sample_widths(matrix: CsrMatrix | DenseMatrix) -> np.ndarray:
    """Return (g,) bins a gene: the power of two above twice the largest count in a few small ranges of rows."""
    g = matrix.n_genes
    top = np.zeros(g, np.int64)
    n = matrix.n_cells
    per_row = max(1, (matrix.nnz or 0) // n if isinstance(matrix, CsrMatrix) else g)
    rows = max(1, min(n, (1 << 16) // per_row + 1))
    starts = np.unique(np.linspace(0, n - rows, 8).astype(np.int64))
    for a in starts:
        for span in matrix.plan(start=int(a), stop=int(a) + rows):
            chunk = matrix.read(span)
            if isinstance(chunk, CsrChunk):
                data = chunk.data
                ok = (data > 0) & (data < MAX_WIDTH) & (chunk.indices >= 0) & (chunk.indices < g)
                np.maximum.at(top, chunk.indices[ok], data[ok].astype(np.int64))
            else:
                block = np.where((chunk.block > 0) & (chunk.block < MAX_WIDTH), chunk.block, 0)
                np.maximum(top, block.max(axis=0).astype(np.int64), out=top)
    return 1 << np.clip(np.ceil(np.log2(2 * (top + 1))).astype(np.int64), 2, 12)


def _check_n_cells(n_cells: int) -> None:
    if n_cells > np.iinfo(np.int32).max:
        raise DataError(f"{n_cells:,} cells: at most {np.iinfo(np.int32).max:,} are supported in one file")


def get_batches(dataset: Dataset, batch_key: str | None) -> tuple[list[str], np.ndarray]:
    """Return (labels sorted, (n,) int32 code of each cell) of an obs column, or one batch without a name.

    Raises
    ------
    DataError
        When the column is missing or some cells have no label.
    """
    if batch_key is None:
        return [""], np.zeros(dataset.n_cells, np.int32)
    codes, labels = dataset.obs.column(batch_key).factorize()
    missing = int(np.count_nonzero(codes < 0))
    if missing:
        first = int(np.flatnonzero(codes < 0)[0])
        raise DataError(
            f"{dataset.label}: obs column {batch_key!r} is empty for {missing:,} cells (the first is cell {first:,})",
            hint="fill the column, or leave these cells out with vcelltools sample",
        )
    return labels, codes.astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class PassLayout:
    """How a matrix is passed over: spans, bins a gene, how many batches a pass, how many passes."""

    spans: list[Span]
    widths: np.ndarray
    batches_per_pass: int
    passes: int
    histogram_bytes: int


def get_layout_of_pass(matrix: Matrix, n_batches: int, threads: int, max_values: int | None = None) -> PassLayout:
    """Choose spans and bins, and split the batches over passes so that histograms stay within the budget."""
    if isinstance(matrix, CscMatrix):
        widths = np.full(matrix.n_genes, MIN_WIDTH, np.int64)
        per_batch = matrix.n_genes * 8 * 4
    elif isinstance(matrix, DenseMatrix) and matrix.axis == 1:
        widths = np.full(matrix.n_genes, DENSE_COLUMN_WIDTH, np.int64)
        per_batch = int(widths.sum()) * 4
    else:
        widths = _sample_widths(matrix)
        per_batch = int(widths.sum()) * 4
    group = min(n_batches, max(1, int(HISTOGRAM_BUDGET // max(per_batch * threads, 1))))
    return PassLayout(
        spans=_plan(matrix, n_batches, threads, max_values),
        widths=widths,
        batches_per_pass=group,
        passes=-(-n_batches // group),
        histogram_bytes=group * per_batch,
    )


def scan_spans(dataset: Dataset, spans: list[Span], *, threads: int | None = None) -> None:
    """Count these spans alone and forget the result: a probe of the speed."""
    n_threads = get_threads(threads)
    widths = get_layout_of_pass(dataset.matrix, 1, n_threads).widths
    _one_pass(dataset, np.zeros(dataset.n_cells, np.int32), 1, widths, spans, n_threads, SILENT, partial=True)


def scan(
    dataset: Dataset,
    *,
    batch_key: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    phase: str = "reading",
    max_values: int | None = None,
) -> Statistics:
    """Read the whole matrix once (more often where many batches exceed the memory budget) and count.

    Parameters
    ----------
    dataset
        An open data set of counts.
    batch_key
        An obs column; statistics are kept per label.
    threads
        Worker threads.
    max_values
        Values read at once and thread; chosen by default. The result does not depend on it.

    Raises
    ------
    NotCountsError, DataError
        At the first value or index that is not acceptable, with its cell and gene.
    """
    _check_n_cells(dataset.n_cells)
    labels, batch_n = get_batches(dataset, batch_key)
    n_threads = get_threads(threads)
    n_batches = len(labels)
    layout = get_layout_of_pass(dataset.matrix, n_batches, n_threads, max_values)
    group, spans, widths = layout.batches_per_pass, layout.spans, layout.widths
    total = sum(s.n_bytes for s in spans)
    progress.start(phase, total * layout.passes, "bytes")
    parts = []
    outs: list[_Pass] = []
    for first in range(0, n_batches, group):
        here = min(group, n_batches - first)
        codes = np.where((batch_n >= first) & (batch_n < first + here), batch_n - first, -1).astype(np.int32)
        out = _one_pass(dataset, codes, here, widths, spans, n_threads, progress)
        outs.append(out)
        parts.append(out.histograms)
    progress.finish()
    last = outs[-1]
    return Statistics(
        genes=dataset.var.index,
        batches=labels,
        histograms=parts[0] if len(parts) == 1 else stack_batches(parts),
        library_size=last.library_size,
        genes_per_cell=last.genes_per_cell.astype(np.int32),
        batch_n=batch_n,
        n_duplicates=last.n_duplicates,
        n_unsorted=last.n_unsorted,
        bytes_read=total * layout.passes,
        passes=layout.passes,
        source=describe_source(dataset),
        warnings=_get_warnings(dataset, last),
        notes=_get_notes(dataset, last, parts),
    )


def _get_warnings(dataset: Dataset, last: _Pass) -> tuple[str, ...]:
    out = []
    if last.n_duplicates:
        out.append(f"{last.n_duplicates:,} entries with a cell and gene that occurs twice were summed")
    names = dataset.var.index
    n_twice = len(names) - len(set(names.tolist()))
    if n_twice:
        out.append(f"{n_twice:,} gene names occur more than once; genes are told apart by position")
    return tuple(out)


def _get_notes(dataset: Dataset, last: _Pass, parts: list[Histograms]) -> tuple[str, ...]:
    out = []
    empty = int(np.count_nonzero(last.library_size == 0))
    if empty:
        out.append(f"{empty:,} cells have no counts")
    silent = np.ones(dataset.n_genes, bool)
    for part in parts:
        for k in range(part.n_batches):
            silent &= part.expressing(k) == 0
    if silent.any():
        out.append(f"{int(silent.sum()):,} genes have no counts")
    return tuple(out)


def describe_source(dataset: Dataset) -> dict[str, Any]:
    """Return what identifies the source: path, size, modification time, modality, layer, shape."""
    out: dict[str, Any] = {
        "path": dataset.label,
        "kind": dataset.kind,
        "modality": dataset.modality,
        "layer": dataset.layer,
        "n_cells": dataset.n_cells,
        "n_genes": dataset.n_genes,
        "layout": dataset.matrix.layout,
    }
    if dataset.path is not None and dataset.path.is_file():
        info = dataset.path.stat()
        out |= {"path": str(dataset.path.resolve()), "size": info.st_size, "mtime_ns": info.st_mtime_ns}
    return out


def _plan(matrix: Matrix, n_batches: int, threads: int, max_values: int | None) -> list[Span]:
    """Spans of about half a million values; of eight million where rows are visited batch by batch."""
    if max_values is not None:
        return matrix.plan(max_values=max_values)
    values = matrix.nnz if matrix.nnz is not None else matrix.shape[0] * matrix.shape[1]
    most = 1 << 19
    if n_batches > 1 and isinstance(matrix, CsrMatrix):
        wide = matrix.chunk_dtype.itemsize + matrix.index_dtype.itemsize > 8
        most = 1 << 22 if wide else 1 << 23
    even = max(1 << 15, -(-int(values) // (4 * threads)))  # small files still occupy every thread
    return matrix.plan(max_values=min(most, even))


@dataclass(kw_only=True)
class _Pass:
    histograms: Histograms
    library_size: np.ndarray
    genes_per_cell: np.ndarray
    n_duplicates: int
    n_unsorted: int


def _one_pass(
    dataset: Dataset,
    batch_n: np.ndarray,
    n_batches: int,
    widths: np.ndarray,
    spans: list[Span],
    threads: int,
    progress: Progress,
    *,
    partial: bool = False,
) -> _Pass:
    matrix = dataset.matrix
    n, g = matrix.shape
    offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
    columns = isinstance(matrix, CscMatrix)
    by_column = columns or (isinstance(matrix, DenseMatrix) and matrix.axis == 1)
    library_size = np.zeros(n, np.int64)
    genes_per_cell = np.zeros(n, np.int64)

    def make_worker() -> _Worker:
        w = _Worker(
            hist=np.zeros(0 if columns else n_batches * int(offsets[-1]), np.int32),
            state=np.zeros(7, np.int64),
            over_key=np.empty(_OVERFLOW_ROOM, np.int64),
            over_value=np.empty(_OVERFLOW_ROOM, np.int64),
        )
        if by_column:
            w.library_size = np.zeros(n, np.int64)
            w.genes_per_cell = np.zeros(n, np.int32 if columns else np.int64)
        return w

    def visit(w: _Worker, chunk: object, span: Span) -> None:
        if isinstance(chunk, CsrChunk):
            _visit_csr(dataset, w, chunk, batch_n, n_batches, offsets, library_size, genes_per_cell)
        elif isinstance(chunk, CscChunk):
            _visit_csc(dataset, w, chunk, batch_n, n_batches, g)
        elif isinstance(chunk, DenseChunk):
            _visit_dense(dataset, w, chunk, batch_n, offsets, library_size, genes_per_cell, g)

    workers = run_spans(matrix, spans, make_worker, visit, threads=threads, progress=progress)
    for w in workers:
        w.drain()
        w.n_duplicates, w.n_unsorted = int(w.state[4]), int(w.state[5])
        if by_column:
            assert w.library_size is not None and w.genes_per_cell is not None
            library_size += w.library_size
            genes_per_cell += w.genes_per_cell
    n_cells_k = np.bincount(batch_n[batch_n >= 0], minlength=n_batches)
    overflow = [o for w in workers for o in w.overflow]
    if columns:
        offsets, counts = _join_columns([] if partial else [c for w in workers for c in w.columns], g, n_batches)
    else:
        offsets = offsets.astype(np.int64)
        counts = workers[0].hist.astype(np.int64)
        for w in workers[1:]:
            counts += w.hist
        counts = counts.reshape(n_batches, -1)
    counts[:, offsets[:-1]] = 0  # explicit zeros say nothing that the number of cells does not
    single = not columns and matrix.dtype.newbyteorder("=") == np.float32  # scanpy squares CSC in float64
    return _Pass(
        histograms=make_histograms(offsets, counts, n_cells_k, overflow, single=single),
        library_size=library_size,
        genes_per_cell=genes_per_cell,
        n_duplicates=sum(w.n_duplicates for w in workers),
        n_unsorted=sum(w.n_unsorted for w in workers),
    )


def _visit_csr(
    dataset: Dataset,
    w: _Worker,
    chunk: CsrChunk,
    batch_n: np.ndarray,
    n_batches: int,
    offsets: np.ndarray,
    library_size: np.ndarray,
    genes_per_cell: np.ndarray,
) -> None:
    from vcelltools.kernels.histogram import csr_histogram

    a, b = chunk.start, chunk.start + chunk.n_rows
    batch = batch_n[a:b].astype(np.int64)
    order = np.argsort(batch, kind="stable") if n_batches > 1 else np.arange(b - a)
    longest = int(np.diff(chunk.indptr).max(initial=0))
    w.room(longest)
    args = (
        chunk.indptr,
        chunk.indices,
        chunk.data,
        order,
        batch,
        offsets,
        w.hist,
        w.get_scratch("last", chunk.n_genes, np.int64, zero=True),
        w.get_scratch("slot", chunk.n_genes, np.int64),
        w.get_scratch("index", longest, np.int64),
        w.get_scratch("value", longest, np.float64),
        w.get_scratch("count", longest, np.int32),
    )
    done = 0
    while True:
        done = csr_histogram(*args, w.over_key, w.over_value, library_size[a:b], genes_per_cell[a:b], done, w.state)
        if w.state[0]:
            raise_violation(dataset, chunk, w.state)
        if done == len(order):
            return
        w.drain()


def _visit_csc(
    dataset: Dataset, w: _Worker, chunk: CscChunk, batch_n: np.ndarray, n_batches: int, n_genes: int
) -> None:
    from vcelltools.kernels.histogram import BLOCK, csc_histogram

    assert w.library_size is not None and w.genes_per_cell is not None
    longest = int(np.diff(chunk.indptr).max(initial=0))
    w.room(longest)
    batches = np.zeros(0, np.int32) if n_batches == 1 and not (batch_n < 0).any() else batch_n
    step = max(1, (1 << 22) // (n_batches * CSC_WIDTH))
    nothing = np.zeros(0, np.int64)
    last = slot = index = nothing
    value = np.zeros(0, np.float64)
    if "last" in w.scratch:
        last, slot = w.scratch["last"], w.scratch["slot"]
        index = w.get_scratch("index", longest, np.int64)
        value = w.get_scratch("value", longest, np.float64)
    for c0 in range(0, chunk.n_cols, step):
        c1 = min(c0 + step, chunk.n_cols)
        bins = w.get_scratch("bins", step * n_batches * CSC_WIDTH, np.int32)[: (c1 - c0) * n_batches * CSC_WIDTH]
        bins = bins.reshape(c1 - c0, n_batches, CSC_WIDTH)
        bins[...] = 0
        top = np.zeros(c1 - c0, np.int64)
        done = 0
        while done < c1 - c0:
            done = csc_histogram(
                chunk.indptr[c0 : c1 + 1],
                chunk.indices,
                chunk.data,
                chunk.start + c0,
                n_genes,
                batches,
                bins,
                last,
                slot,
                index,
                value,
                w.get_scratch("count", BLOCK, np.int32),
                w.over_key,
                w.over_value,
                top,
                w.library_size,
                w.genes_per_cell,
                done,
                w.state,
            )
            if w.state[0]:
                raise_violation(dataset, chunk, w.state)
            if w.state[5] < 0:  # the first column out of order: from now on duplicates are searched for
                w.state[5] = -1 - w.state[5]
                last = w.get_scratch("last", chunk.n_cells, np.int64, zero=True)
                slot = w.get_scratch("slot", chunk.n_cells, np.int64)
                index = w.get_scratch("index", longest, np.int64)
                value = w.get_scratch("value", longest, np.float64)
            elif done < c1 - c0:
                w.drain()
        width = top + 1
        keep = np.arange(CSC_WIDTH) < width[:, None]
        kept = bins.transpose(1, 0, 2)[:, keep]  # (k, sum of widths)
        w.columns.append((chunk.start + c0, width, kept))


def _join_columns(
    columns: list[tuple[int, np.ndarray, np.ndarray]], n_genes: int, n_batches: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put the columns' bins in gene order: (offsets, counts)."""
    columns = sorted(columns, key=lambda c: c[0])
    widths = np.concatenate([c[1] for c in columns]) if columns else np.ones(n_genes, np.int64)
    offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
    if not columns:
        return offsets, np.zeros((n_batches, n_genes), np.int64)
    return offsets, np.concatenate([c[2] for c in columns], axis=1).astype(np.int64)


def _visit_dense(
    dataset: Dataset,
    w: _Worker,
    chunk: DenseChunk,
    batch_n: np.ndarray,
    offsets: np.ndarray,
    library_size: np.ndarray,
    genes_per_cell: np.ndarray,
    n_genes: int,
) -> None:
    from vcelltools.kernels.histogram import dense_histogram

    a, b = chunk.row_start, chunk.row_start + len(chunk.block)
    library = library_size[a:b] if w.library_size is None else w.library_size[a:b]
    expressed = genes_per_cell[a:b] if w.genes_per_cell is None else w.genes_per_cell[a:b]
    w.room(chunk.block.shape[1])
    batch = batch_n[a:b].astype(np.int64)
    done = 0
    while True:
        done = dense_histogram(
            chunk.block,
            chunk.col_start,
            n_genes,
            batch,
            offsets,
            w.hist,
            w.get_scratch("count", chunk.block.shape[1], np.int32),
            w.get_scratch("at", chunk.block.shape[1] + 1, np.int32),
            w.over_key,
            w.over_value,
            library,
            expressed,
            done,
            w.state,
        )
        if w.state[0]:
            raise_violation(dataset, chunk, w.state)
        if done == b - a:
            return
        w.drain()


def merge(parts: list[Statistics]) -> Statistics:
    """Merge the statistics of row ranges of one data set, in order (same genes, same batch labels)."""
    first = parts[0]
    if any(p.batches != first.batches or not np.array_equal(p.genes, first.genes) for p in parts):
        raise DataError("statistics of different genes or batches cannot be merged")
    return Statistics(
        genes=first.genes,
        batches=first.batches,
        histograms=add([p.histograms for p in parts]),
        library_size=np.concatenate([p.library_size for p in parts]),
        genes_per_cell=np.concatenate([p.genes_per_cell for p in parts]),
        batch_n=np.concatenate([p.batch_n for p in parts]),
        n_duplicates=sum(p.n_duplicates for p in parts),
        n_unsorted=sum(p.n_unsorted for p in parts),
        bytes_read=sum(p.bytes_read for p in parts),
        passes=max(p.passes for p in parts),
        source=first.source,
        warnings=tuple(dict.fromkeys(w for p in parts for w in p.warnings)),
        notes=tuple(dict.fromkeys(w for p in parts for w in p.notes)),
    )


SCHEMA = 1
_ARRAYS = ("library_size", "genes_per_cell", "batch_n")
_HIST = ("offsets", "counts", "over_batch", "over_gene", "over_value", "over_count", "n_cells_k")


def save_statistics(stats: Statistics, dpath: str | os.PathLike, *, force: bool = False) -> Path:
    """Write the statistics to a folder, manifest last; a folder without a manifest does not count."""
    import hashlib

    from vcelltools import __version__
    from vcelltools.io.atomic import atomic_file, check_output, write_json

    d = Path(dpath)
    check_output(d / "manifest.json", force=force)
    arrays = {k: getattr(stats, k) for k in _ARRAYS} | {k: getattr(stats.histograms, k) for k in _HIST}
    arrays["genes"] = np.asarray(stats.genes.astype(str), dtype=np.str_)
    hashes = {}
    (d / "manifest.json").unlink(missing_ok=True)
    for name, values in arrays.items():
        with atomic_file(d / f"{name}.npy", force=True) as tmp, open(tmp, "wb") as f:
            np.save(f, values, allow_pickle=False)
        hashes[name] = hashlib.sha256((d / f"{name}.npy").read_bytes()).hexdigest()
    body = {
        "schema": SCHEMA,
        "kind": "gene statistics",
        "version": __version__,
        "source": stats.source,
        "batches": stats.batches,
        "single": stats.histograms.single,
        "n_duplicates": stats.n_duplicates,
        "n_unsorted": stats.n_unsorted,
        "bytes_read": stats.bytes_read,
        "passes": stats.passes,
        "warnings": list(stats.warnings),
        "notes": list(stats.notes),
        "sha256": hashes,
    }
    return write_json(d / "manifest.json", body, force=True)


def load_statistics(dpath: str | os.PathLike) -> Statistics:
    """Read statistics that :func:`save_statistics` wrote, hashes checked.

    Raises
    ------
    DataError
        When the folder is not one, is of another schema, or an array's hash is wrong.
    """
    import hashlib
    import io
    import json

    d = Path(dpath)
    try:
        body = json.loads((d / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(
            f"{d}: holds no gene statistics ({e})", hint="vcelltools hvg FILE --stats DIR writes them"
        ) from e
    if body.get("schema") != SCHEMA or body.get("kind") != "gene statistics":
        raise DataError(f"{d}: gene statistics of schema {body.get('schema')!r}; {SCHEMA} expected")
    arrays = {}
    for name in (*_ARRAYS, *_HIST, "genes"):
        fpath = d / f"{name}.npy"
        try:
            raw = fpath.read_bytes()
            if hashlib.sha256(raw).hexdigest() != body["sha256"].get(name):
                raise DataError(f"{fpath}: damaged (its hash differs from the manifest's)", hint="delete the folder")
            arrays[name] = np.load(io.BytesIO(raw), allow_pickle=False)
        except VcellError:
            raise
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f"{fpath}: cannot be read ({e})", hint="delete the folder") from e
    return Statistics(
        genes=arrays["genes"].astype(object),
        batches=list(body["batches"]),
        histograms=Histograms(**{k: arrays[k] for k in _HIST}, single=body["single"]),
        **{k: arrays[k] for k in _ARRAYS},
        n_duplicates=body["n_duplicates"],
        n_unsorted=body["n_unsorted"],
        bytes_read=body["bytes_read"],
        passes=body["passes"],
        source=body["source"],
        warnings=tuple(body["warnings"]),
        notes=tuple(body["notes"]),
    )
