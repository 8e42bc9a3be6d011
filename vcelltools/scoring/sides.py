"""One side of a scoring: a file of cells reduced to groups × genes, in one pass and bounded memory.

The rules of reading are cell-eval's: a matrix with a fractional part above 1e-3 anywhere is log1p-normalised
(and must lie within [0, 15)); any other is counts, scaled to the file's own median library size and log1p'd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vcelltools.chunks import CscChunk, CsrChunk, DenseChunk
from vcelltools.errors import DataError
from vcelltools.io import CscMatrix, Dataset, DenseMatrix
from vcelltools.io.matrix import Matrix, Span
from vcelltools.io.table import Column
from vcelltools.kernels.scan import NOT_FINITE, csc_row_sums, csr_row_sums, scan_values
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.genebuckets import MAX_GROUPS, GeneBuckets, RankSums
from vcelltools.scoring.pairwise import make_plan
from vcelltools.stream import get_threads, plan_blocks, run_spans

FRACTION = 1e-3
LOG1P_LIMIT = 15.0


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The perturbation label of every cell.

    Attributes
    ----------
    labels
        Sorted as text, the control among them.
    codes
        (n,) int32 positions in ``labels``; -1 where the label is missing.
    order
        The labels in the order of the column's categories (text order where it is not categorical).
    appearance
        The labels in the order in which the cells come.
    n_missing
        Cells without a label; they are left out.
    """

    labels: tuple[str, ...]
    codes: np.ndarray
    order: tuple[str, ...]
    appearance: tuple[str, ...]
    n_missing: int


def read_cells(dataset: Dataset, pert_col: str, control: str | None) -> Cells:
    """Read the labels; a :class:`DataError` with a census where ``control`` is not among them."""
    column = dataset.obs.column(pert_col)
    codes, levels = column.factorize()
    names = [str(v) for v in levels]
    present = set(names)
    if column.codes is not None and column.categories is not None:
        order = [str(c) for c in _category_labels(column) if str(c) in present]
    else:
        order = names
    labels = sorted(names)
    position = {v: i for i, v in enumerate(labels)}
    lookup = np.array([position[v] for v in names] + [-1], np.int32)
    codes = np.ascontiguousarray(lookup[codes])
    _, first = np.unique(codes[codes >= 0], return_index=True)
    cells = Cells(
        labels=tuple(labels),
        codes=codes,
        order=tuple(order),
        appearance=tuple(labels[i] for i in np.argsort(first)),
        n_missing=int(np.count_nonzero(codes < 0)),
    )
    if control is not None and control not in position:
        raise DataError(
            f"{dataset.label}: no cell of obs/{pert_col} is labelled {control!r}, the control",
            hint=f"--control, one of: {census(cells)}",
        )
    return cells


def _category_labels(column: Column) -> list[str]:
    whole = Column(name=column.name, codes=np.arange(len(column.categories)), categories=column.categories)  # type: ignore[arg-type]
    return [str(v) for v in whole.labels()]


