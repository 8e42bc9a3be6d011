"""Reduce a file of cells to groups × genes, in one pass and bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vcelltools.differential.cell_labels import Cells, count_copies
from vcelltools.differential.expression import Scale, make_transform
from vcelltools.differential.partial_sums import PartialSums, make_plan
from vcelltools.differential.ranks import MAX_GROUPS, GeneBuckets, RankSums
from vcelltools.differential.sorted_values import Input, Ranked, Ranking, rank_files
from vcelltools.errors import DataError
from vcelltools.io import Dataset, DenseMatrix
from vcelltools.io.matrix import Matrix
from vcelltools.runtime.progress import SILENT, Progress

LOG1P_LIMIT = 15.0
SPILL_BYTES = 64 << 20
"""Largest memory for the sorted values of a file that may be spilled, in bytes."""
COPIES = 0.01
"""Share of copied cells above which a note is given."""


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
        List to which the sorted values are appended, for later use; from a cluster, those of the controls alone.
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
    position = cells.labels.index(control)
    dtype = np.dtype(np.float64) if options.wide else _value_dtype(matrix, scale, raw, options)
    how = RankAll(plan=plan, control=position, dtype=dtype, sparse=not isinstance(matrix, DenseMatrix), options=options)
    n_groups = len(cells.labels) if plan is None else plan.n_slots
    found = rank_sources(
        sources, n_groups, how, options, notes, raw=raw, gene_order=gene_order,
        keep=None if keep is None else position, progress=progress, phase=phase,
    )  # fmt: skip
    sums: RankSums = found.result
    copied, square_k = 0.0, None
    if codes is None:
        copied = get_copied_share(dataset.label, cells, control, found.hash_n, notes)
        used = cells.codes >= 0
        if options.spread:
            square_k = np.bincount(cells.codes[used], found.square_n[used], len(cells.labels))
    if not options.raw and not options.cp10k:
        check_log1p(dataset.label, scale, sums.max_value)
    if keep is not None and found.buckets is not None:
        keep.append(found.buckets)
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


def rank_sources(
    sources: list[tuple[Dataset, np.ndarray, Scale]],
    n_groups: int,
    ranking: Ranking,
    options: ReadOptions,
    notes: list[str],
    *,
    raw: bool = False,
    **how: Any,
) -> Ranked:
    """Rank files with the codes and scales of their cells; ``how`` as in :func:`rank_files`."""
    files = [
        Input(
            data,
            codes,
            make_transform(data.matrix, s, raw=raw, cp10k=options.cp10k, wide=options.wide, widen=options.wide),
        )
        for data, codes, s in sources
    ]
    found = rank_files(
        files, n_groups, ranking, squares=options.spread, limit=SPILL_BYTES if options.spill else math.inf,
        threads=options.threads, **how,
    )  # fmt: skip
    for file, n in zip(files, found.merged, strict=True):
        if n:
            notes.append(f"{file.dataset.label}: {n:,} duplicate entries were summed")
    return found


@dataclass(frozen=True, kw_only=True)
class RankAll:
    """Rank every gene of sorted values, with sums in the precision and order of the options.

    Attributes
    ----------
    plan
        The partial sums that are the groups of the values, or None if these are the groups themselves.
    control, dtype, sparse
        As in :class:`Reduced`.
    """

    plan: PartialSums | None
    control: int
    dtype: np.dtype
    sparse: bool
    options: ReadOptions

    def __call__(self, buckets: GeneBuckets, *, threads: int, advance: Callable[[float], None]) -> RankSums:
        """Return the results of all genes in the buckets."""
        o, single = self.options, None
        if o.single and self.plan is None:
            size_k = buckets.size_k.astype(self.dtype)
            inverse = np.divide(1, size_k, out=np.ones_like(size_k), where=size_k > 0)
            single = inverse if self.sparse else np.ones_like(size_k)
        pair_kg = None if self.plan is None else buckets.sum_pairwise(self.plan, threads=threads)
        sums = buckets.rank_sum(
            self.control, test=o.test, continuity=o.continuity, exact=o.exact, moment=o.moment, single=single,
            threads=threads, advance=advance,
        )  # fmt: skip
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
