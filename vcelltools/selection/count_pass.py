"""Count a matrix in one pass, in threads."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vcelltools.io.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.io.dataset import Dataset
from vcelltools.io.faults import raise_fault
from vcelltools.io.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix, Span
from vcelltools.io.stream import run_spans
from vcelltools.kernels.faults import FAULT, N_DUPLICATES, N_OVER, N_UNSORTED, POSITION, STATE_SIZE
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.selection.histograms import Histograms, make_histograms

MAX_WIDTH = 4096
MIN_WIDTH = 4
CSC_WIDTH = 1024
DENSE_COLUMN_WIDTH = 64
# Limit on the histograms of all threads; batches that do not fit take another pass over the file.
HISTOGRAM_BUDGET = 192 << 20
_OVERFLOW_ROOM = 1 << 16
_COMPRESS_ABOVE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PassLayout:
    """The plan of the passes over a matrix: spans, bins per gene, batches per pass, number of passes."""

    spans: list[Span]
    widths: np.ndarray
    batches_per_pass: int
    passes: int
    histogram_bytes: int


def get_layout_of_pass(matrix: Matrix, n_batches: int, threads: int, max_values: int | None = None) -> PassLayout:
    """Choose spans and bins, and divide the batches into passes so that histograms stay within the budget."""
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


def _sample_widths(matrix: CsrMatrix | DenseMatrix) -> np.ndarray:
    """Return (g,) bins per gene: the power of two above twice the largest count in a few small ranges of rows."""
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


def _plan(matrix: Matrix, n_batches: int, threads: int, max_values: int | None) -> list[Span]:
    """Return the span length: half a million values, which stay in cache, or eight million with several batches."""
    if max_values is not None:
        return matrix.plan(max_values=max_values)
    values = matrix.nnz if matrix.nnz is not None else matrix.shape[0] * matrix.shape[1]
    most = 1 << 19
    if n_batches > 1 and isinstance(matrix, CsrMatrix):
        wide = matrix.chunk_dtype.itemsize + matrix.index_dtype.itemsize > 8
        most = 1 << 22 if wide else 1 << 23
    even = max(1 << 15, -(-int(values) // (4 * threads)))  # use every thread for small files too
    return matrix.plan(max_values=min(most, even))


def scan_spans(dataset: Dataset, spans: list[Span], *, threads: int | None = None) -> None:
    """Count only these spans and discard the result, to measure the speed."""
    n_threads = get_threads(threads)
    widths = get_layout_of_pass(dataset.matrix, 1, n_threads).widths
    count_spans(dataset, np.zeros(dataset.n_cells, np.int32), 1, widths, spans, n_threads, SILENT, partial=True)


@dataclass(kw_only=True)
class Pass:
    """The counts of a pass, as in :class:`vcelltools.selection.statistics.Statistics`."""

    histograms: Histograms
    library_size: np.ndarray
    genes_per_cell: np.ndarray
    n_duplicates: int
    n_unsorted: int


def count_spans(
    dataset: Dataset,
    batch_n: np.ndarray,
    n_batches: int,
    widths: np.ndarray,
    spans: list[Span],
    threads: int,
    progress: Progress,
    *,
    partial: bool = False,
    genes: tuple[int, int] | None = None,
) -> Pass:
    """Count the cells of the batches 0 … ``n_batches`` − 1 in some spans of the matrix.

    Parameters
    ----------
    batch_n
        (n,) int32 batch of each cell; cells of batch −1 are excluded from the histograms.
    widths
        (g,) int64 bins per gene, from :func:`get_layout_of_pass`; a CSC matrix determines its own.
    partial
        Whether the spans cover only a part of the matrix; counts of CSC columns are then dropped.
    genes
        The range of genes that the spans of a CSC matrix cover; the others get empty histograms.

    Raises
    ------
    NotCountsError, DataError
        If a value or index is invalid; the message names its cell and gene.
    """
    matrix = dataset.matrix
    n, g = matrix.shape
    offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
    columns = isinstance(matrix, CscMatrix)
    by_column = matrix.by_gene
    library_size = np.zeros(n, np.int64)
    genes_per_cell = np.zeros(n, np.int64)

    def make_worker() -> _Worker:
        w = _Worker(
            hist=np.zeros(0 if columns else n_batches * int(offsets[-1]), np.int32),
            state=np.zeros(STATE_SIZE, np.int64),
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
        w.n_duplicates, w.n_unsorted = int(w.state[N_DUPLICATES]), int(w.state[N_UNSORTED])
        if by_column:
            assert w.library_size is not None and w.genes_per_cell is not None
            library_size += w.library_size
            genes_per_cell += w.genes_per_cell
    n_cells_k = np.bincount(batch_n[batch_n >= 0], minlength=n_batches)
    overflow = [o for w in workers for o in w.overflow]
    if columns:
        found = [c for w in workers for c in w.columns]
        if genes is not None:
            gaps = ((0, genes[0]), (genes[1], g))
            found += [(a, np.ones(b - a, np.int64), np.zeros((n_batches, b - a), np.int32)) for a, b in gaps if b > a]
        offsets, counts = _join_columns([] if partial and genes is None else found, g, n_batches)
    else:
        offsets = offsets.astype(np.int64)
        counts = workers[0].hist.astype(np.int64)
        for w in workers[1:]:
            counts += w.hist
        counts = counts.reshape(n_batches, -1)
    counts[:, offsets[:-1]] = 0  # explicit zeros add no information to the number of cells
    single = not columns and matrix.dtype.newbyteorder("=") == np.float32  # scanpy squares CSC in float64
    return Pass(
        histograms=make_histograms(offsets, counts, n_cells_k, overflow, single=single),
        library_size=library_size,
        genes_per_cell=genes_per_cell,
        n_duplicates=sum(w.n_duplicates for w in workers),
        n_unsorted=sum(w.n_unsorted for w in workers),
    )


@dataclass
class _Worker:
    """The accumulators of one thread."""

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
        """Make space for ``n`` entries in the overflow list."""
        if len(self.over_key) < n:
            self.drain()
            self.over_key = np.empty(n, np.int64)
            self.over_value = np.empty(n, np.int64)

    def drain(self) -> None:
        """Move the overflow list to ``overflow``, and sum equal entries from time to time."""
        n = int(self.state[N_OVER])
        if n:
            self.overflow.append((self.over_key[:n].copy(), self.over_value[:n].copy(), np.ones(n, np.int64)))
            self.loose += n
            self.state[N_OVER] = 0
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
        if w.state[FAULT]:
            raise_fault(int(w.state[FAULT]), chunk, int(w.state[POSITION]), dataset)
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
            if w.state[FAULT]:
                raise_fault(int(w.state[FAULT]), chunk, int(w.state[POSITION]), dataset)
            if w.state[N_UNSORTED] < 0:  # the first column out of order: search for duplicates from here on
                w.state[N_UNSORTED] = -1 - w.state[N_UNSORTED]
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
    """Return the bins of the columns in gene order, as (offsets, counts)."""
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
        if w.state[FAULT]:
            raise_fault(int(w.state[FAULT]), chunk, int(w.state[POSITION]), dataset)
        if done == b - a:
            return
        w.drain()
