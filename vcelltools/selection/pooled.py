"""Rank genes by dispersion over several files as one population, and measure the share of variance between batches.

The dispersion is ``var / mean`` (ddof 1) of the values: counts (exact), log1p of counts, counts per 10,000, or log1p of
these. Only genes expressed in a minimum fraction of the cells can be selected; ties are broken by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import UsageError, spell
from vcelltools.genes.union import Member, Union, name_members, open_member, open_union, read_batches
from vcelltools.io.chunks import CsrChunk
from vcelltools.io.fingerprint import identify
from vcelltools.io.stream import map_spans
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.selection.hvg import HvgResult, get_versions
from vcelltools.selection.ranking import get_least_cells, sort_genes

VALUES = ("counts", "log1p", "cp10k", "log1p-cp10k")
MIN_SHARE = 0.001
_DOMINATES = 1.25  # ratio of the median shares of selected and all genes from which batches are considered dominant
_LARGE_SHARE = 0.1
_SPAN_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Per gene: mean, variance (ddof 1) and share of the variance between batches (NaN if constant)."""

    mean: np.ndarray
    variance: np.ndarray
    between_share: np.ndarray

    @property
    def dispersion(self) -> np.ndarray:
        """(g,) variance / mean, or 0 for genes that are not expressed."""
        return np.divide(self.variance, self.mean, out=np.zeros_like(self.mean), where=self.mean > 0)


@dataclass(frozen=True, kw_only=True)
class PooledResult(HvgResult):
    """A ranking of pooled cells, with the additional data for ``hvg_info.json`` and the figure.

    Attributes
    ----------
    n_positive
        (g,) number of cells with a count.
    n_expressed
        Number of genes expressed in the minimum fraction of the cells.
    counts, normalised
        Moments of counts and of log1p-cp10k, if requested.
    """

    n_positive: np.ndarray
    n_expressed: int
    counts: Moments
    normalised: Moments | None


def compute_pooled(
    files: Sequence[str | os.PathLike],
    *,
    top: int = 2000,
    values: str = "counts",
    min_share: float = MIN_SHARE,
    batch_effect: str | None = None,
    compare: bool = False,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> PooledResult:
    """Rank the genes of several files, as one population, by dispersion.

    Parameters
    ----------
    files
        Any files that :func:`vcelltools.io.open_dataset` opens, including batch files; a gene that a file lacks is 0
        there.
    values
        One of ``VALUES``; the library size of a cell is the sum over all genes of its file.
    min_share
        Minimum fraction of cells that express a selected gene.
    batch_effect
        obs column of the batch for ``between_share``; by default, each file is a batch.
    compare
        Whether to compute the moments of log1p-cp10k too, which the figure shows beside those of the counts.

    Raises
    ------
    UsageError
        If ``values`` is unknown, or a file is given twice.
    DataError
        If a file is damaged, does not hold counts, or lacks the column.
    """
    began = time.monotonic()
    if values not in VALUES:
        raise UsageError(f"values {values!r} are not known", hint=f"one of: {', '.join(VALUES)}")
    if top < 1:
        raise UsageError(f"top is {top}, but must be at least 1")
    part = {"modality": modality, "layer": layer, "feature_type": feature_type, "genome": genome}
    members = name_members(files, **part)
    with open_union(members, threads=threads, progress=progress) as union:
        batch, labels = read_batches(union, batch_effect)
        kinds = {"counts", values, *(["log1p-cp10k"] if compare else [])}
        found, n_positive = _sum_up(union, kinds, batch, len(labels), threads=threads, progress=progress)
        n = union.matrix.shape[0]
        names = np.array(union.genes.kept, object)
    least = max(1, get_least_cells(min_share, n))
    m = found[values]
    eligible = (n_positive >= least) & (m.mean > 0)
    score = np.where(eligible, m.dispersion, -np.inf)
    order = sort_genes(names, -score)[:top]
    order = order[eligible[order]]
    chosen = np.zeros(len(names), bool)
    chosen[order] = True
    columns = {
        "means": m.mean, "variances": m.variance, "dispersions": m.dispersion, "between_share": m.between_share,
        "n_cells": n_positive, "highly_variable": chosen,
    }  # fmt: skip
    warnings = _describe(chosen, eligible, m.between_share, labels, batch_effect, top, least)
    settings = {"flavor": "dispersion", "pooled": True, "top": top, "values": values, "min_share": min_share,
                "batch_effect": batch_effect, **part, "layer": layer or "X"}  # fmt: skip
    return PooledResult(
        genes=names,
        labels=names,
        columns=columns,
        order=order,
        settings=settings,
        source=[_identify(x) for x in members],
        versions=get_versions(),
        n_cells=n,
        bytes_read=sum(p.stat().st_size for p in map(Path, files) if p.is_file()),
        seconds=time.monotonic() - began,
        warnings=tuple(warnings),
        n_positive=n_positive,
        n_expressed=int(np.count_nonzero(n_positive >= least)),
        counts=found["counts"],
        normalised=found.get("log1p-cp10k"),
    )


def _identify(m: Member) -> dict[str, Any]:
    with open_member(m) as ds:
        return identify(ds)


def _sum_up(
    union: Union, kinds: set[str], batch: np.ndarray, n_batches: int, *, threads: int | None, progress: Progress
) -> tuple[dict[str, Moments], np.ndarray]:
    """Return (kind -> moments, cells with a count per gene), in one pass.

    Sums of floats are added span by span, in order, so the result does not depend on the number of threads.
    """
    from vcelltools.kernels.pooled import add_counts, add_values

    m = union.matrix
    n, g = m.shape
    library = union.survey.umi_count
    floats = [k for k in VALUES[1:] if k in kinds]

    def make(chunk: Any, span: Any) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, ...]]]:
        assert isinstance(chunk, CsrChunk)
        cells = slice(chunk.start, chunk.start + chunk.n_rows)
        here, code = np.unique(batch[cells], return_inverse=True)
        sums = np.zeros((len(here), g), np.int64)
        low, high, positive = (np.zeros(g, np.int64) for _ in range(3))
        rows = (chunk.indptr, chunk.indices, chunk.data)
        add_counts(*rows, code.astype(np.int64), sums, low, high, positive)
        out: dict[str, tuple[np.ndarray, ...]] = {"counts": (sums, low, high, positive)}
        for kind in floats:
            factor = np.ones(chunk.n_rows)
            if "cp10k" in kind:
                factor = np.divide(1e4, library[cells], out=np.zeros(chunk.n_rows), where=library[cells] > 0)
            some, squares = np.zeros((len(here), g)), np.zeros(g)
            add_values(*rows, factor, kind.startswith("log1p"), code.astype(np.int64), some, squares)
            out[kind] = (some, squares)
        return here, out

    if n_batches * g * 8 * (1 + len(floats)) > 2 << 30:
        raise UsageError(f"{n_batches:,} batches of {g:,} genes do not fit in memory", hint="choose a coarser column")
    int_sums = np.zeros((n_batches, g), np.int64)
    low, high, positive = (np.zeros(g, np.int64) for _ in range(3))
    sums = {k: np.zeros((n_batches, g)) for k in floats}
    squares = {k: np.zeros(g) for k in floats}
    progress.start("adding up", m.stored_bytes, "bytes")
    for here, part in map_spans(m, m.plan(max_values=_SPAN_VALUES), make, threads=threads, progress=progress):
        some, a, b, c = part["counts"]
        int_sums[here] += some
        low += a
        high += b
        positive += c
        for k in floats:
            sums[k][here] += part[k][0]
            squares[k] += part[k][1]
    progress.finish()
    n_k = np.bincount(batch, minlength=n_batches)
    exact = np.array([float(a + (b << 32)) for a, b in zip(low.tolist(), high.tolist(), strict=True)])
    out = {"counts": _get_moments(int_sums.astype(np.float64), exact, n_k, n)}
    out |= {k: _get_moments(sums[k], squares[k], n_k, n) for k in floats}
    return out, positive


