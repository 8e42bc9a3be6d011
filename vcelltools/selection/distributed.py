"""The count pass on a Dask cluster: workers count ranges of cells, which are then merged.

Accumulators are integers, so the statistics equal those of one machine to the bit. Workers read the source by its path,
which must be on storage that all of them can access.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import UsageError, spell
from vcelltools.io import CsrMatrix, Dataset, DenseMatrix, open_dataset
from vcelltools.runtime.cluster import PART_CELLS, cut, gather
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.selection.count_pass import Pass, count_spans, get_layout_of_pass
from vcelltools.selection.histograms import add
from vcelltools.selection.statistics import get_batches, make_statistics

if TYPE_CHECKING:
    from distributed import Client

    from vcelltools.selection.statistics import Statistics


def scan_on_cluster(
    source: str | os.PathLike,
    client: Client,
    *,
    batch_key: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    part_cells: int = PART_CELLS,
    progress: Progress = SILENT,
) -> Statistics:
    """Return the statistics of :func:`vcelltools.selection.statistics.scan`, computed on a cluster.

    Raises
    ------
    UsageError
        If the file is stored gene by gene, so that it cannot be divided into ranges of cells.
    """
    path = str(Path(source).absolute())
    with open_dataset(path, modality=modality, layer=layer) as ds:
        _need_rows(ds)
        labels, batch_n = get_batches(ds, batch_key)
        parts = cut(0, ds.n_cells, part_cells)
        total = ds.matrix.stored_bytes
        progress.start("reading on the cluster", ds.n_cells, "cells")
        task = {"path": path, "modality": modality, "layer": layer, "batch_key": batch_key}
        futures = client.map(_scan_part, parts, task=task, pure=False)
        library_size = np.zeros(ds.n_cells, np.int64)
        genes_per_cell = np.zeros(ds.n_cells, np.int64)
        merged, n_duplicates, n_unsorted = None, 0, 0
        sizes = [b - a for a, b in parts]
        for (a, b), (histograms, lib, genes, duplicates, unsorted) in gather(client, futures, parts, progress, sizes):
            merged = histograms if merged is None else add([merged, histograms])
            library_size[a:b], genes_per_cell[a:b] = lib, genes
            n_duplicates += duplicates
            n_unsorted += unsorted
        progress.finish()
        assert merged is not None
        counted = Pass(
            histograms=merged,
            library_size=library_size,
            genes_per_cell=genes_per_cell,
            n_duplicates=n_duplicates,
            n_unsorted=n_unsorted,
        )
        return make_statistics(ds, labels, batch_n, [counted], bytes_read=total)


def _need_rows(ds: Dataset) -> None:
    m = ds.matrix
    if not (isinstance(m, CsrMatrix) or (isinstance(m, DenseMatrix) and m.axis == 0)):
        raise UsageError(
            f"{ds.label} is stored gene by gene ({m.layout}), but a cluster counts ranges of cells",
            hint=f"leave {spell('dask')} out",
        )


def _scan_part(part: tuple[int, int], *, task: dict[str, Any]):
    """Count the cells of one part (on a worker)."""
    a, b = part
    with open_dataset(task["path"], modality=task["modality"], layer=task["layer"]) as ds:
        labels, batch_n = get_batches(ds, task["batch_key"])
        widths = get_layout_of_pass(ds.matrix, 1, 1).widths
        spans = ds.matrix.plan(start=a, stop=b)
        codes = np.full(ds.n_cells, -1, np.int32)
        codes[a:b] = batch_n[a:b]
        out = count_spans(ds, codes, len(labels), widths, spans, 1, SILENT, partial=True)
        return (
            out.histograms,
            out.library_size[a:b].copy(),
            out.genes_per_cell[a:b].copy(),
            out.n_duplicates,
            out.n_unsorted,
        )
