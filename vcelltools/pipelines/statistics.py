"""What one pass over a data set yields: gene histograms per batch, library sizes, genes per cell. Mergeable, saved."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError, VcellError
from vcelltools.histograms import Histograms, add, stack_batches
from vcelltools.io.dataset import Dataset
from vcelltools.pipelines.count_pass import Pass, count_spans, get_layout_of_pass
from vcelltools.progress import SILENT, Progress
from vcelltools.stream import get_threads


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one pass over a data set yields.

    Attributes
    ----------
    genes
        (g,) gene names, in the file's order.
    batches
        Batch labels, sorted; ``[""]`` where there are no batches.
    histograms
        Per batch and gene.
    library_size
        (n,) int64: total counts of each cell.
    genes_per_cell
        (n,) int32: genes with a non-zero count.
    batch_n
        (n,) int32 batch of each cell.
    n_duplicates, n_unsorted
        Entries that were summed into another of the same cell and gene; rows or columns out of order.
    bytes_read, passes
        What the pass cost.
    source
        What it was computed from.
    """

    genes: np.ndarray
    batches: list[str]
    histograms: Histograms
    library_size: np.ndarray
    genes_per_cell: np.ndarray
    batch_n: np.ndarray
    n_duplicates: int = 0
    n_unsorted: int = 0
    bytes_read: int = 0
    passes: int = 1
    source: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def n_cells(self) -> int:
        """Cells."""
        return len(self.library_size)

    @property
    def n_genes(self) -> int:
        """Genes."""
        return len(self.genes)


def get_batches(dataset: Dataset, batch_key: str | None) -> tuple[list[str], np.ndarray]:
    """Return (labels sorted, (n,) int32 code of each cell) of an obs column, or one batch without a name.

    Raises
    ------
    DataError
        When the column is missing or some cells have no label.
    """
    if batch_key is None:
        return [""], np.zeros(dataset.n_cells, np.int32)
    codes, labels = dataset.obs.column(batch_key).factorize()
    missing = int(np.count_nonzero(codes < 0))
    if missing:
        first = int(np.flatnonzero(codes < 0)[0])
        raise DataError(
            f"{dataset.label}: obs column {batch_key!r} is empty for {missing:,} cells (the first is cell {first:,})",
            hint="fill the column, or leave these cells out with vcelltools sample",
        )
    return labels, codes.astype(np.int32)


def scan(
    dataset: Dataset,
    *,
    batch_key: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    phase: str = "reading",
    max_values: int | None = None,
) -> Statistics:
    """Read the whole matrix once (more often where many batches exceed the memory budget) and count.

    Parameters
    ----------
    dataset
        An open data set of counts.
    batch_key
        An obs column; statistics are kept per label.
    threads
        Worker threads.
    max_values
        Values read at once and thread; chosen by default. The result does not depend on it.

    Raises
    ------
    NotCountsError, DataError
        At the first value or index that is not acceptable, with its cell and gene.
    """
    _check_n_cells(dataset.n_cells)
    labels, batch_n = get_batches(dataset, batch_key)
    n_threads = get_threads(threads)
    n_batches = len(labels)
    layout = get_layout_of_pass(dataset.matrix, n_batches, n_threads, max_values)
    group, spans, widths = layout.batches_per_pass, layout.spans, layout.widths
    total = sum(s.n_bytes for s in spans)
    progress.start(phase, total * layout.passes, "bytes")
    done: list[Pass] = []
    for first in range(0, n_batches, group):
        here = min(group, n_batches - first)
        codes = np.where((batch_n >= first) & (batch_n < first + here), batch_n - first, -1).astype(np.int32)
        done.append(count_spans(dataset, codes, here, widths, spans, n_threads, progress))
    progress.finish()
    return make_statistics(dataset, labels, batch_n, done, bytes_read=total * layout.passes)


