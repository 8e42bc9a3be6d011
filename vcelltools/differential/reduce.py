"""Reduce a file of cells to groups × genes, in one pass and bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from vcelltools.differential.cell_labels import Cells, count_copies
from vcelltools.differential.expression import SCALES, Scale, Transform, make_transform
from vcelltools.differential.partial_sums import PartialSums, make_plan
from vcelltools.differential.ranks import MAX_GROUPS, BadValue, GeneBuckets, RankSums
from vcelltools.errors import DataError
from vcelltools.io import CscMatrix, Dataset, DenseMatrix
from vcelltools.io.chunks import Chunk, CscChunk, CsrChunk, DenseChunk
from vcelltools.io.faults import raise_fault
from vcelltools.io.matrix import Matrix, Span
from vcelltools.io.stream import plan_blocks, run_spans
from vcelltools.kernels.faults import Fault
from vcelltools.kernels.scan import csc_hash_cells, csr_hash_cells, dense_hash_cells
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads

LOG1P_LIMIT = 15.0
SPILL_BYTES = 64 << 20
"""Largest memory for the sorted values of a file that may be spilled, in bytes."""
COPIES = 0.01
"""Share of copied cells above which a note is given."""


def merge_duplicates(chunk: CsrChunk | CscChunk, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return (indptr, indices, data, n_merged) with duplicate entries summed, as in scipy's canonical form."""
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
    """Return (maximum number of values, number of blocks) that :func:`fill` needs for a matrix."""
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
    squares: bool = True,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> tuple[int, np.ndarray, np.ndarray]:
    """Stream a matrix into the buckets.

    Return the number of duplicate entries that were summed, and for every cell a hash (uint64) and, with ``squares``,
    the sum of the squares of its values.

    Raises
    ------
    DataError
        If an index is out of range, or a value is negative or not finite; the message names its cell and gene.
    """
    matrix = dataset.matrix
    spans = plan_blocks(matrix)
    number = {s.start: i for i, s in enumerate(spans)}
    codes = np.ascontiguousarray(codes, np.int32)
    buckets.count_cells(codes)
    merged: list[int] = []

    def visit(state: tuple[np.ndarray, np.ndarray], chunk: Chunk, span: Span) -> None:
        data = transform(chunk)
        if isinstance(chunk, DenseChunk):
            b, w = chunk.block.shape
            block = first_block + (0 if w < matrix.shape[1] else number[span.start])
            part = codes[chunk.row_start : chunk.row_start + b]
            bad = buckets.add_dense(block, chunk.col_start, data.reshape(b, w), part)
        else:
            bad = add(chunk, data, span, None)
            if bad is not None and bad.fault == Fault.DUPLICATE:
                indptr, indices, data, n = merge_duplicates(chunk, data)
                merged.append(n)
                chunk = replace(chunk, indptr=indptr, indices=indices, data=data)
                bad = add(chunk, data, span, bad.at)
        if bad is not None:
            raise_fault(bad.fault, chunk, bad.position, dataset, hint=SCALES)
        hash_cells(chunk, data, *state)

    def add(chunk: CsrChunk | CscChunk, data: np.ndarray, span: Span, at: int | None) -> BadValue | None:
        if isinstance(chunk, CsrChunk):
            part = codes[chunk.start : chunk.start + chunk.n_rows]
            return buckets.add_csr(first_block + number[span.start], chunk.indptr, chunk.indices, data, part, at)
        return buckets.add_csc(first_block, chunk.start, chunk.indptr, chunk.indices, data, codes, at)

    n, n_squares = dataset.n_cells, dataset.n_cells if squares else 0
    states = run_spans(
        matrix, spans, lambda: (np.zeros(n, np.uint64), np.zeros(n_squares)), visit, threads=threads, progress=progress
    )
    hash_n, square_n = (np.add.reduce(parts, axis=0) for parts in zip(*states, strict=True))
    return sum(merged), hash_n, square_n


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """One file, reduced to groups × genes.

    Attributes
    ----------
    label
        Path of the file.
    genes
        Gene names, in the order of the file.
    labels, control
        Groups, sorted as text, and the position of the control among them.
    order, appearance
        Labels in the order of the file's categories, and in the order of first occurrence.
    scale
        Scale of the values.
    dtype
        Precision of the values: float32 or float64.
    sparse
        Whether the matrix is stored as sparse.
    sums
        Results of the kernel.
    spread_k
        (k,) variance between the cells of a group, summed over genes; None if it was not requested, or only some of the
        cells were read.
    copied_share
        Share of the perturbed cells that are copies of another cell with the same label.
    notes
        Notes for the user.
    """

    label: str
    genes: np.ndarray
    labels: tuple[str, ...]
    control: int
    order: tuple[str, ...]
    appearance: tuple[str, ...]
    scale: Scale
    dtype: np.dtype
    sparse: bool
    sums: RankSums
    median_library: float | None = None
    spread_k: np.ndarray | None = None
    copied_share: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def perts(self) -> np.ndarray:
        """Positions of the perturbations among ``labels``: all except the control."""
        return np.delete(np.arange(len(self.labels)), self.control)

    @property
    def names(self) -> list[str]:
        """Names of the perturbations."""
        return [self.labels[i] for i in self.perts]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of :func:`reduce_cells`; see :meth:`GeneBuckets.rank_sum` for those of the kernel.

    Attributes
    ----------
    raw, cp10k
        See :func:`make_transform`.
    pairwise
        Compute the sums for fold changes in the order in which numpy sums a group's values in one array.
    wide
        Compute in float64 for any dtype of the file.
    spread
        Compute the variance between the cells of each group.
    spill
        Keep the values in a temporary file if they take more than :data:`SPILL_BYTES`. Not with ``pairwise``.
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
    spread: bool = True
    spill: bool = False
    threads: int | None = None


