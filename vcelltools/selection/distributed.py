"""The count pass on a Dask cluster: workers count ranges of cells, or of genes in a file stored gene by gene.

Accumulators are integers, so the statistics equal those of one machine to the bit. Workers read the source by its path,
which must be on storage that all of them can access.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io import open_dataset
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
    feature_type: str | None = None,
    genome: str | None = None,
    part_cells: int = PART_CELLS,
    progress: Progress = SILENT,
) -> Statistics:
    """Return the statistics of :func:`vcelltools.selection.statistics.scan`, computed on a cluster.

    A file stored gene by gene is divided into as many ranges of genes as another would be into ranges of cells.
    """
    path = str(Path(source).absolute())
    part = {"modality": modality, "layer": layer, "feature_type": feature_type, "genome": genome}
    with open_dataset(path, **part) as ds:
        labels, batch_n = get_batches(ds, batch_key)
        parts, unit = cut(0, ds.n_cells, part_cells), "cells"
        if ds.matrix.by_gene:
            parts, unit = cut(0, ds.n_genes, -(-ds.n_genes // len(parts))), "genes"
        total = ds.matrix.stored_bytes
        progress.start("reading on the cluster", parts[-1][1], unit)
        task = {"path": path, "part": part, "batch_key": batch_key}
        futures = client.map(_scan_part, parts, task=task, pure=False)
        library_size = np.zeros(ds.n_cells, np.int64)
        genes_per_cell = np.zeros(ds.n_cells, np.int64)
        merged, n_duplicates, n_unsorted = None, 0, 0
        sizes = [b - a for a, b in parts]
        for (a, b), (histograms, lib, genes, duplicates, unsorted) in gather(client, futures, parts, progress, sizes):
            merged = histograms if merged is None else add([merged, histograms])
            cells = slice(None) if ds.matrix.by_gene else slice(a, b)
            library_size[cells] += lib
            genes_per_cell[cells] += genes
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


def _scan_part(part: tuple[int, int], *, task: dict[str, Any]):
    """Count the cells or the genes of one part (on a worker)."""
    a, b = part
    with open_dataset(task["path"], **task["part"]) as ds:
        labels, batch_n = get_batches(ds, task["batch_key"])
        widths = get_layout_of_pass(ds.matrix, 1, 1).widths
        spans = ds.matrix.plan(start=a, stop=b)
        if ds.matrix.by_gene:
            out = count_spans(ds, batch_n, len(labels), widths, spans, 1, SILENT, partial=True, genes=part)
            histograms, cells = out.histograms, slice(None)
            if a > 0:  # every part sees all cells, which count once
                histograms = replace(histograms, n_cells_k=np.zeros_like(histograms.n_cells_k))
        else:
            codes = np.full(ds.n_cells, -1, np.int32)
            codes[a:b] = batch_n[a:b]
            out = count_spans(ds, codes, len(labels), widths, spans, 1, SILENT, partial=True)
            histograms, cells = out.histograms, slice(a, b)
        return (
            histograms,
            out.library_size[cells].copy(),
            out.genes_per_cell[cells].copy(),
            out.n_duplicates,
            out.n_unsorted,
        )
