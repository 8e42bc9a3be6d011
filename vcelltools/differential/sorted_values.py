"""Sort the values of files by gene and rank each gene, on this machine or on the workers of a cluster.

On a cluster, one task reads a range of cells and sorts its values by gene. Another collects the values of a range of
genes from all of these, in the order of the cells, and ranks them. A file stored gene by gene needs no exchange between
workers. Each gene is ranked as on one machine, so the result has the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any, NamedTuple, Protocol

import numpy as np

from vcelltools.differential.expression import SCALES, Transform
from vcelltools.differential.ranks import BadValue, GeneBuckets, Piece
from vcelltools.io import Dataset
from vcelltools.io.chunks import Chunk, CscChunk, CsrChunk, DenseChunk
from vcelltools.io.faults import raise_fault
from vcelltools.io.matrix import Matrix, Span
from vcelltools.io.remote import Part
from vcelltools.io.stream import plan_blocks, run_spans
from vcelltools.kernels.faults import Fault
from vcelltools.kernels.scan import csc_hash_cells, csr_hash_cells, dense_hash_cells
from vcelltools.runtime.cluster import cut, gather
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads


class Input(NamedTuple):
    """A file to rank: the open file, the (n,) groups of its cells (-1: left out), and the transform of its values."""

    dataset: Dataset
    codes: np.ndarray
    transform: Transform


class Ranking(Protocol):
    """What is computed of sorted values, for each gene separately. Workers receive it, so it holds only values."""

    def __call__(self, buckets: GeneBuckets, *, threads: int, advance: Any) -> Any:
        """Return the results of all genes in the buckets, with a method ``join`` for those of successive genes."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The results of a ranking, and what was found of the cells of the first file.

    Attributes
    ----------
    result
        The results of all genes.
    hash_n
        (n,) uint64 hashes of the values of each cell.
    square_n
        (n,) float64 sums of the squares of its values; empty if they were not requested.
    merged
        Number of duplicate entries that were summed, for each file.
    buckets
        The sorted values, if they were requested; from a cluster, those of the controls alone.
    """

    result: Any
    hash_n: np.ndarray
    square_n: np.ndarray
    merged: list[int]
    buckets: GeneBuckets | None


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


def fill(
    buckets: GeneBuckets,
    file: Input,
    spans: list[Span],
    *,
    first_block: int = 0,
    squares: bool = True,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> tuple[int, np.ndarray, np.ndarray]:
    """Stream some spans of a matrix into the buckets.

    Return the number of duplicate entries that were summed, and for every cell a hash (uint64) and, with ``squares``,
    the sum of the squares of its values.

    Raises
    ------
    DataError
        If an index is out of range, or a value is negative or not finite; the message names its cell and gene.
    """
    dataset, transform = file.dataset, file.transform
    matrix, codes = dataset.matrix, np.ascontiguousarray(file.codes, np.int32)
    number = {s.start: i for i, s in enumerate(spans)}
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


def rank_files(
    files: list[Input],
    n_groups: int,
    ranking: Ranking,
    *,
    gene_order: np.ndarray | None = None,
    squares: bool = True,
    limit: float = math.inf,
    keep: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    phase: str = "cells",
) -> Ranked:
    """Sort the values of all files by gene, and rank them.

    Parameters
    ----------
    n_groups
        Number of groups of the cells.
    ranking
        What is computed of the sorted values.
    gene_order
        Positions in the first file of the genes of the result, or None for the order of the file. The genes of other
        files are in the order of the result.
    squares
        Whether the squares of the values of each cell are summed.
    limit
        Largest memory of the sorted values; more are kept in a temporary file.
    keep
        Return the sorted values of the group ``keep`` (or of all groups).
    """
    wide = any(f.transform.get_dtype(f.dataset.matrix) == np.float64 for f in files)
    files = [f._replace(transform=replace(f.transform, widen=wide)) for f in files]
    size_k = np.sum([np.bincount(f.codes[f.codes >= 0], minlength=n_groups) for f in files], axis=0)
    if files[0].dataset.remote is not None:
        return _rank_remotely(files, size_k, ranking, gene_order, squares, keep, progress, phase)
    spans = [plan_blocks(f.dataset.matrix) for f in files]
    buckets = _make_buckets(files, spans, size_k, limit)
    first, found = 0, []
    for file, of_file in zip(files, spans, strict=True):
        matrix = file.dataset.matrix
        progress.start(f"reading {phase}", matrix.stored_bytes, "bytes")
        found.append(
            fill(buckets, file, of_file, first_block=first, squares=squares, threads=threads, progress=progress)
        )
        progress.finish()
        if gene_order is not None and first == 0:
            buckets.reorder(0, _count_blocks(matrix, of_file), gene_order)
        first += _count_blocks(matrix, of_file)
    progress.start(f"ranking {phase}", float(buckets.n_values), "non-zeros")
    result = ranking(buckets, threads=get_threads(threads), advance=progress.advance)
    progress.finish()
    return Ranked(
        result=result, hash_n=found[0][1], square_n=found[0][2], merged=[n for n, _, _ in found],
        buckets=None if keep is None else buckets,
    )  # fmt: skip


def _count_blocks(matrix: Matrix, spans: list[Span]) -> int:
    """Return the number of blocks of cells in spans; spans of genes have all cells."""
    return 1 if matrix.by_gene else len(spans)


def _make_buckets(files: list[Input], spans: list[list[Span]], size_k: np.ndarray, limit: float) -> GeneBuckets:
    """Return empty buckets for the values in spans of files."""
    buckets = GeneBuckets(
        n_genes=files[0].dataset.n_genes,
        n_groups=len(size_k),
        capacity=sum(s.n_values for of_file in spans for s in of_file),
        dtype="float64" if files[0].transform.widen else "float32",
        n_blocks=sum(_count_blocks(f.dataset.matrix, s) for f, s in zip(files, spans, strict=True)),
        limit=limit,
    )
    buckets.size_k[:] = size_k
    return buckets


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """What a worker needs to sort the values of a part of a file."""

    codes: np.ndarray
    transform: Transform
    size_k: np.ndarray
    gene_order: np.ndarray | None
    ranges: list[Part]
    squares: bool


class Sorted(NamedTuple):
    """The values of a part by ranges of genes, the number of duplicate entries, and the hashes and squares of cells."""

    pieces: list[Piece]
    merged: int
    hash_n: np.ndarray
    square_n: np.ndarray


def _rank_remotely(
    files: list[Input],
    size_k: np.ndarray,
    ranking: Ranking,
    gene_order: np.ndarray | None,
    squares: bool,
    keep: int | None,
    progress: Progress,
    phase: str,
) -> Ranked:
    matrices = [f.dataset.matrix for f in files]
    client, parts = files[0].dataset.remote.client, [f.dataset.remote.cut(f.dataset.matrix) for f in files]
    n_genes = files[0].dataset.n_genes
    ranges = cut(0, n_genes, -(-n_genes // max(map(len, parts))))
    if matrices[0].by_gene and gene_order is None:
        ranges = parts[0]
    pieces: list[list[Any]] = [[] for _ in ranges]
    found: list[Any] = []
    keys: list[tuple[int, Part]] = []
    for i, (file, matrix, of_file) in enumerate(zip(files, matrices, parts, strict=True)):
        order = gene_order if i == 0 else None
        task = ReadTask(codes=file.codes, transform=file.transform, size_k=size_k, gene_order=order, ranges=ranges,
                        squares=squares and i == 0)  # fmt: skip
        read = file.dataset.remote.submit(_read_part, of_file, task)
        for (a, b), future in zip(of_file, read, strict=True):
            for j, (c, d) in enumerate(ranges):
                if not matrix.by_gene or order is not None or (a < d and c < b):
                    pieces[j].append(client.submit(_pick, future, j, pure=False))
            found.append(client.submit(_summarise, future, pure=False))
            keys.append((i, (a, b)))
        del read, future  # the values of a part can go when its pieces are taken
    how = files[0].dataset.remote.hold((ranking, size_k, keep))
    ranks = [client.submit(_rank_pieces, some, how, pure=False) for some in pieces]
    del pieces
    first = files[0].dataset
    hash_n, square_n = np.zeros(first.n_cells, np.uint64), np.zeros(first.n_cells if squares else 0)
    merged = [0] * len(files)
    try:
        progress.start(f"reading {phase} on the cluster", float(len(keys)), "parts")
        for (i, (a, b)), (n, hashes, sums) in gather(client, found, keys, progress, [1] * len(keys)):
            merged[i] += n
            if i == 0:
                cells = slice(None) if matrices[0].by_gene else slice(a, b)
                hash_n[cells] += hashes
                if squares:
                    square_n[cells] += sums
        progress.finish()
        progress.start(f"ranking {phase} on the cluster", float(n_genes), "genes")
        results = dict(gather(client, ranks, ranges, progress, [b - a for a, b in ranges]))
        progress.finish()
    finally:
        client.cancel([*found, *ranks])
    joined = [results[part] for part in ranges]
    return Ranked(
        result=joined[0][0].join([result for result, _ in joined]), hash_n=hash_n, square_n=square_n, merged=merged,
        buckets=None if keep is None else GeneBuckets.of([piece for _, piece in joined], size_k, axis=1),
    )  # fmt: skip


# -- on a worker -------------------------------------------------------------------------------------------------------


def _read_part(dataset: Dataset, part: Part, task: ReadTask) -> Sorted:
    """Sort the values of a part by gene."""
    matrix = dataset.matrix
    file = Input(dataset, task.codes, task.transform)
    spans = matrix.plan(start=part[0], stop=part[1])
    buckets = _make_buckets([file], [spans], task.size_k, math.inf)
    merged, hash_n, square_n = fill(buckets, file, spans, squares=task.squares, threads=1)
    if task.gene_order is not None:
        buckets.reorder(0, _count_blocks(matrix, spans), task.gene_order)
    if not matrix.by_gene:
        hash_n, square_n = hash_n[slice(*part)].copy(), square_n[slice(*part)].copy()
    return Sorted(list(starmap(buckets.cut, task.ranges)), merged, hash_n, square_n)


def _pick(read: Sorted, j: int) -> Piece:
    return read.pieces[j]


def _summarise(read: Sorted) -> tuple[int, np.ndarray, np.ndarray]:
    return read.merged, read.hash_n, read.square_n


def _rank_pieces(pieces: list[Piece], how: tuple[Ranking, np.ndarray, int | None]) -> tuple[Any, Piece | None]:
    """Rank a range of genes; also return the values of the group to keep."""
    ranking, size_k, keep = how
    buckets = GeneBuckets.of(pieces, size_k)
    result = ranking(buckets, threads=1, advance=lambda n: None)
    return result, None if keep is None else buckets.cut(0, buckets.n_genes, keep)
