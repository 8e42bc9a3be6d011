"""Estimate what ``hvg`` would read, its time and its memory, from the structure of the file and a short probe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vcelltools.io import Dataset, open_dataset
from vcelltools.io.survey import require_counts
from vcelltools.runtime.threads import get_threads
from vcelltools.selection.count_pass import get_layout_of_pass, scan_spans
from vcelltools.selection.flavors import FLAVORS
from vcelltools.selection.statistics import get_batches

PROBE_BYTES = 64 << 20
BASE_MEMORY = 180 << 20  # memory of the interpreter with numpy, h5py, numba and skmisc


def plan_hvg(
    sources: Sequence[str],
    *,
    flavor: str = "seurat_v3",
    batch_key: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Return sizes, batches, bytes to read, passes, and estimated seconds and peak memory, without the full pass.

    The time is extrapolated from reading and counting the first tens of megabytes.
    """
    files, warnings, seconds, memory = [], [], 0.0, 0
    for source in sources:
        with open_dataset(source, modality=modality, layer=layer, feature_type=feature_type, genome=genome) as ds:
            require_counts(ds)
            one = _plan_file(ds, batch_key, flavor, get_threads(threads))
            warnings += ds.notes
        files.append(one)
        seconds += one["seconds"]
        memory = max(memory, one["peak_memory_bytes"])
    return {"files": files, "seconds": seconds, "peak_memory_bytes": memory, "warnings": warnings}


def _plan_file(ds: Dataset, batch_key: str | None, flavor: str, threads: int) -> dict[str, Any]:
    labels, codes = get_batches(ds, batch_key)
    layout = get_layout_of_pass(ds.matrix, len(labels), threads)
    passes = layout.passes + FLAVORS[flavor].needs_values
    total = sum(s.n_bytes for s in layout.spans)
    probe, seen = [], 0
    for span in layout.spans:
        probe.append(span)
        seen += span.n_bytes
        if seen > PROBE_BYTES:
            break
    scan_spans(ds, probe[:1], threads=threads)  # compile the kernels, or load them from the cache
    began = time.monotonic()
    scan_spans(ds, probe, threads=threads)
    rate = max(seen, 1) / max(time.monotonic() - began, 1e-9)
    per_value = ds.matrix.chunk_dtype.itemsize + (ds.matrix.index_dtype.itemsize if ds.matrix.index_dtype else 0)
    largest = max((s.n_values for s in layout.spans), default=0) * per_value
    memory = BASE_MEMORY + threads * (largest + layout.histogram_bytes) + 8 * ds.n_cells * 4
    census = {} if batch_key is None else dict(zip(labels, np.bincount(codes, minlength=len(labels)), strict=True))
    return {
        "path": ds.label,
        **ds.part,
        "layout": ds.matrix.layout,
        "filters": list(ds.matrix.filters),
        "n_cells": ds.n_cells,
        "n_genes": ds.n_genes,
        "nnz": ds.matrix.nnz,
        "bytes_to_read": total * passes,
        "passes": passes,
        "batches": {k: int(v) for k, v in census.items()},
        "seconds": total * passes / rate,
        "peak_memory_bytes": int(memory),
    }