def make_statistics(
    dataset: Dataset, batches: list[str], batch_n: np.ndarray, done: list[Pass], *, bytes_read: int
) -> Statistics:
    """Put together what the passes counted, each a share of the batches over all cells."""
    last = done[-1]
    histograms = [p.histograms for p in done]
    return Statistics(
        genes=dataset.var.index,
        batches=batches,
        histograms=histograms[0] if len(histograms) == 1 else stack_batches(histograms),
        library_size=last.library_size,
        genes_per_cell=last.genes_per_cell.astype(np.int32),
        batch_n=batch_n,
        n_duplicates=last.n_duplicates,
        n_unsorted=last.n_unsorted,
        bytes_read=bytes_read,
        passes=len(done),
        source=describe_source(dataset),
        warnings=_get_warnings(dataset, last),
        notes=_get_notes(dataset, last, histograms),
    )


def _check_n_cells(n_cells: int) -> None:
    if n_cells > np.iinfo(np.int32).max:
        raise DataError(f"{n_cells:,} cells: at most {np.iinfo(np.int32).max:,} are supported in one file")


def _get_warnings(dataset: Dataset, last: Pass) -> tuple[str, ...]:
    out = []
    if last.n_duplicates:
        out.append(f"{last.n_duplicates:,} entries with a cell and gene that occurs twice were summed")
    names = dataset.var.index
    n_twice = len(names) - len(set(names.tolist()))
    if n_twice:
        out.append(f"{n_twice:,} gene names occur more than once; genes are told apart by position")
    return tuple(out)


def _get_notes(dataset: Dataset, last: Pass, parts: list[Histograms]) -> tuple[str, ...]:
    out = []
    empty = int(np.count_nonzero(last.library_size == 0))
    if empty:
        out.append(f"{empty:,} {'cell has' if empty == 1 else 'cells have'} no counts")
    silent = np.ones(dataset.n_genes, bool)
    for part in parts:
        for k in range(part.n_batches):
            silent &= part.expressing(k) == 0
    if n_silent := int(silent.sum()):
        out.append(f"{n_silent:,} {'gene has' if n_silent == 1 else 'genes have'} no counts")
    return tuple(out)


def describe_source(dataset: Dataset) -> dict[str, Any]:
    """Return what identifies the source: path, size, modification time, modality, layer, shape."""
    out: dict[str, Any] = {
        "path": dataset.label,
        "kind": dataset.kind,
        "modality": dataset.modality,
        "layer": dataset.layer,
        "n_cells": dataset.n_cells,
        "n_genes": dataset.n_genes,
        "layout": dataset.matrix.layout,
    }
    if dataset.path is not None and dataset.path.is_file():
        info = dataset.path.stat()
        out |= {"path": str(dataset.path.resolve()), "size": info.st_size, "mtime_ns": info.st_mtime_ns}
    return out


def merge(parts: list[Statistics]) -> Statistics:
    """Merge the statistics of row ranges of one data set, in order (same genes, same batch labels)."""
    first = parts[0]
    if any(p.batches != first.batches or not np.array_equal(p.genes, first.genes) for p in parts):
        raise DataError("statistics of different genes or batches cannot be merged")
    return Statistics(
        genes=first.genes,
        batches=first.batches,
        histograms=add([p.histograms for p in parts]),
        library_size=np.concatenate([p.library_size for p in parts]),
        genes_per_cell=np.concatenate([p.genes_per_cell for p in parts]),
        batch_n=np.concatenate([p.batch_n for p in parts]),
        n_duplicates=sum(p.n_duplicates for p in parts),
        n_unsorted=sum(p.n_unsorted for p in parts),
        bytes_read=sum(p.bytes_read for p in parts),
        passes=max(p.passes for p in parts),
        source=first.source,
        warnings=tuple(dict.fromkeys(w for p in parts for w in p.warnings)),
        notes=tuple(dict.fromkeys(w for p in parts for w in p.notes)),
    )


SCHEMA = 2  # 1 had no hash of the manifest
_ARRAYS = ("library_size", "genes_per_cell", "batch_n")
_HIST = ("offsets", "counts", "over_batch", "over_gene", "over_value", "over_count", "n_cells_k")