def reduce_cells(
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
) -> Reduced:
    """Read a file and reduce it.

    Parameters
    ----------
    codes
        Codes that replace those of the cells, for example for a half of the cells.
    gene_order
        Positions in the file of the genes of the result, or None for the order of the file.
    borrowed
        Cells of another file to add, with their codes and scale: the controls of the truth. Its genes are in the order
        of the result.
    keep
        List to which the filled buckets are appended, for later use.
    """
    matrix, raw = dataset.matrix, options.raw and scale.kind == "counts"
    sources = [(dataset, cells.codes if codes is None else codes, scale), *([] if borrowed is None else [borrowed])]
    plan = None
    if options.pairwise and len(sources) == 1:
        plan = make_plan(sources[0][1], len(cells.labels))
        if plan.n_slots > MAX_GROUPS:  # with hundreds of thousands of cells, plain float64 sums are used
            plan = None
        else:
            sources = [(dataset, plan.slot_n, scale)]
    notes = list(scale.notes)
    n_groups = len(cells.labels) if plan is None else plan.n_slots
    buckets, hash_n, square_n = collect(sources, n_groups, gene_order, options, raw, notes, progress, phase)
    copied, square_k = 0.0, None
    if codes is None:
        copied = get_copied_share(dataset.label, cells, control, hash_n, notes)
        used = cells.codes >= 0
        if options.spread:
            square_k = np.bincount(cells.codes[used], square_n[used], len(cells.labels))
    position = cells.labels.index(control)
    dtype = np.dtype(np.float64) if options.wide else _value_dtype(matrix, scale, raw, options)
    sums = _rank(buckets, plan, position, dtype, not isinstance(matrix, DenseMatrix), options, progress, phase)
    if not options.raw and not options.cp10k:
        check_log1p(dataset.label, scale, sums.max_value)
    if keep is not None:
        keep.append(buckets)
    library, spread_k = scale.library_n, None
    if square_k is not None:
        spread_k = square_k / np.maximum(sums.size_k, 1) - np.nansum(sums.mean_kg**2, axis=1)
    return Reduced(
        label=dataset.label,
        genes=dataset.var.index if gene_order is None else dataset.var.index[gene_order],
        labels=cells.labels,
        control=position,
        order=cells.order,
        appearance=cells.appearance,
        scale=scale,
        dtype=dtype,
        sparse=not isinstance(matrix, DenseMatrix),
        sums=sums,
        median_library=float(np.median(library)) if library is not None and scale.kind == "counts" else None,
        spread_k=None if spread_k is None else np.maximum(spread_k, 0.0),
        copied_share=copied,
        notes=notes,
    )


def check_log1p(label: str, scale: Scale, max_value: float) -> None:
    """Raise a :class:`DataError` if the largest value is too large for log1p values."""
    if scale.kind == "log1p" and max_value >= LOG1P_LIMIT:
        raise DataError(
            f"{label}: fractional values up to {max_value:.6g} are neither counts nor log1p values",
            hint=f"pass counts, or log1p values, which are below {LOG1P_LIMIT:g}",
        )


