"""Determine the scale of a matrix, and transform its values to log1p of normalised counts.

The rules are those of cell-eval: a matrix with any fractional part above 1e-3 is log1p-normalised. Any other matrix
holds counts, which are scaled to the median library size of the file and log1p-transformed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io import Dataset, DenseMatrix
from vcelltools.io.chunks import Chunk, CscChunk, CsrChunk, DenseChunk
from vcelltools.io.counts import find_log_base
from vcelltools.io.faults import raise_fault
from vcelltools.io.library import check_library, read_library, suggest_library
from vcelltools.io.matrix import Matrix, Span
from vcelltools.io.remote import Part
from vcelltools.io.stream import plan_blocks, run_spans
from vcelltools.kernels.scan import csc_row_sums, csr_row_sums, scan_values
from vcelltools.runtime.progress import SILENT, Progress

SCALES = "expression is counts or log1p of them"
"""The message about a value that is neither."""
FRACTION = 1e-3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The scale of the values of a matrix.

    Attributes
    ----------
    kind
        ``"log1p"`` or ``"counts"``.
    library_n
        (n,) float64 total of each cell in natural units, if it was needed; for counts, the requested library size.
    log_base
        Base of the logarithm of log1p values, which are converted to natural logarithms.
    target_sum
        The total that each cell was scaled to, as found in log1p values; None if there is no common total.
    notes
        Notes for the user.
    """

    kind: str
    library_n: np.ndarray | None = None
    log_base: float = math.e
    target_sum: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def to_natural(self) -> float:
        """Factor that converts log1p values to natural logarithms; exactly 1 if they already are."""
        return 1.0 if self.log_base == math.e else math.log(self.log_base)

    @property
    def empty(self) -> bool:
        """Whether no value is above zero, so that counts and log1p values are the same."""
        return self.library_n is not None and not self.library_n.any()


