"""Assign guides to cells, from the counts of a guide library.

The matrix of the guides is streamed twice. The first pass counts, for each guide, the cells with each count. A mixture
of background and signal is fitted to these histograms and gives a threshold for every guide. The second pass lists the
guides of each cell whose counts reach the threshold. Both are exact: the result does not depend on chunks or threads.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError, VcellError, check_number, checked, spell
from vcelltools.files.chosen_cells import ExtendedTable
from vcelltools.files.convert import ConvertResult, copy_cells
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.chunks import Chunk
from vcelltools.io.dataset import list_choices
from vcelltools.io.features import read_types
from vcelltools.io.frame import write_frame
from vcelltools.io.results import Shown
from vcelltools.io.stream import map_spans
from vcelltools.io.table import Column
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.screens.page import write_guide_page
from vcelltools.screens.targets import NON_TARGETING, Targets, read_targets
from vcelltools.screens.thresholds import Fits, fit
from vcelltools.selection.statistics import scan

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

METHODS = ("mixture", "negative-binomial", "threshold")
SEPARATOR = "|"
STATUSES = ("unassigned", "one guide", "several guides")
_NAMES = re.compile(r"guide|grna|crispr|perturb", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class GuideResult(Shown):
    """The guides that were assigned to every cell.

    Attributes
    ----------
    source, modality, method
        The source, the modality or feature type of the guides, and the method of assignment.
    part
        The arguments of :func:`vcelltools.io.open_dataset` that open the guides.
    cells, guides, targets
        (n,) names of the cells; (g,) names of the guides, and (g,) their targets.
    how
        Description of the source of the targets.
    indptr, indices
        (n + 1,), (nnz,) int64: the guides of each cell, increasing.
    counts_n
        (n,) int64: total counts of all guides in the cell.
    fits
        The thresholds.
    notes, warnings
        Notes and warnings for the user.
    """

    source: str
    modality: str | None
    part: dict[str, str | None]
    method: str
    cells: np.ndarray
    guides: np.ndarray
    targets: np.ndarray
    how: str
    indptr: np.ndarray
    indices: np.ndarray
    counts_n: np.ndarray
    fits: Fits
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def n_guides(self) -> np.ndarray:
        """(n,) int32: number of guides of each cell."""
        return np.diff(self.indptr).astype(np.int32)

    def _join(self, names: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Return (codes of the cells' labels or -1, sorted labels, number of distinct names per cell)."""
        levels, code_g = np.unique(names.astype(str), return_inverse=True)
        rows = np.repeat(np.arange(len(self.cells)), np.diff(self.indptr))
        pairs = np.unique(rows * len(levels) + code_g[self.indices]) if len(rows) else np.zeros(0, np.int64)
        rows, code = pairs // len(levels), pairs % len(levels)
        n_each = np.bincount(rows, minlength=len(self.cells)).astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(n_each)])
        codes = np.full(len(self.cells), -1, np.int32)
        found: dict[tuple[int, ...], int] = {}
        single = n_each == 1
        codes[single] = [found.setdefault((c,), len(found)) for c in code[ends[:-1][single]].tolist()]
        for i in np.flatnonzero(n_each > 1).tolist():
            codes[i] = found.setdefault(tuple(code[ends[i] : ends[i + 1]].tolist()), len(found))
        labels = [SEPARATOR.join(levels[list(k)]) for k in found]
        order = sorted(range(len(labels)), key=labels.__getitem__)
        rank = np.full(len(labels) + 1, -1, np.int32)
        rank[order] = np.arange(len(labels))
        return rank[codes], [labels[i] for i in order], n_each

    def get_columns(self) -> dict[str, Column]:
        """Return the columns that describe the cells: guides, n_guides, target_gene, n_targets, guide_status, …"""
        guides, guide_labels, _ = self._join(self.guides)
        target, target_labels, n_targets = self._join(self.targets)
        status = np.minimum(self.n_guides, 2)

        def make(name: str, codes: np.ndarray, labels: list[str]) -> Column:
            return Column(name=name, codes=codes.astype(np.int32), categories=np.array(labels, dtype=object))

        return {
            "guides": make("guides", guides, guide_labels),
            "n_guides": Column(name="n_guides", values=self.n_guides),
            "target_gene": make("target_gene", target, target_labels),
            "n_targets": Column(name="n_targets", values=n_targets),
            "single_target": Column(name="single_target", values=n_targets == 1),
            "guide_status": make("guide_status", status, list(STATUSES)),
            "guide_counts": Column(name="guide_counts", values=self.counts_n),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row per cell: guides, n_guides, target_gene, n_targets, single_target, guide_status, counts."""
        import pandas as pd

        from vcelltools.io.table import get_series

        frame = pd.DataFrame({name: get_series(c) for name, c in self.get_columns().items()})
        return frame.set_index(pd.Index(self.cells.astype(str), name="cell"))

    def guide_frame(self) -> pd.DataFrame:
        """Return one row per guide: target, cells with counts, cells with the guide, threshold, fit."""
        import pandas as pd

        f = self.fits
        n_cells = np.bincount(self.indices, minlength=len(self.guides))
        return pd.DataFrame(
            {
                "target": self.targets, "cells_with_counts": f.histograms.expressing(0), "cells": n_cells,
                "threshold": f.threshold_g, "own_fit": f.own_g, "share": f.params_gk[:, 0],
                "background": f.params_gk[:, 1], "signal": f.params_gk[:, 3],
            },
            index=pd.Index(self.guides.astype(str), name="guide"),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the summary."""
        n = self.n_guides
        _, labels, n_targets = self._join(self.targets)
        return {
            "source": self.source, "modality": self.modality, "method": self.method, "targets_from": self.how,
            "n_cells": len(self.cells), "n_guides": len(self.guides),
            "n_targets": len(set(self.targets.tolist()) - {NON_TARGETING}),
            "unassigned": int((n == 0).sum()), "one_guide": int((n == 1).sum()),
            "several_guides": int((n > 1).sum()), "one_target": int((n_targets == 1).sum()),
            "non_targeting": int(np.count_nonzero(self._join(self.targets)[0] == labels.index(NON_TARGETING)))
            if NON_TARGETING in labels else 0,
            "without_own_fit": int((~self.fits.own_g).sum()), "notes": self.notes, "warnings": self.warnings,
        }  # fmt: skip

    def write(self, out: str | os.PathLike, *, force: bool = False) -> Path:
        """Write one row per cell (cell, guides, n_guides, target, …) as Parquet, feather or CSV, by the file name."""
        import pyarrow as pa

        columns: dict[str, Any] = {"cell": pa.array(self.cells.astype(str))}
        for name, c in self.get_columns().items():
            key = "target" if name == "target_gene" else name
            columns[key] = pa.array(c.labels(exact=True), pa.string()) if c.codes is not None else pa.array(c.values)
        return write_frame(out, columns, force=force)

    def write_page(self, out: str | os.PathLike, *, force: bool = False) -> Path:
        """Write the calibration page, one HTML file with the histogram and threshold of every guide."""
        return write_guide_page(self.guide_frame(), self.to_json(), self.fits, out, force=force)

    def write_labelled(
        self,
        source: str | os.PathLike | AnnData,
        out: str | os.PathLike,
        *,
        single: bool = False,
        modality: str | None = None,
        layer: str | None = None,
        feature_type: str | None = None,
        genome: str | None = None,
        force: bool = False,
        threads: int | None = None,
        progress: Progress = SILENT,
    ) -> ConvertResult:
        """Write the transcriptome of a file as a new h5ad file with the guides of each cell in obs.

        Parameters
        ----------
        source
            The file with the transcriptome; cells are matched by name.
        single
            Keep only cells whose guides have exactly one target.
        modality, layer, feature_type, genome
            The matrix to write as X; by default the counts of the transcriptome. Layers, obsm and uns are copied.

        Raises
        ------
        DataError
            If names of cells are not unique, no cell has a guide, or no cell is left.
        """
        with open_dataset(source, modality=modality, layer=layer, feature_type=feature_type, genome=genome) as ds:
            at = match_cells(ds.obs.index, self.cells, ds.label)
            columns = {k: _take(c, at) for k, c in self.get_columns().items()}
            rows = np.flatnonzero(columns["single_target"].values) if single else None  # type: ignore[arg-type]
            if rows is not None and not len(rows):
                raise DataError(f"{ds.label}: no cell has guides with exactly one target")
            obs = ExtendedTable(ds.obs, columns)
            packing = {"compression": None, "level": None, "force": force}
            return copy_cells(ds, out, [source], rows, ["all"], {}, packing, threads, progress, obs=obs)


def match_cells(names: np.ndarray, known: np.ndarray, where: str) -> np.ndarray:
    """Return (n,) int64 positions of ``names`` among ``known``; -1 for missing names.

    Raises
    ------
    DataError
        If a name belongs to several cells.
    """
    if np.array_equal(names, known):
        return np.arange(len(names))
    place = {v: i for i, v in enumerate(known.tolist())}
    if len(place) < len(known) or len(set(names.tolist())) < len(names):
        raise DataError(f"{where}: the names of the cells are not unique, so guides cannot be matched to cells")
    at = np.array([place.get(v, -1) for v in names.tolist()], np.int64)
    if (at < 0).all():
        raise DataError(f"{where}: none of its cells has counts of guides")
    return at


def _take(column: Column, at: np.ndarray) -> Column:
    """Return the column at these positions, with missing values at -1."""
    if column.codes is not None:
        fill = 0 if column.name == "guide_status" else -1
        codes = np.where(at < 0, fill, column.codes[at])
        return Column(name=column.name, codes=codes.astype(np.int32), categories=column.categories)
    assert column.values is not None
    return Column(name=column.name, values=np.where(at < 0, column.values.dtype.type(0), column.values[at]))


def open_guides(
    source: str | os.PathLike | AnnData,
    *,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
) -> Dataset:
    """Open the counts of the guides: a modality of an h5mu file, or the features of type ``CRISPR Guide Capture``.

    Parameters
    ----------
    modality, feature_type
        The modality or the feature type; by default the only one whose name indicates guides.
    layer
        As in :func:`vcelltools.io.open_dataset`.

    Raises
    ------
    DataError
        If there are no guides, or several candidates.
    """
    if modality is not None or feature_type is not None:
        return open_dataset(source, modality=modality, layer=layer, feature_type=feature_type)
    names = list(dict.fromkeys(m for m, _ in list_choices(source) if m is not None))
    if not names:
        names = _list_types(source)
    found = [m for m in names if _NAMES.search(m)]
    if len(found) == 1:
        return open_dataset(source, modality=found[0], layer=layer)
    label = os.fspath(source) if isinstance(source, str | os.PathLike) else "AnnData"
    there = ", ".join(names) or "no modalities and no feature types"
    if not found:
        raise DataError(
            f"{label} has no modality of guides ({there})",
            hint=f"set {spell('modality')} to the modality of the guides",
        )
    raise DataError(
        f"{label} has several modalities of guides: {', '.join(found)}", hint=f"set {spell('modality')} to one of them"
    )


def _list_types(source: str | os.PathLike | AnnData) -> list[str]:
    """Return the feature types of a file that is not an h5mu file."""
    with open_dataset(source, feature_type="all") as ds:
        found = read_types(ds.var)
        types = [] if found is None else list(dict.fromkeys(v for v in found[1] if v))
        return [] if "protein_coding" in types else types  # the types are biotypes, which include guide_RNA


def _get_genes(source: Any) -> list[str]:
    """Return the names of the measured genes, or none if the file has no separate transcriptome."""
    try:
        with open_dataset(source) as ds:
            return ds.var.index.tolist()
    except VcellError:
        return []


@checked
def guides(
    source: str | os.PathLike | AnnData,
    *,
    method: str = "mixture",
    threshold: int | None = None,
    targets: str | os.PathLike | None = None,
    target_col: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> GuideResult:
    """Assign guides to cells.

    Parameters
    ----------
    source
        An h5mu file with a modality of guides, or a 10x or h5ad file with features of type ``CRISPR Guide Capture``.
    method
        ``"mixture"``: a Poisson background and a normal signal of log2 counts for each guide (Replogle et al. 2020).
        ``"negative-binomial"``: two negative binomials of the counts. ``"threshold"``: a fixed count. A guide with too
        few counts for a fit gets the threshold of a fit to all guides together.
    threshold
        For ``"threshold"``: the smallest count that assigns a guide.
    targets
        A CSV file of guides and their targets.
    target_col
        Column of the guides' var with their targets; by default a usual one, or else their names are parsed.
    modality, feature_type
        Modality or feature type of the guides, if it is not found by its name.
    layer
        Layer with the counts of the guides.

    Raises
    ------
    DataError
        If there are no guides, values are not counts, or a guide has no target.
    UsageError
        If the method is not known, or only one of ``threshold`` and that method is given.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.guides("screen.h5mu").to_json()["n_guides"]
    5
    """
    if method not in METHODS:
        raise UsageError(
            f"method {method!r} is not known", hint=f"set {spell('method')} to one of: {', '.join(METHODS)}"
        )
    if (threshold is None) == (method == "threshold"):
        verb = "needs" if threshold is None else "can only be used with"
        raise UsageError(f"{spell('threshold')} {verb} {spell('method', 'threshold')}", hint="pass both or neither")
    check_number("threshold", threshold, low=1)
    with open_guides(source, modality=modality, layer=layer, feature_type=feature_type) as ds:
        stats = scan(ds, threads=threads, progress=progress, phase="counting guides")
        names = ds.var.index
        if len(set(names.tolist())) < len(names):
            raise DataError(
                f"{ds.label}: the names of the guides are not unique", hint="give every guide a unique name"
            )
        genes = _get_genes(source) if targets is None else []
        said = read_targets(ds.var, table=targets, column=target_col, genes=genes)
        fits = fit(stats.histograms, method, threshold, threads=threads)
        indptr, indices = _assign(ds, fits.threshold_g, threads=threads, progress=progress)
        return GuideResult(
            source=ds.label, modality=ds.modality or ds.feature_type, part=ds.part, method=method,
            cells=ds.obs.index, guides=names, targets=said.labels, how=said.how, indptr=indptr, indices=indices,
            counts_n=stats.library_size,
            fits=fits, notes=[*ds.notes, *said.notes], warnings=_find_doubts(indptr, fits, said),
        )  # fmt: skip


def _find_doubts(indptr: np.ndarray, fits: Fits, targets: Targets) -> list[str]:
    out = []
    share = float((np.diff(indptr) == 0).mean())
    if share > 0.5:
        out.append(f"{share:.0%} of the cells have no guide; inspect the calibration page")
    if NON_TARGETING not in targets.labels:
        out.append(f"no guide is recognised as {NON_TARGETING}; set the label of the controls in later commands")
    if n := int((~fits.own_g).sum()):
        out.append(f"{n:,} guides have too few counts for their own fit and use the threshold of all guides together")
    return out


def _assign(
    ds: Dataset, threshold_g: np.ndarray, *, threads: int | None, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Return (indptr, indices) of the guides of each cell whose counts reach the threshold."""
    m = ds.matrix
    n, g = m.shape

    def make(chunk: Chunk, span: object) -> np.ndarray:
        rows, cols, data = chunk.get_entries()
        key, at = np.unique(rows.astype(np.int64) * g + cols, return_inverse=True)  # duplicate entries are summed
        total = np.bincount(at, weights=data, minlength=len(key))
        return key[total >= threshold_g[key % g]]

    progress.start("assigning guides", m.stored_bytes, "bytes")
    parts = list(map_spans(m, m.plan(), make, threads=threads, progress=progress))
    progress.finish()
    key = np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(key // g, minlength=n))]).astype(np.int64)
    return indptr, key % g


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The agreement of two assignments of the same cells.

    Attributes
    ----------
    n_cells
        Number of cells compared.
    same
        Number of cells with the same guides in both.
    both_single, same_single
        Number of cells with one guide in both, and of those in which it is the same.
    pairs, found, extra
        Number of cell-guide pairs in the reference, of those found here too, and of those found only here.
    """

    n_cells: int
    same: int
    both_single: int
    same_single: int
    pairs: int
    found: int
    extra: int

    def to_json(self) -> dict[str, Any]:
        """Return the numbers."""
        return dict(vars(self))


def compare_assignments(
    result: GuideResult, source: str | os.PathLike | AnnData, layer: str, *, threads: int | None = None
) -> Agreement:
    """Compare an assignment with that in a layer of the guides' matrix, in which any value above 0 assigns a guide.

    Raises
    ------
    DataError
        If the layer does not exist, or has other guides.
    """
    with open_dataset(source, **{**result.part, "layer": layer}) as ds:
        if not np.array_equal(ds.var.index, result.guides):
            raise DataError(f"{ds.label}: layer {layer} has other guides than those that were assigned")
        indptr, indices = _assign(ds, np.ones(ds.n_genes), threads=threads, progress=SILENT)
    g, n = len(result.guides), len(result.cells)
    here = np.repeat(np.arange(n), np.diff(result.indptr)) * g + result.indices
    there = np.repeat(np.arange(n), np.diff(indptr)) * g + indices
    wrong = np.setxor1d(here, there, assume_unique=True) // g
    single = (np.diff(result.indptr) == 1) & (np.diff(indptr) == 1)
    same = np.ones(n, bool)
    same[wrong] = False
    found = len(np.intersect1d(here, there, assume_unique=True))
    return Agreement(
        n_cells=n, same=int(same.sum()), both_single=int(single.sum()), same_single=int((same & single).sum()),
        pairs=len(there), found=found, extra=len(here) - found,
    )  # fmt: skip