def _get_moments(sums_kg: np.ndarray, squares: np.ndarray, n_k: np.ndarray, n: int) -> Moments:
    total = sums_kg.sum(axis=0)
    mean = total / n
    within_total = squares - total * mean  # sum of squares of the values about their mean
    ss_total = np.maximum(within_total, 0.0)
    some = n_k > 0
    mean_kg = sums_kg[some] / n_k[some, None]
    ss_between = (n_k[some, None] * np.square(mean_kg - mean)).sum(axis=0)
    rounding = 1e-12 * squares
    varies = ss_total > rounding
    share = np.full(len(mean), np.nan)
    share[varies] = np.clip(ss_between[varies] / ss_total[varies], 0.0, 1.0)
    return Moments(mean=mean, variance=ss_total / max(n - 1, 1), between_share=share)


def _describe(
    chosen: np.ndarray, eligible: np.ndarray, share: np.ndarray, labels: list[str], column: str | None, top: int,
    least: int,
) -> list[str]:  # fmt: skip
    out = []
    if int(eligible.sum()) < top:
        out.append(
            f"{int(eligible.sum()):,} genes are expressed in at least {least:,} cells; all of them were selected"
        )
    if len(labels) > 1 and chosen.any():
        mine, all_ = get_medians(chosen, share)
        if mine is not None and all_ is not None and mine > max(_DOMINATES * all_, _LARGE_SHARE):
            key = spell("batch_key", column) if column else f"{spell('batch_key')} with the column of the experiment"
            out.append(
                f"{mine:.1%} of the variance of the selected genes lies between batches, compared with {all_:.1%} "
                "for all genes: "
                f"the ranking reflects batches; to rank within each batch, use {key}"
            )
    return out


def get_medians(chosen: np.ndarray, share: np.ndarray) -> tuple[float | None, float | None]:
    """Return the median between_share of the selected genes and of all varying genes; None if no gene varies."""
    known = ~np.isnan(share)
    mine = share[chosen & known]
    return (float(np.median(mine)) if len(mine) else None), (float(np.median(share[known])) if known.any() else None)
