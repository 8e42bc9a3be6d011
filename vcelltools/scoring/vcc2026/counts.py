"""Read counts by gene, and compute the tables of a labeling of the cells for the 2026 metrics."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io import Buffers, Dataset, Span
from vcelltools.io.chunks import CscChunk, CsrChunk, DenseChunk, compress_rows
from vcelltools.io.faults import raise_fault_at
from vcelltools.io.stream import plan_blocks, run_spans
from vcelltools.kernels.scan import csr_hash_cells
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads

if TYPE_CHECKING:
    from vcelltools.kernels.labelings import Labeling

_BLOCK_VALUES = 1 << 17
_TABLE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class GeneMajor:
    """Counts by gene, in cell order.

    Attributes
    ----------
    indptr, cells, values
        (g + 1,) int64, (nnz,) int32, (nnz,) float32.
    library
        (n,) float64 library sizes.
    dense
        Whether the matrix of the file is dense (its means are then summed before they are divided, as in numpy).
    """

    indptr: np.ndarray
    cells: np.ndarray
    values: np.ndarray
    library: np.ndarray
    dense: bool = False

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.library)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.indptr) - 1

    def take(self, rows: np.ndarray, threads: int = 1) -> GeneMajor:
        """Return the cells ``rows`` (ascending positions)."""
        from vcelltools.kernels.labelings import csc_count_taken, csc_take

        new = np.full(self.n_cells, -1, np.int32)
        new[rows] = np.arange(len(rows), dtype=np.int32)
        indptr = np.zeros(self.n_genes + 1, np.int64)
        blocks = _cut(self.indptr)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda ab: csc_count_taken(self.indptr, self.cells, new, *ab, indptr), blocks))
            np.cumsum(indptr, out=indptr)
            cells, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
            whole = self.indptr, self.cells, self.values, new
            list(pool.map(lambda ab: csc_take(*whole, *ab, indptr, cells, values), blocks))
        return GeneMajor(indptr=indptr, cells=cells, values=values, library=self.library[rows], dense=self.dense)

    def draw(self, draws: np.ndarray, scale_g: np.ndarray) -> GeneMajor:
        """Return ``draws`` (positions with repeats), scaled by ``scale_g`` as float32, followed by all cells."""
        from vcelltools.kernels.labelings import csc_draw

        order = np.argsort(draws, kind="stable").astype(np.int32)
        times = np.bincount(draws, minlength=self.n_cells)
        ptr = np.concatenate([[0], np.cumsum(times)]).astype(np.int64)
        per_cell = np.bincount(self.cells, minlength=self.n_cells)
        room = int((per_cell * (times + 1)).sum())
        indptr = np.zeros(self.n_genes + 1, np.int64)
        cells, values = np.empty(room, np.int32), np.empty(room, np.float32)
        library = np.zeros(len(draws))
        n = csc_draw(
            self.indptr, self.cells, self.values, ptr, order, scale_g, len(draws), library, indptr, cells, values
        )
        return GeneMajor(
            indptr=indptr,
            cells=cells[:n],
            values=values[:n],
            library=np.concatenate([library, self.library]),
            dense=self.dense,
        )


@dataclass
class RowBlock:
    """A chunk of any layout as CSR rows: cells from ``row_start``, genes from ``col_start``."""

    row_start: int
    col_start: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


def as_rows(chunk: CsrChunk | CscChunk | DenseChunk) -> RowBlock:
    """Return a chunk of any layout as CSR rows."""
    if isinstance(chunk, CsrChunk):
        return RowBlock(chunk.start, 0, chunk.indptr, chunk.indices, chunk.data)
    if isinstance(chunk, DenseChunk):
        return RowBlock(chunk.row_start, chunk.col_start, *compress_rows(chunk.block))
    bad = np.flatnonzero((chunk.indices < 0) | (chunk.indices >= chunk.n_cells))
    if len(bad):
        raise DataError(f"a cell index is {int(chunk.indices[bad[0]])}, but there are only {chunk.n_cells:,} cells")
    cols = np.repeat(np.arange(chunk.n_cols, dtype=np.int32), np.diff(chunk.indptr))
    order = np.argsort(chunk.indices, kind="stable")
    counts = np.bincount(chunk.indices, minlength=chunk.n_cells)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return RowBlock(0, chunk.start, indptr, cols[order], chunk.data[order])


def read_ahead(dataset: Dataset, threads: int) -> Iterator[tuple[RowBlock, int]]:
    """Yield the chunks in order, while the next ones are read and decompressed."""
    matrix = dataset.matrix
    spans = matrix.plan()
    ahead = threads + 1
    ring = [Buffers() for _ in range(ahead + 1)]

    def read(i: int) -> RowBlock:
        return as_rows(matrix.read(spans[i], ring[i % len(ring)]))

    with ThreadPoolExecutor(threads) as pool:
        todo = [pool.submit(read, i) for i in range(min(ahead, len(spans)))]
        for i, span in enumerate(spans):
            rows = todo.pop(0).result()
            yield rows, span.n_bytes
            if i + ahead < len(spans):
                todo.append(pool.submit(read, i + ahead))


@dataclass(frozen=True, kw_only=True)
class Census:
    """The result of the first pass over a file.

    Attributes
    ----------
    part_n
        (n,) part of each cell, or −1 for cells that are not scored.
    library
        (n,) float64 library sizes.
    nnz_bsg
        (blocks, parts, g) int32 number of values of each gene in each part, by the blocks in which the file is read.
    hash_n
        (n,) uint64 hashes of the values of the cells, which are equal for copies.
    n_duplicates
        Number of duplicate entries.
    """

    part_n: np.ndarray
    library: np.ndarray
    nnz_bsg: np.ndarray
    hash_n: np.ndarray
    n_duplicates: int

    @property
    def nnz(self) -> int:
        """Number of values in the cells of the parts, counting duplicates once."""
        return int(self.nnz_bsg.sum(dtype=np.int64)) - self.n_duplicates


def take_census(
    dataset: Dataset,
    part_n: np.ndarray,
    n_parts: int,
    *,
    what: str,
    max_total: float | None,
    slack: float = 0.0,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Census:
    """Read the matrix once, check that it holds counts, and count the values of each part.

    Parameters
    ----------
    part_n
        (n,) int32 part (context) of each cell, −1 for cells that are not scored.
    what
        ``"prediction"`` or ``"truth"``, for messages.
    max_total
        Maximum library size of a cell.
    slack
        Largest allowed deviation of a count from a whole number; counts are not rounded.

    Raises
    ------
    DataError
        If an index is damaged, a value is negative or not finite (the message names cell and gene), or a cell exceeds
        the limit.
    NotCountsError
        If values are fractional.
    """
    from vcelltools.kernels.labelings import csr_count

    matrix, n, n_genes = dataset.matrix, dataset.n_cells, dataset.n_genes
    spans = plan_blocks(matrix)
    number = {s.start: i for i, s in enumerate(spans)}
    library, square_n, hash_n = np.zeros(n), np.zeros(n), np.zeros(n, np.uint64)
    nnz_bsg = np.zeros((len(spans), max(n_parts, 1), n_genes), np.int32)
    twice: list[int] = []

    def visit(seen_g: np.ndarray, chunk: Any, span: Span) -> None:
        rows = as_rows(chunk)
        here = slice(rows.row_start, rows.row_start + len(rows.indptr) - 1)
        status = np.zeros(4, np.int64)
        csr_count(
            rows.indptr, rows.indices, rows.data, n_genes, rows.col_start, slack, part_n[here], library[here],
            nnz_bsg[number[span.start]], seen_g, status,
        )  # fmt: skip
        fault, row, at, repeated = status.tolist()
        if fault:
            gene = rows.col_start + int(rows.indices[at])
            hint = f"the 2026 rules score raw counts: select them with {spell('layer')}, or round the predicted counts"
            raise_fault_at(fault, rows.row_start + row, gene, rows.data[at], dataset, hint=hint)
        twice.append(repeated)
        bits = np.ascontiguousarray(rows.data).view(f"u{rows.data.itemsize}")
        csr_hash_cells(rows.indptr, rows.indices, rows.data, bits, rows.col_start, hash_n[here], square_n[here])

    progress.start(f"checking the {what}", matrix.stored_bytes, "bytes")
    alone = 1 if matrix.by_gene else threads  # blocks of columns share the library sizes of the cells
    run_spans(matrix, spans, lambda: np.full(n_genes, -1, np.int64), visit, threads=alone, progress=progress)
    progress.finish()
    if max_total is not None and n and library.max() > max_total:
        i = int(library.argmax())
        raise DataError(
            f"{dataset.label}: {int((library > max_total).sum()):,} cells of the {what} have more than "
            f"{max_total:,.0f} counts (cell {dataset.obs.index[i]} has {library[i]:,.12g})",
            hint="scale the cells down to a library size within the limit",
        )
    return Census(part_n=part_n, library=library, nnz_bsg=nnz_bsg, hash_n=hash_n, n_duplicates=sum(twice))


def read_part(
    dataset: Dataset,
    census: Census,
    part: int,
    *,
    gene_order: np.ndarray | None = None,
    behind: GeneMajor | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> GeneMajor:
    """Read the cells of one part, by gene, in file order.

    Parameters
    ----------
    gene_order
        Positions in the file of the genes of the result, or None for the order of the file.
    behind
        Cells to append to those of the file, with the genes of the result, without copying either.
    """
    from vcelltools.kernels.labelings import csc_append, csc_merge, csr_scatter

    matrix = dataset.matrix
    spans = plan_blocks(matrix)
    number = {s.start: i for i, s in enumerate(spans)}
    rows = np.flatnonzero(census.part_n == part)
    cell_n = np.full(dataset.n_cells, -1, np.int32)
    cell_n[rows] = np.arange(len(rows), dtype=np.int32)
    nnz_bg = census.nnz_bsg[:, part]
    new_gene = np.arange(dataset.n_genes)
    if gene_order is not None:
        nnz_bg = nnz_bg[:, gene_order]
        new_gene[gene_order] = np.arange(dataset.n_genes)
    own_g = nnz_bg.sum(axis=0, dtype=np.int64)
    more_g = np.zeros_like(own_g) if behind is None else np.diff(behind.indptr)
    indptr = np.concatenate([[0], np.cumsum(own_g + more_g)]).astype(np.int64)
    cells, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    # every block knows its position in every gene, so blocks may arrive in any order
    stop_bg = np.cumsum(nnz_bg, axis=0, dtype=np.int64) + indptr[:-1]

    def visit(_: None, chunk: Any, span: Span) -> None:
        block, i = as_rows(chunk), number[span.start]
        cursor = stop_bg[i] - nnz_bg[i]
        cell_b = cell_n[block.row_start : block.row_start + len(block.indptr) - 1]
        fits = csr_scatter(
            block.indptr, block.indices, block.data, block.col_start, cell_b, new_gene, cursor, stop_bg[i],
            cells, values,
        )  # fmt: skip
        if not (fits and np.array_equal(cursor, stop_bg[i])):
            raise DataError(f"{dataset.label}: the file changed while it was being read")

    progress.start("reading counts", matrix.stored_bytes, "bytes")
    run_spans(matrix, spans, lambda: None, visit, threads=threads, progress=progress)
    progress.finish()
    library = census.library[rows]
    if behind is not None:
        cursor = indptr[:-1] + own_g
        other = behind.indptr, behind.cells, behind.values, np.int32(len(rows))
        with ThreadPoolExecutor(get_threads(threads)) as pool:
            list(pool.map(lambda ab: csc_append(*other, *ab, cursor, cells, values), _cut(behind.indptr)))
        library = np.concatenate([library, behind.library])
    if census.n_duplicates:
        n = csc_merge(indptr, cells, values)
        cells, values = cells[:n], values[:n]
    return GeneMajor(indptr=indptr, cells=cells, values=values, library=library, dense=matrix.layout == "dense")


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of one labeling; k groups, controls first.

    Attributes
    ----------
    size_k
        (k,) cells.
    sum_kg, cpm_kg
        (k, g) float64 counts summed, and mean counts per million.
    twice_u_kg, tie_kg
        (k, g) twice the rank-sum statistic U against the controls, and Σ(t³ − t) over ties in the two groups;
        row 0 is empty.
    spread_k
        (k,) the leave-one-cell-out variance C of the log profile, summed over genes.
    """

    size_k: np.ndarray
    sum_kg: np.ndarray
    cpm_kg: np.ndarray
    twice_u_kg: np.ndarray
    tie_kg: np.ndarray
    spread_k: np.ndarray