def find_scale(
    dataset: Dataset,
    *,
    with_library: bool = False,
    assume_natural: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Scale:
    """Decide between counts and log1p values with as little reading as possible; counts also give library sizes.

    Parameters
    ----------
    assume_natural
        Treat log1p values as natural logarithms even if the file states another base, as cell-eval does.

    Raises
    ------
    DataError
        If a value is negative or not finite; the message names its cell and gene.
    """
    matrix = dataset.matrix
    # nearly every log1p file has a fractional part in its first few values
    extent = matrix.shape[matrix.by_gene]
    head = matrix.plan(max_values=4096, stop=min(extent, 64))[:1]
    fractions: list[bool] = []
    run_spans(matrix, head, lambda: None, lambda _, chunk, span: fractions.append(_look(dataset, chunk)), threads=1)
    library_n, found = None, any(fractions)
    if not found:
        library_n, found = _sum_rows(dataset, None, threads, progress)
    if not found:
        assert library_n is not None
        return _make_count_scale(dataset, library_n)
    if dataset.library_col is not None:
        raise DataError(
            f"{dataset.label} holds log1p values, which are normalised already",
            hint=f"pass counts, or leave {spell('library_size')} out",
        )
    base, target, notes = find_log_base(dataset)
    if assume_natural:
        if notes:
            notes.append(
                f"{dataset.label}: these rules treat log1p values as natural logarithms, so the base was ignored"
            )
        base = math.e
    scale = Scale(kind="log1p", log_base=base, target_sum=target, notes=tuple(notes))
    if not with_library:
        return scale
    return replace(scale, library_n=_sum_rows(dataset, scale.to_natural, threads, progress)[0])


def _look(dataset: Dataset, chunk: Chunk) -> bool:
    """Return whether a chunk holds a value with a fractional part; raise if one is negative or not finite."""
    fault, position, fraction = scan_values(chunk.values, FRACTION)
    if fault:
        raise_fault(fault, chunk, position, dataset, hint=SCALES)
    return bool(fraction)


def _make_count_scale(dataset: Dataset, counted_n: np.ndarray) -> Scale:
    """Return the scale of counts: divided by the requested library sizes, or by their sums."""
    column = dataset.library_col
    if column is None:
        return Scale(kind="counts", library_n=counted_n, notes=tuple(suggest_library(dataset, counted_n)))
    given = read_library(dataset, column)
    check_library(given, counted_n, column)
    return Scale(kind="counts", library_n=given)


def _sum_rows(
    dataset: Dataset, to_natural: float | None, threads: int | None, progress: Progress
) -> tuple[np.ndarray, bool]:
    """Return (n,) totals of the cells, of the values or of expm1 of the values times ``to_natural``.

    Also return whether a value has a fractional part.
    """
    matrix = dataset.matrix
    # in a file stored gene by gene, totals of fractions depend on how the genes are divided
    if dataset.remote is None or (matrix.by_gene and to_natural is not None):
        return _sum_spans(dataset, plan_blocks(matrix), to_natural, threads, progress)
    library_n, found = np.zeros(matrix.shape[0]), False
    for (a, b), (total, some) in dataset.remote.run(matrix, _sum_part, to_natural, "library sizes", progress):
        library_n[slice(None) if matrix.by_gene else slice(a, b)] += total
        found = found or some
    return library_n, found


def _sum_part(dataset: Dataset, part: Part, to_natural: float | None) -> tuple[np.ndarray, bool]:
    """Return the totals of a range of cells, or of all cells over a range of genes (on a worker)."""
    matrix = dataset.matrix
    library_n, found = _sum_spans(dataset, matrix.plan(start=part[0], stop=part[1]), to_natural, 1, SILENT)
    return (library_n if matrix.by_gene else library_n[slice(*part)].copy()), found


def _sum_spans(
    dataset: Dataset, spans: list[Span], to_natural: float | None, threads: int | None, progress: Progress
) -> tuple[np.ndarray, bool]:
    matrix = dataset.matrix
    fractions = set()

    def add(partial_n: np.ndarray, chunk: Chunk, span: Span) -> None:
        fractions.add(_look(dataset, chunk))
        _add_row_sums(dataset, chunk, to_natural, partial_n)

    alone = matrix.by_gene  # every span has values of every cell
    library_n = np.zeros(matrix.shape[0])
    states = run_spans(
        matrix, spans, (lambda: np.zeros(matrix.shape[0])) if alone else (lambda: library_n), add, threads=threads,
        progress=progress,
    )  # fmt: skip
    for s in states if alone else ():
        library_n += s
    return library_n, True in fractions


def _add_row_sums(dataset: Dataset, chunk: Chunk, to_natural: float | None, library_n: np.ndarray) -> None:
    natural = to_natural is not None
    data = chunk.values
    if to_natural not in (None, 1.0):
        data = data.astype(np.float64) * to_natural
    if isinstance(chunk, CsrChunk):
        csr_row_sums(chunk.indptr, data, natural, library_n[chunk.start : chunk.start + chunk.n_rows])
    elif isinstance(chunk, CscChunk):
        fault, position = csc_row_sums(chunk.indices, data, natural, library_n)
        if fault:
            raise_fault(fault, chunk, position, dataset)
    else:
        assert isinstance(chunk, DenseChunk)
        block = data.reshape(chunk.block.shape).astype(np.float64)
        rows = slice(chunk.row_start, chunk.row_start + len(block))
        library_n[rows] += (np.expm1(block) if natural else block).sum(axis=1)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A function of the values of a chunk, made by :func:`make_transform`; it holds no file, so a worker can have it.

    Attributes
    ----------
    kind
        The precision of the computation.
    to_natural
        Factor that converts log1p values to natural logarithms.
    factor_n
        (n,) divisors of the cells, or None to keep the scale of the values.
    undo
        Whether the values are log1p values, which are first converted to natural units.
    cp10k
        Whether the divided values are multiplied by ten thousand.
    widen
        Whether the result is float64 whatever the precision.
    """

    kind: np.dtype
    to_natural: float
    factor_n: np.ndarray | None = None
    undo: bool = False
    cp10k: bool = False
    widen: bool = False

    def __call__(self, chunk: Chunk) -> np.ndarray:
        """Return the transformed values of a chunk."""
        out = self._transform(chunk)
        return out.astype(np.float64, copy=False) if self.widen else out

    def get_dtype(self, matrix: Matrix) -> np.dtype:
        """Return the dtype of the transformed values of a matrix."""
        if self.widen or (self.factor_n is None and matrix.chunk_dtype.kind != "f"):
            return np.dtype(np.float64)
        return matrix.chunk_dtype if self.factor_n is None else self.kind

    def _transform(self, chunk: Chunk) -> np.ndarray:
        to_natural = self.kind.type(self.to_natural)
        if self.factor_n is None:
            if to_natural != 1:
                return chunk.values * to_natural
            return chunk.values if chunk.values.dtype.kind == "f" else chunk.values.astype(np.float64)
        values = chunk.values.astype(self.kind)  # a copy, because the buffer of the chunk is reused
        if self.undo:
            np.expm1(values * to_natural if to_natural != 1 else values, out=values)
        values /= chunk.spread(self.factor_n)
        if self.cp10k:
            values *= self.kind.type(1e4)
        return np.log1p(values, out=values)


def make_transform(
    matrix: Matrix, scale: Scale, *, raw: bool = False, cp10k: bool = False, wide: bool = False, widen: bool = False
) -> Transform:
    """Return the function that transforms the values of a chunk to the compared scale.

    Parameters
    ----------
    raw
        Do not transform counts.
    cp10k
        Transform both counts and log1p values to log1p of counts per ten thousand. Counts are first divided by the
        total of the cell, so that equal shares give equal numbers in any precision.
    wide
        Compute in float64.
    widen
        Return float64, whatever the precision of the computation.

    Notes
    -----
    Counts follow scanpy's ``normalize_total`` and ``log1p`` step by step in the precision of the matrix (float32 for
    integers). Equal values must stay equal, because ties decide ranks. scanpy's median excludes empty cells of a dense
    matrix and includes those of a sparse one.
    """
    kind = np.dtype(np.float64 if wide or matrix.chunk_dtype == np.float64 else np.float32)
    if raw or scale.empty or (scale.kind == "log1p" and not cp10k):
        return Transform(kind=kind, to_natural=scale.to_natural, widen=widen)
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
    return Transform(
        kind=kind, to_natural=scale.to_natural, factor_n=factor_n, undo=scale.kind == "log1p", cp10k=cp10k, widen=widen
    )  # fmt: skip