def collect(
    sources: list[tuple[Dataset, np.ndarray, Scale]],
    n_groups: int,
    gene_order: np.ndarray | None,
    options: ReadOptions,
    raw: bool,
    notes: list[str],
    progress: Progress,
    phase: str,
) -> tuple[GeneBuckets, np.ndarray, np.ndarray]:
    """Read files with their codes into buckets; return these, and the hashes and squares of the first file's cells."""
    wide = options.wide or any(_value_dtype(d.matrix, s, raw, options) == np.float64 for d, _, s in sources)
    needs = [get_capacity(d.matrix) for d, _, _ in sources]
    buckets = GeneBuckets(
        n_genes=sources[0][0].n_genes,
        n_groups=n_groups,
        capacity=sum(n for n, _ in needs),
        dtype="float64" if wide else "float32",
        n_blocks=sum(b for _, b in needs),
        limit=SPILL_BYTES if options.spill else math.inf,
    )
    first = 0
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for (source, codes, scale), (_, blocks) in zip(sources, needs, strict=True):
        transform = make_transform(source.matrix, scale, raw=raw, cp10k=options.cp10k, wide=options.wide)
        if wide:
            transform = _widen(transform)
        progress.start(f"reading {phase}", source.matrix.stored_bytes, "bytes")
        n, hash_n, square_n = fill(
            buckets, source, codes, transform, first_block=first, squares=options.spread, threads=options.threads,
            progress=progress,
        )  # fmt: skip
        progress.finish()
        if n:
            notes.append(f"{source.label}: {n:,} duplicate entries were summed")
        if gene_order is not None and not found:
            buckets.reorder(0, blocks, gene_order)
        first += blocks
        found.append((hash_n, square_n))
    return buckets, *found[0]


def _rank(
    buckets: GeneBuckets,
    plan: PartialSums | None,
    control: int,
    dtype: np.dtype,
    sparse: bool,
    options: ReadOptions,
    progress: Progress,
    phase: str,
) -> RankSums:
    """Rank every gene of filled buckets, with sums in the precision and order of the options."""
    threads, single = get_threads(options.threads), None
    if options.single and plan is None:
        size_k = buckets.size_k.astype(dtype)
        single = np.divide(1, size_k, out=np.ones_like(size_k), where=size_k > 0) if sparse else np.ones_like(size_k)
    pair_kg = None if plan is None else buckets.sum_pairwise(plan, threads=threads)
    progress.start(f"ranking {phase}", float(buckets.n_values), "non-zeros")
    sums = buckets.rank_sum(
        control, test=options.test, continuity=options.continuity, exact=options.exact, moment=options.moment,
        single=single, threads=threads, advance=progress.advance,
    )  # fmt: skip
    progress.finish()
    return sums if pair_kg is None else replace(sums, single_kg=pair_kg)


def get_copied_share(label: str, cells: Cells, control: str, hash_n: np.ndarray, notes: list[str]) -> float:
    """Return the share of the perturbed cells that are copies, and add a note if it is large."""
    codes = cells.codes
    if control in cells.labels:
        codes = np.where(codes == cells.labels.index(control), -1, codes)
    n, total = count_copies(codes, hash_n), int(np.count_nonzero(codes >= 0))
    if n > max(COPIES * total, 1):
        notes.append(
            f"{label}: {n:,} of {total:,} perturbed cells are copies of another cell with the same label. The rank "
            "test treats each as an independent observation, so it finds too many significant genes"
        )
    return n / total if total else 0.0


def _value_dtype(matrix: Matrix, scale: Scale, raw: bool, options: ReadOptions) -> np.dtype:
    if matrix.chunk_dtype.kind != "f":
        return np.dtype(np.float64 if raw or scale.kind == "log1p" else np.float32)
    return matrix.chunk_dtype


def _widen(transform: Transform) -> Transform:
    return lambda chunk: transform(chunk).astype(np.float64, copy=False)


def hash_cells(chunk: object, values: np.ndarray, hash_n: np.ndarray, square_n: np.ndarray) -> None:
    """Add the values of a chunk of any layout to the hashes and the sums of squares of its cells."""
    bits = values.view(f"u{values.itemsize}")
    if isinstance(chunk, CscChunk):
        csc_hash_cells(chunk.indptr, chunk.indices, values, bits, chunk.start, hash_n, square_n)
        return
    if isinstance(chunk, CsrChunk):
        here = slice(chunk.start, chunk.start + chunk.n_rows)
        csr_hash_cells(chunk.indptr, chunk.indices, values, bits, 0, hash_n[here], square_n[here])
        return
    assert isinstance(chunk, DenseChunk)
    here, shape = slice(chunk.row_start, chunk.row_start + len(chunk.block)), chunk.block.shape
    dense_hash_cells(values.reshape(shape), bits.reshape(shape), chunk.col_start, hash_n[here], square_n[here])