def _prepare(code: np.ndarray, n_sets: int, per_set: int, library: np.ndarray, dense: bool) -> Labeling:
    """Return a labeling in the format of the kernel, with an additional group for excluded cells."""
    from vcelltools.kernels.labelings import N_TERMS, SERIES_LIMIT, Labeling

    n_groups = n_sets * per_set
    code = np.where(code < 0, n_groups, code).astype(np.int32)
    used = np.flatnonzero(code < n_groups)
    group = code[used]
    size = np.bincount(group, minlength=n_groups + 1).astype(np.float64)
    total = np.bincount(group, weights=library[used], minlength=n_groups + 1)
    rest = total[group] - library[used]
    # rounding errors may remain in a sum of fractional counts that should be zero
    alone = rest <= 1e-12 * total[group]
    shift, grown = np.zeros(len(code)), np.zeros(len(code))
    shift[used] = np.where(alone, 0.0, library[used] / np.where(alone, 1.0, rest))
    shift[used[total[group] <= 0]] = 0.0
    grown[used] = np.where(alone, 0.0, 1.0 + shift[used])
    is_big = (shift[used] > SERIES_LIMIT) | (alone & (total[group] > 0))
    power = np.zeros((n_groups + 1, N_TERMS + 1))
    kept, kept_group = shift[used][~is_big], group[~is_big]
    term = np.ones(len(kept))
    for m in range(1, N_TERMS + 1):
        term = term * kept
        power[:, m] = np.bincount(kept_group, weights=term, minlength=n_groups + 1)
    big = used[is_big]
    big = big[np.argsort(code[big], kind="stable")]
    weight = np.ones(n_groups + 1) if dense else 1.0 / np.maximum(size, 1.0)
    weight[-1] = 0.0
    return Labeling(
        code_n=code,
        control_of=np.append(np.arange(n_groups) // per_set * per_set, n_groups),
        shift_n=shift,
        grown_n=grown,
        size_k=size,
        weight_k=weight,
        total_k=np.maximum(total, 1e-300),
        power_kt=power,
        big_ptr=np.searchsorted(code[big], np.arange(n_groups + 2)).astype(np.int64),
        big_cells=big.astype(np.int64),
    )


def make_tables(
    counts: GeneMajor,
    labelings: Sequence[tuple[np.ndarray, int]],
    n_groups: int,
    *,
    target_sum: float,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Generator[Tables, None, None]:
    """Yield the tables of every labeling, in order; genes are sorted once for as many labelings as fit in memory.

    Parameters
    ----------
    counts
        The cells.
    labelings
        Pairs of (n,) int32 codes and the number of sets in them. A set is ``n_groups`` groups, its controls first: a
        cell's code is its group plus ``n_groups`` times its set, or −1. Every set yields separate tables.
    n_groups
        Number of groups in a set.
    target_sum
        The sum to which the counts of a profile are scaled before log1p.
    """
    step = max(1, _TABLE_BYTES // (12 * 8 * counts.n_genes * n_groups))
    for a in range(0, len(labelings), step):
        prepared = [
            _prepare(code, sets, n_groups, counts.library, counts.dense) for code, sets in labelings[a : a + step]
        ]
        yield from _make_batch(counts, prepared, n_groups, target_sum, get_threads(threads), progress)


def _cut(indptr: np.ndarray) -> list[tuple[int, int]]:
    """Return runs of genes of about ``_BLOCK_VALUES`` values each."""
    n_genes = len(indptr) - 1
    bounds = [0]
    while bounds[-1] < n_genes:
        a = bounds[-1]
        b = int(np.searchsorted(indptr, indptr[a] + _BLOCK_VALUES, side="right")) - 1
        bounds.append(min(max(b, a + 1), n_genes))
    return list(pairwise(bounds))


def _make_batch(
    counts: GeneMajor,
    labelings: list[Labeling],
    per_set: int,
    target_sum: float,
    threads: int,
    progress: Progress,
) -> Iterator[Tables]:
    from vcelltools.kernels.labelings import GeneBlock, LabelOutput, label_genes, make_label_scratch, sort_genes

    out = [[np.zeros((counts.n_genes, len(lab.size_k) - 1)) for _ in range(4)] for lab in labelings]
    per_million = counts.library / 1e6
    per_million[per_million == 0] = 1.0
    blocks = _cut(counts.indptr)
    most_groups = max(len(lab.size_k) for lab in labelings)
    local = threading.local()  # memory that a thread reuses
    progress.start("ranking", len(counts.cells), "non-zeros")

    def work(block: tuple[int, int]) -> list[np.ndarray]:
        a, b = block
        lo, hi = int(counts.indptr[a]), int(counts.indptr[b])
        m = hi - lo
        cells, values, indptr = counts.cells[lo:hi], counts.values[lo:hi], counts.indptr[a : b + 1] - lo
        if m > getattr(local, "size", -1):
            kinds = np.float64, np.float64, np.int32, np.uint8, np.uint64, np.uint64
            local.size, local.arrays = m, [np.empty(m, kind) for kind in kinds]
            local.hist, local.scratch = np.empty((3, 2048), np.int64), make_label_scratch(m, most_groups)
        cpm, logv, order, tied, *keys = [x[:m] for x in local.arrays]
        np.take(per_million, cells, out=cpm, mode="clip")  # any other mode copies
        np.divide(values, cpm, out=cpm)
        np.log1p(cpm, out=logv)
        sort_genes(indptr, cells, logv.view(np.uint64), order, tied, *keys, local.hist)
        spreads = []
        for lab, arrays in zip(labelings, out, strict=True):
            spread = np.zeros(len(lab.size_k) - 1)
            sums, cpms, twice_u, tie = (x[a:b] for x in arrays)
            output = LabelOutput(sums, cpms, twice_u, tie, spread)
            genes = GeneBlock(indptr, cells, values, cpm, order, tied)
            label_genes(genes, lab, target_sum, local.scratch, output)
            spreads.append(spread)
        progress.advance(m)
        return spreads

    with ThreadPoolExecutor(min(threads, len(blocks))) as pool:
        spreads = list(pool.map(work, blocks))
    progress.finish()
    for i, lab in enumerate(labelings):
        total = np.zeros(len(lab.size_k) - 1)
        for spread in spreads:  # in gene order, so that the sum does not depend on threads
            total += spread[i]
        size = np.maximum(lab.size_k[:-1], 1.0)
        spread_k = np.maximum(total * (size - 1.0) / size, 0.0)
        for k in range((len(lab.size_k) - 1) // per_set):
            own = slice(k * per_set, (k + 1) * per_set)
            sum_kg, cpm_kg, u_kg, tie_kg = (np.ascontiguousarray(x[:, own].T) for x in out[i])
            if counts.dense:
                cpm_kg /= size[own, None]
            yield Tables(
                size_k=lab.size_k[own],
                sum_kg=sum_kg,
                cpm_kg=cpm_kg,
                twice_u_kg=u_kg,
                tie_kg=tie_kg,
                spread_k=spread_k[own],
            )
        out[i] = []
