"""Streamed sums over the cells of each group, for pseudobulks and tests of means."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vcelltools.differential.expression import SCALES, Transform
from vcelltools.differential.sorted_values import merge_duplicates
from vcelltools.io import Dataset
from vcelltools.io.chunks import Chunk, CscChunk, CsrChunk, DenseChunk
from vcelltools.io.faults import raise_fault
from vcelltools.io.matrix import Span
from vcelltools.io.remote import Part, choose_groups, get_place
from vcelltools.io.stream import run_spans
from vcelltools.kernels.faults import Fault
from vcelltools.kernels.groupsums import check_entries, dense_group_sums, sparse_group_sums, to_float
from vcelltools.kernels.scan import scan_values
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads

STATE_BYTES = 512 << 20
"""Memory limit of one accumulator per thread, in bytes; above it, the threads share one accumulator."""


@dataclass(frozen=True, kw_only=True)
class GroupSums:
    """Sums over the cells of each group; rows are groups, columns genes.

    Attributes
    ----------
    size_k
        (k,) int64 number of cells of each group.
    sums, squares
        (k, g, 2) int64 fixed-point Σx and Σx² (:func:`vcelltools.kernels.groupsums.to_float`); ``squares`` is None
        if it was not requested.
    nnz_kg
        (k, g) int64 number of cells with a value above zero.
    max_value
        The largest value of all cells, including those that were left out.
    n_merged
        Number of duplicate entries that were summed.
    """

    size_k: np.ndarray
    sums: np.ndarray
    squares: np.ndarray | None
    nnz_kg: np.ndarray
    max_value: float = 0.0
    n_merged: int = 0

    @property
    def sum_kg(self) -> np.ndarray:
        """(k, g) float64 sums."""
        return to_float(self.sums)

    @property
    def square_kg(self) -> np.ndarray:
        """(k, g) float64 sums of squares."""
        assert self.squares is not None
        return to_float(self.squares)

    def take(self, genes: np.ndarray) -> GroupSums:
        """Return the sums of some genes, in the given order."""
        squares = None if self.squares is None else self.squares[:, genes]
        return replace(self, sums=self.sums[:, genes], squares=squares, nnz_kg=self.nnz_kg[:, genes])

    def pool(self, group_k: np.ndarray, n_groups: int) -> GroupSums:
        """Return sums over several groups; ``group_k`` is the new group of each (negative: none)."""

        def add(values: np.ndarray) -> np.ndarray:
            out = np.zeros((n_groups, *values.shape[1:]), values.dtype)
            for k in np.flatnonzero(group_k >= 0):
                out[group_k[k]] += values[k]
            return out

        squares = None if self.squares is None else add(self.squares)
        return replace(self, size_k=add(self.size_k), sums=add(self.sums), squares=squares, nnz_kg=add(self.nnz_kg))


def sum_groups(
    dataset: Dataset,
    codes: np.ndarray,
    n_groups: int,
    transform: Transform | None,
    *,
    squares: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
    phase: str = "cells",
) -> GroupSums:
    """Stream a matrix once and sum the values of each group's cells.

    Parameters
    ----------
    codes
        (n,) group of every cell; negative if it is left out.
    transform
        The function of a chunk's values that is summed (:func:`vcelltools.differential.expression.make_transform`);
        None for the values themselves, which must then be counts.
    squares
        Also sum the squares.

    Returns
    -------
    GroupSums
        Bitwise the same for any layout, threads and order of cells, apart from the rounding of the transform.

    Raises
    ------
    DataError
        If an index is out of range, or a value is negative or not finite; the message names its cell and gene.
    NotCountsError
        If values that must be counts have fractional parts.
    """
    matrix = dataset.matrix
    codes = np.ascontiguousarray(codes, np.int32)
    if dataset.remote is not None:
        task = SumTask(codes=codes, n_groups=n_groups, transform=transform, squares=squares)
        return _sum_remotely(dataset, task, progress, phase)
    progress.start(f"reading {phase}", matrix.stored_bytes, "bytes")
    sums = _sum_spans(
        dataset, matrix.plan(), codes, n_groups, transform, squares=squares, threads=threads, progress=progress
    )  # fmt: skip
    progress.finish()
    return sums


@dataclass(frozen=True, kw_only=True)
class SumTask:
    """The arguments of :func:`sum_groups`, for the workers of a cluster."""

    codes: np.ndarray
    n_groups: int
    transform: Transform | None
    squares: bool


def _sum_remotely(dataset: Dataset, task: SumTask, progress: Progress, phase: str) -> GroupSums:
    """Sum on a cluster. The sums are integers, so the order in which the parts arrive does not matter."""
    matrix, (k, g) = dataset.matrix, (task.n_groups, dataset.n_genes)
    sums, squares = (np.zeros((k if wanted else 0, g, 2), np.int64) for wanted in (True, task.squares))
    nnz_kg, largest, merged = np.zeros((k, g), np.int64), 0.0, 0
    for part, (some, found) in dataset.remote.run(matrix, _sum_part, task, f"reading {phase}", progress):
        at = get_place(matrix, some, part)
        sums[at] += found.sums
        nnz_kg[at] += found.nnz_kg
        if task.squares:
            squares[at] += found.squares
        largest, merged = max(largest, found.max_value), merged + found.n_merged
    return GroupSums(
        size_k=np.bincount(task.codes[task.codes >= 0], minlength=k), sums=sums,
        squares=squares if task.squares else None, nnz_kg=nnz_kg, max_value=largest, n_merged=merged,
    )  # fmt: skip


def _sum_part(dataset: Dataset, part: Part, task: SumTask) -> tuple[np.ndarray, GroupSums]:
    """Return the groups that occur in a part of the matrix, and their sums over it (on a worker)."""
    matrix, codes = dataset.matrix, task.codes
    some, place = choose_groups(codes if matrix.by_gene else codes[slice(*part)], task.n_groups)
    sums = _sum_spans(
        dataset, matrix.plan(start=part[0], stop=part[1]), place[codes], len(some), task.transform,
        squares=task.squares, threads=1, progress=SILENT,
    )  # fmt: skip
    return some, sums.take(np.arange(*part)) if matrix.by_gene else sums


def _sum_spans(
    dataset: Dataset,
    spans: list[Span],
    codes: np.ndarray,
    n_groups: int,
    transform: Transform | None,
    *,
    squares: bool,
    threads: int | None,
    progress: Progress,
) -> GroupSums:
    matrix = dataset.matrix
    n, g = matrix.shape
    n_threads = get_threads(threads)
    shared = n_groups * g * (40 if squares else 24) * n_threads > STATE_BYTES

    def make_sums() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = n_groups * g
        return np.zeros((rows, 2), np.int64), np.zeros((rows if squares else 0, 2), np.int64), np.zeros(rows, np.int64)

    one = make_sums() if shared else None
    lock = threading.Lock() if shared else nullcontext()
    n_minor = max(n, g)

    def make_state() -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, list[Any]]:
        # the last stamp, the number of duplicates, and the largest value
        return one or make_sums(), np.zeros(0 if matrix.nnz is None else n_minor, np.int64), [0, 0, 0.0]

    def check(chunk: CsrChunk | CscChunk, seen: np.ndarray, counters: list[Any]) -> tuple[int, int]:
        found = check_entries(
            chunk.indptr, chunk.indices, chunk.data, chunk.n_minor, seen[: chunk.n_minor], counters[0] + 1
        )
        counters[0] += len(chunk.indptr)
        return found

    def compute(chunk: Chunk) -> np.ndarray:
        if transform is not None:
            return transform(chunk)
        values = chunk.values
        if scan_values(values, 0.0)[2]:
            raise_fault(Fault.NOT_WHOLE, chunk, int(np.flatnonzero(values != np.floor(values))[0]), dataset)
        return values

    def visit(state: tuple, chunk: Chunk, _: Span) -> None:
        sums, seen, counters = state
        if isinstance(chunk, DenseChunk):
            fault, at, _ = scan_values(chunk.values, 0.0)
            if fault:
                raise_fault(fault, chunk, at, dataset, hint=SCALES)
            chunk = replace(chunk, block=compute(chunk).reshape(chunk.block.shape))
        else:
            fault, at = check(chunk, seen, counters)
            if fault and fault != Fault.DUPLICATE:
                raise_fault(fault, chunk, at, dataset, hint=SCALES)
            chunk = replace(chunk, data=compute(chunk))
            if fault:
                indptr, indices, data, merged = merge_duplicates(chunk, chunk.data)
                chunk = replace(chunk, indptr=indptr, indices=indices, data=data)
                fault, at = check(chunk, seen, counters)
                if fault:
                    raise_fault(fault, chunk, at, dataset, hint=SCALES)
                counters[1] += merged
        counters[2] = max(counters[2], float(chunk.values.max(initial=0)))
        with lock:
            chunk.run(sparse_group_sums, dense_group_sums, codes, g, *sums)

    states = run_spans(matrix, spans, make_state, visit, threads=threads, progress=progress)
    total = states[0][0]
    for other, *_ in () if shared else states[1:]:
        for mine, theirs in zip(total, other, strict=True):
            np.add(mine, theirs, out=mine)
    return GroupSums(
        size_k=np.bincount(codes[codes >= 0], minlength=n_groups),
        sums=total[0].reshape(n_groups, g, 2),
        squares=total[1].reshape(n_groups, g, 2) if squares else None,
        nnz_kg=total[2].reshape(n_groups, g),
        max_value=max(s[2][2] for s in states),
        n_merged=sum(s[2][1] for s in states),
    )