def save_statistics(stats: Statistics, dpath: str | os.PathLike, *, force: bool = False) -> Path:
    """Write the statistics to a folder, all or nothing; a folder without a manifest does not count."""
    import hashlib

    from vcelltools import __version__
    from vcelltools.io.atomic import atomic_file, staged, write_json

    arrays = {k: getattr(stats, k) for k in _ARRAYS} | {k: getattr(stats.histograms, k) for k in _HIST}
    arrays["genes"] = np.asarray(stats.genes.astype(str), dtype=np.str_)
    manifest, files = Path(dpath) / "manifest.json", [Path(dpath) / f"{name}.npy" for name in arrays]
    with staged([*files, manifest], force=force, over=files) as there:
        hashes = {}
        for name, values in arrays.items():
            with atomic_file(there / f"{name}.npy") as tmp, open(tmp, "wb") as f:
                np.save(f, values, allow_pickle=False)
            hashes[name] = hashlib.sha256((there / f"{name}.npy").read_bytes()).hexdigest()
        body = {
            "schema": SCHEMA,
            "kind": "gene statistics",
            "version": __version__,
            "source": stats.source,
            "batches": stats.batches,
            "single": stats.histograms.single,
            "n_duplicates": stats.n_duplicates,
            "n_unsorted": stats.n_unsorted,
            "bytes_read": stats.bytes_read,
            "passes": stats.passes,
            "warnings": list(stats.warnings),
            "notes": list(stats.notes),
            "sha256": hashes,
        }
        write_json(there / "manifest.json", {**body, "manifest_sha256": _hash_json(body)})
        if force:
            manifest.unlink(missing_ok=True)  # it does not fit the arrays that move in before the new one
    return manifest


def _hash_json(body: dict[str, Any]) -> str:
    import hashlib

    from vcelltools.io.atomic import dump_json

    return hashlib.sha256(dump_json(body).encode()).hexdigest()


def load_statistics(dpath: str | os.PathLike) -> Statistics:
    """Read statistics that :func:`save_statistics` wrote, hashes checked.

    Raises
    ------
    DataError
        When the folder is not one, is of another schema, or an array's hash is wrong.
    """
    import hashlib
    import io
    import json

    d = Path(dpath)
    try:
        body = json.loads((d / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(
            f"{d}: holds no gene statistics ({e})", hint="vcelltools hvg FILE --stats DIR writes them"
        ) from e
    if body.get("schema") != SCHEMA or body.get("kind") != "gene statistics":
        raise DataError(f"{d}: gene statistics of schema {body.get('schema')!r}; {SCHEMA} expected")
    if body.pop("manifest_sha256", None) != _hash_json(body):
        raise DataError(f"{d / 'manifest.json'}: damaged (its own hash does not fit)", hint="delete the folder")
    arrays = {}
    for name in (*_ARRAYS, *_HIST, "genes"):
        fpath = d / f"{name}.npy"
        try:
            raw = fpath.read_bytes()
            if hashlib.sha256(raw).hexdigest() != body["sha256"].get(name):
                raise DataError(f"{fpath}: damaged (its hash differs from the manifest's)", hint="delete the folder")
            arrays[name] = np.load(io.BytesIO(raw), allow_pickle=False)
        except VcellError:
            raise
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f"{fpath}: cannot be read ({e})", hint="delete the folder") from e
    return Statistics(
        genes=arrays["genes"].astype(object),
        batches=list(body["batches"]),
        histograms=Histograms(**{k: arrays[k] for k in _HIST}, single=body["single"]),
        **{k: arrays[k] for k in _ARRAYS},
        n_duplicates=body["n_duplicates"],
        n_unsorted=body["n_unsorted"],
        bytes_read=body["bytes_read"],
        passes=body["passes"],
        source=body["source"],
        warnings=tuple(body["warnings"]),
        notes=tuple(body["notes"]),
    )