def census(cells: Cells, limit: int = 12) -> str:
    """Return the most frequent labels with their numbers of cells."""
    counts = np.bincount(cells.codes[cells.codes >= 0], minlength=len(cells.labels))
    order = np.argsort(-counts, kind="stable")[:limit]
    more = len(cells.labels) - len(order)
    text = ", ".join(f"{cells.labels[i]} ({counts[i]:,})" for i in order)
    return f"{text}{f' and {more:,} more' if more > 0 else ''}" or "no labels"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the values of a matrix are.

    Attributes
    ----------
    kind
        ``"log1p"`` or ``"counts"``.
    library_n
        (n,) float64 total of each cell in natural units, where it was needed.
    """

    kind: str
    library_n: np.ndarray | None = None

    @property
    def empty(self) -> bool:
        """Whether no value is above zero: counts and log1p alike."""
        return self.library_n is not None and not self.library_n.any()


def name_value(dataset: Dataset, cell: int, gene: int) -> str:
    """Return ``cell 'c', gene 'g'`` for a message."""
    return f"cell {dataset.obs.index[cell]!r} (row {cell:,}), gene {dataset.var.index[gene]!r} (column {gene:,})"


def _locate(chunk: object, position: int) -> tuple[int, int]:
    if isinstance(chunk, DenseChunk):
        i, j = divmod(position, chunk.block.shape[1])
        return chunk.row_start + i, chunk.col_start + j
    assert isinstance(chunk, CsrChunk | CscChunk)
    major = chunk.start + int(np.searchsorted(chunk.indptr, position, side="right")) - 1
    minor = int(chunk.indices[position])
    return (major, minor) if isinstance(chunk, CsrChunk) else (minor, major)


def _widen(transform: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    return lambda chunk: transform(chunk).astype(np.float64, copy=False)


def _flat(chunk: Any) -> np.ndarray:
    return chunk.block.reshape(-1) if isinstance(chunk, DenseChunk) else chunk.data


def _refuse(dataset: Dataset, chunk: object, position: int, what: str) -> DataError:
    try:
        where = name_value(dataset, *_locate(chunk, position))
    except IndexError:
        where = f"stored value {position:,} of a chunk"
    value = _flat(chunk)[position] if what != "index" else chunk.indices[position]  # type: ignore[attr-defined]
    text = {
        "negative": f"the value {value} is negative",
        "not finite": f"the value is {value}",
        "index": f"the index {value} is out of range",
    }[what]
    return DataError(f"{dataset.label}: {text} at {where}", hint="expression is counts or log1p of them")


def find_scale(
    dataset: Dataset, *, with_library: bool = False, threads: int | None = None, progress: Progress = SILENT
) -> Scale:
    """Decide between counts and log1p, reading no more than it takes; library sizes come along for counts.

    Raises
    ------
    DataError
        For a negative or non-finite value, with its cell and gene.
    """
    matrix = dataset.matrix
    spans = plan_blocks(matrix)
    found: list[Scale] = []

    def look(_: None, chunk: object, span: Span) -> None:
        status, position, fraction = scan_values(_flat(chunk), FRACTION)
        if status:
            raise _refuse(dataset, chunk, int(position), "not finite" if status == NOT_FINITE else "negative")
        if fraction:
            found.append(Scale(kind="log1p"))

    # nearly every log1p file shows a fraction in its first few values
    extent = matrix.shape[1] if isinstance(matrix, CscMatrix) or getattr(matrix, "axis", 0) == 1 else matrix.shape[0]
    head = matrix.plan(max_values=4096, stop=min(extent, 64))[:1]
    run_spans(matrix, head, lambda: None, look, threads=1)
    if found and not with_library:
        return found[0]
    library_n = np.zeros(matrix.shape[0])
    natural = bool(found)

    def add(partial_n: np.ndarray, chunk: object, span: Span) -> None:
        look(None, chunk, span)
        _add_row_sums(dataset, chunk, natural, partial_n)

    if isinstance(matrix, CscMatrix):
        states = run_spans(matrix, spans, lambda: np.zeros(matrix.shape[0]), add, threads=threads, progress=progress)
        for s in states:
            library_n += s
    else:
        run_spans(matrix, spans, lambda: library_n, add, threads=threads, progress=progress)
    if found and not natural:  # the first fraction came late
        return find_scale_natural(dataset, threads) if with_library else found[0]
    return Scale(kind="log1p" if natural else "counts", library_n=library_n)


def find_scale_natural(dataset: Dataset, threads: int | None) -> Scale:
    """Return the natural library sizes of a log1p matrix."""
    library_n = np.zeros(dataset.n_cells)

    def add(partial_n: np.ndarray, chunk: object, span: Span) -> None:
        _add_row_sums(dataset, chunk, True, partial_n)

    serial = 1 if isinstance(dataset.matrix, CscMatrix) else threads
    run_spans(dataset.matrix, plan_blocks(dataset.matrix), lambda: library_n, add, threads=serial)
    return Scale(kind="log1p", library_n=library_n)


def _add_row_sums(dataset: Dataset, chunk: object, natural: bool, library_n: np.ndarray) -> None:
    if isinstance(chunk, CsrChunk):
        csr_row_sums(chunk.indptr, chunk.data, natural, library_n[chunk.start : chunk.start + chunk.n_rows])
    elif isinstance(chunk, CscChunk):
        if not csc_row_sums(chunk.indices, chunk.data, natural, library_n):
            bad = int(np.flatnonzero((chunk.indices < 0) | (chunk.indices >= len(library_n)))[0])
            raise _refuse(dataset, chunk, bad, "index")
    else:
        assert isinstance(chunk, DenseChunk)
        block = chunk.block.astype(np.float64)
        rows = slice(chunk.row_start, chunk.row_start + len(block))
        library_n[rows] += (np.expm1(block) if natural else block).sum(axis=1)


Transform = Callable[[object], np.ndarray]


def make_transform(
    matrix: Matrix, scale: Scale, *, raw: bool = False, cp10k: bool = False, wide: bool = False
) -> Transform:
    """Return the function that turns a chunk's values into what is scored.

    Parameters
    ----------
    raw
        Leave counts as they are.
    cp10k
        Bring counts and log1p alike to log1p of counts per ten thousand. Counts are divided by the cell's total
        before anything else: equal shares are equal numbers then, in any precision.
    wide
        Compute in float64.

    Notes
    -----
    Counts follow scanpy's ``normalize_total`` and ``log1p`` step for step in the matrix's own precision (integers
    in float32): equal values must stay equal, because ties decide ranks. scanpy's median leaves out empty
    cells of a dense matrix, and counts them in a sparse one.
    """
    kind = np.dtype(np.float64 if wide or matrix.chunk_dtype == np.float64 else np.float32)
    if raw or scale.empty or (scale.kind == "log1p" and not cp10k):
        if matrix.chunk_dtype.kind == "f":
            return _flat
        return lambda chunk: _flat(chunk).astype(np.float64)
    assert scale.library_n is not None
    library_n = scale.library_n.astype(kind)
    if cp10k:
        factor_n = library_n
    else:
        used = library_n[library_n > 0] if isinstance(matrix, DenseMatrix) else library_n
        median = np.median(used) if len(used) else kind.type(1)
        if not median > 0:
            raise DataError(
                f"{matrix.where}: more than half of the cells are empty, so the median library size is zero",
                hint="remove the empty cells, or pass log1p values",
            )
        factor_n = library_n / median
    factor_n[factor_n == 0] = 1
    undo = scale.kind == "log1p"

    def transform(chunk: object) -> np.ndarray:
        values = _flat(chunk).astype(kind)  # a copy: the chunk's buffer is not ours
        if undo:
            np.expm1(values, out=values)
        if isinstance(chunk, CsrChunk):
            rows = factor_n[chunk.start : chunk.start + chunk.n_rows]
            values /= np.repeat(rows, np.diff(chunk.indptr))
        elif isinstance(chunk, CscChunk):
            values /= factor_n[chunk.indices]
        else:
            assert isinstance(chunk, DenseChunk)
            b, w = chunk.block.shape
            values = values.reshape(b, w)
            values /= factor_n[chunk.row_start : chunk.row_start + b, None]
            values = values.reshape(-1)
        if cp10k:
            values *= kind.type(1e4)
        return np.log1p(values, out=values)

    return transform


def _merge_duplicates(chunk: CsrChunk | CscChunk, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return (indptr, indices, data, n_merged) with duplicate entries summed, as scipy's canonical form has them."""
    n_major = len(chunk.indptr) - 1
    major = np.repeat(np.arange(n_major), np.diff(chunk.indptr))
    order = np.lexsort((chunk.indices, major))
    rows, cols, vals = major[order], chunk.indices[order], data[order]
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:] != rows[:-1]) | (cols[1:] != cols[:-1])
    starts = np.flatnonzero(first)
    indptr = np.zeros(n_major + 1, np.int64)
    np.cumsum(np.bincount(rows[starts], minlength=n_major), out=indptr[1:])
    return indptr, np.ascontiguousarray(cols[starts]), np.add.reduceat(vals, starts), len(rows) - len(starts)


def get_capacity(matrix: Matrix) -> tuple[int, int]:
    """Return (values at most, blocks) that :func:`fill` will need for a matrix."""
    if isinstance(matrix, DenseMatrix):
        return matrix.shape[0] * matrix.shape[1], 1 if matrix.axis == 1 else len(plan_blocks(matrix))
    return matrix.nnz, 1 if isinstance(matrix, CscMatrix) else len(plan_blocks(matrix))


def fill(
    buckets: GeneBuckets,
    dataset: Dataset,
    codes: np.ndarray,
    transform: Transform,
    *,
    first_block: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> int:
    """Stream a matrix into the buckets; return how many duplicate entries were summed.

    Raises
    ------
    DataError
        For an index out of range, a negative or a non-finite value, with its cell and gene.
    """
    matrix = dataset.matrix
    spans = plan_blocks(matrix)
    number = {s.start: i for i, s in enumerate(spans)}
    codes = np.ascontiguousarray(codes, np.int32)
    buckets.count_cells(codes)
    merged: list[int] = []

    def visit(_: None, chunk: object, span: Span) -> None:
        data = transform(chunk)
        if isinstance(chunk, DenseChunk):
            b, w = chunk.block.shape
            block = first_block + (0 if w < matrix.shape[1] else number[span.start])
            part = codes[chunk.row_start : chunk.row_start + b]
            fault = buckets.add_dense(block, chunk.col_start, data.reshape(b, w), part)
        else:
            assert isinstance(chunk, CsrChunk | CscChunk)
            indptr, indices = chunk.indptr, chunk.indices
            at = None
            for attempt in range(2):
                if isinstance(chunk, CsrChunk):
                    part = codes[chunk.start : chunk.start + chunk.n_rows]
                    fault = buckets.add_csr(first_block + number[span.start], indptr, indices, data, part, at)
                else:
                    fault = buckets.add_csc(first_block, chunk.start, indptr, indices, data, codes, at)
                if fault is None or fault.what != "duplicate" or attempt:
                    break
                indptr, indices, data, n = _merge_duplicates(chunk, data)
                merged.append(n)
                at = fault.at
                chunk = replace(chunk, indptr=indptr, indices=indices, data=data)
        if fault is not None:
            raise _refuse(dataset, chunk, fault.position, fault.what)

    run_spans(matrix, spans, lambda: None, visit, threads=threads, progress=progress)
    return sum(merged)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One file, reduced.

    Attributes
    ----------
    label
        The file's path.
    genes
        Gene names, in the file's order.
    labels, control
        Groups sorted as text, and the control's position among them.
    order, appearance
        Labels in the order of the file's categories, and in that of its cells.
    scale
        What the file holds: ``log1p`` or ``counts``.
    dtype
        The precision of the values: float32 or float64.
    sparse
        Whether the matrix is stored sparse.
    sums
        What the kernel found.
    notes
        Facts the user should see.
    """

    label: str
    genes: np.ndarray
    labels: tuple[str, ...]
    control: int
    order: tuple[str, ...]
    appearance: tuple[str, ...]
    scale: str
    dtype: np.dtype
    sparse: bool
    sums: RankSums
    median_library: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def perts(self) -> np.ndarray:
        """Positions of the perturbations among ``labels``: all but the control."""
        return np.delete(np.arange(len(self.labels)), self.control)

    @property
    def names(self) -> list[str]:
        """The perturbations' names."""
        return [self.labels[i] for i in self.perts]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a side is reduced; see :meth:`GeneBuckets.rank_sum` for the kernel's part.

    Attributes
    ----------
    raw, cp10k
        See :func:`make_transform`.
    pairwise
        Sum for means of fold changes as numpy sums a group's values in one array.
    wide
        Work in float64 whatever the file holds.
    """

    test: bool = True
    continuity: bool = True
    exact: bool = False
    moment: str | None = None
    single: bool = False
    pairwise: bool = False
    raw: bool = False
    cp10k: bool = False
    wide: bool = False
    threads: int | None = None


def reduce_side(
    dataset: Dataset,
    cells: Cells,
    control: str,
    scale: Scale,
    options: ReadOptions,
    *,
    codes: np.ndarray | None = None,
    gene_order: np.ndarray | None = None,
    borrowed: tuple[Dataset, np.ndarray, Scale] | None = None,
    keep: list[GeneBuckets] | None = None,
    progress: Progress = SILENT,
    phase: str = "cells",
) -> Side:
    """Read a file and reduce it.

    Parameters
    ----------
    codes
        Other codes than the cells' own (a half of the cells, say).
    gene_order
        Positions in the file of the genes of the result, or None for the file's own order.
    borrowed
        Cells of another file to add, with their codes and scale: the truth's controls. Its genes are in the order of
        the result.
    keep
        The filled buckets are appended here, for whoever needs them longer.
    """
    matrix = dataset.matrix
    threads = get_threads(options.threads)
    raw = options.raw and scale.kind == "counts"
    sources = [(dataset, cells.codes if codes is None else codes, scale)]
    if borrowed is not None:
        sources.append(borrowed)
    wide = options.wide or any(_value_dtype(d.matrix, s, raw, options) == np.float64 for d, _, s in sources)
    needs = [get_capacity(d.matrix) for d, _, _ in sources]
    plan = None
    if options.pairwise and len(sources) == 1:
        plan = make_plan(sources[0][1], len(cells.labels))
        if plan.n_slots > MAX_GROUPS:  # hundreds of thousands of cells: the sums of float64 have to do
            plan = None
        else:
            sources = [(dataset, plan.slot_n, scale)]
    buckets = GeneBuckets(
        n_genes=matrix.shape[1],
        n_groups=len(cells.labels) if plan is None else plan.n_slots,
        capacity=sum(n for n, _ in needs),
        dtype="float64" if wide else "float32",
        n_blocks=sum(b for _, b in needs),
    )
    notes: list[str] = []
    first = 0
    for (source, part, how), (_, blocks) in zip(sources, needs, strict=True):
        transform = make_transform(source.matrix, how, raw=raw, cp10k=options.cp10k, wide=options.wide)
        if wide:
            transform = _widen(transform)
        progress.start(f"reading {phase}", source.matrix.stored_bytes, "bytes")
        n = fill(buckets, source, part, transform, first_block=first, threads=threads, progress=progress)
        progress.finish()
        if gene_order is not None and source is dataset:
            buckets.reorder(first, first + blocks, gene_order)
        first += blocks
        if n:
            notes.append(f"{source.label}: {n:,} duplicate entries were summed")
    position = cells.labels.index(control)
    dtype = np.dtype(np.float64) if options.wide else _value_dtype(matrix, scale, raw, options)
    single = None
    sparse = not isinstance(matrix, DenseMatrix)
    if options.single and plan is None:
        size_k = buckets.size_k.astype(dtype)
        single = np.divide(1, size_k, out=np.ones_like(size_k), where=size_k > 0) if sparse else np.ones_like(size_k)
    pair_kg = None if plan is None else buckets.sum_pairwise(plan, threads=threads)
    progress.start(f"ranking {phase}", float(buckets.n_values), "non-zeros")
    sums = buckets.rank_sum(
        position,
        test=options.test,
        continuity=options.continuity,
        exact=options.exact,
        moment=options.moment,
        single=single,
        threads=threads,
        advance=progress.advance,
    )
    progress.finish()
    if pair_kg is not None:
        sums = replace(sums, single_kg=pair_kg)
    if scale.kind == "log1p" and not options.raw and not options.cp10k and sums.max_value >= LOG1P_LIMIT:
        raise DataError(
            f"{dataset.label}: fractional values up to {sums.max_value:.6g} are neither counts nor log1p of them",
            hint=f"log1p-normalised values lie below {LOG1P_LIMIT:g}; pass counts, or log1p values",
        )
    if keep is not None:
        keep.append(buckets)
    library = scale.library_n
    return Side(
        label=dataset.label,
        genes=dataset.var.index if gene_order is None else dataset.var.index[gene_order],
        labels=cells.labels,
        control=position,
        order=cells.order,
        appearance=cells.appearance,
        scale=scale.kind,
        dtype=dtype,
        sparse=sparse,
        sums=sums,
        median_library=float(np.median(library)) if library is not None and scale.kind == "counts" else None,
        notes=notes,
    )


def _value_dtype(matrix: Matrix, scale: Scale, raw: bool, options: ReadOptions) -> np.dtype:
    if matrix.chunk_dtype.kind != "f":
        return np.dtype(np.float64 if raw or scale.kind == "log1p" else np.float32)
    return matrix.chunk_dtype
