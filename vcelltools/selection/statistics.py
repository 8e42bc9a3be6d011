"""The statistics of one pass over a data set, which can be merged and saved."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError, UsageError, VcellError
from vcelltools.genes.identity import find_doubts, read_ids
from vcelltools.io.dataset import Dataset
from vcelltools.io.fingerprint import describe_source
from vcelltools.io.textfile import parse_json
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.selection.count_pass import Pass, count_spans, get_layout_of_pass
from vcelltools.selection.histograms import Histograms, add, stack_batches
from vcelltools.version import __version__


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The statistics of one pass over a data set.

    Attributes
    ----------
    genes
        (g,) gene names, in the order of the file.
    batches
        Batch labels, sorted; ``[""]`` without batches.
    histograms
        Per batch and gene.
    library_size
        (n,) int64: total counts of each cell.
    genes_per_cell
        (n,) int32: number of genes with a non-zero count in each cell.
    batch_n
        (n,) int32 batch of each cell.
    n_duplicates, n_unsorted
        Number of duplicate entries that were summed, and of unsorted rows or columns.
    bytes_read, passes
        Bytes read, and number of passes.
    source
        The source of the statistics.
    ids
        (g,) Ensembl ids of the genes, if the file has them.
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
    ids: np.ndarray | None = None
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
    """Return (sorted labels, (n,) int32 code of each cell) of an obs column, or one unnamed batch.

    Raises
    ------
    DataError
        If the column is missing or some cells have no label.
    """
    if batch_key is None:
        return [""], np.zeros(dataset.n_cells, np.int32)
    codes, labels = dataset.obs.column(batch_key).factorize()
    missing = int(np.count_nonzero(codes < 0))
    if missing:
        first = int(np.flatnonzero(codes < 0)[0])
        raise DataError(
            f"{dataset.label}: obs column {batch_key!r} is empty for {missing:,} cells (the first is cell {first:,})",
            hint="fill the column, or drop these cells with vcelltools sample",
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
    """Read the whole matrix and count, in one pass or in several if the batches exceed the memory budget.

    Parameters
    ----------
    dataset
        An open data set of counts.
    batch_key
        An obs column; statistics are computed per label.
    threads
        Worker threads.
    max_values
        Number of values per read and thread; chosen automatically by default. The result does not depend on it.

    Raises
    ------
    NotCountsError, DataError
        If a value or index is invalid; the message names its cell and gene.
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
    """Combine the counts of the passes, each of which covers some batches and all cells."""
    last = done[-1]
    histograms = [p.histograms for p in done]
    return Statistics(
        genes=dataset.var.index,
        ids=read_ids(dataset.var),
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
        raise DataError(f"the file has {n_cells:,} cells, but at most {np.iinfo(np.int32).max:,} are supported")


def _get_warnings(dataset: Dataset, last: Pass) -> tuple[str, ...]:
    out = []
    if last.n_duplicates:
        out.append(f"{last.n_duplicates:,} duplicate entries of a cell and gene were summed")
    out += find_doubts(dataset.var, dataset.obs)
    names = dataset.var.index
    n_twice = len(names) - len(set(names.tolist()))
    if n_twice:
        out.append(f"{n_twice:,} gene names occur more than once; genes are distinguished by position")
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


def merge(parts: list[Statistics]) -> Statistics:
    """Merge the statistics of row ranges of one data set, in order (same genes, same batch labels)."""
    first = parts[0]
    if any(p.batches != first.batches or not np.array_equal(p.genes, first.genes) for p in parts):
        raise DataError("statistics of different genes or batches cannot be merged")
    return Statistics(
        genes=first.genes,
        ids=first.ids,
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


SCHEMA = 2  # schema 1 had no hash of the manifest
KIND = "gene statistics"
_ARRAYS = ("library_size", "genes_per_cell", "batch_n")
_HIST = ("offsets", "counts", "over_batch", "over_gene", "over_value", "over_count", "n_cells_k")


def is_statistics(dpath: Path) -> bool:
    """Whether a folder has the manifest that :func:`save_statistics` writes."""

    try:
        return parse_json((dpath / "manifest.json").read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def save_statistics(stats: Statistics, dpath: str | os.PathLike, *, force: bool = False) -> Path:
    """Write the statistics to a folder atomically; ``force`` replaces a folder that holds only statistics.

    Raises
    ------
    UsageError
        If the folder holds something else.
    """
    import hashlib

    from vcelltools.io.write.atomic import staged_folder, translate_os_errors, write_json

    arrays = {k: getattr(stats, k) for k in _ARRAYS} | {k: getattr(stats.histograms, k) for k in _HIST}
    arrays["genes"] = np.asarray(stats.genes.astype(str), dtype=np.str_)
    if stats.ids is not None:
        arrays["ids"] = np.asarray(["" if i is None else i for i in stats.ids], dtype=np.str_)
    d = Path(dpath)
    foreign = (
        sorted(set(os.listdir(d)) - {"manifest.json", "ids.npy", *(f"{name}.npy" for name in arrays)})
        if d.exists()
        else []
    )
    if foreign:
        raise UsageError(f"{d} holds files that are not statistics, such as {foreign[0]}", hint="choose another folder")
    with staged_folder(d, force=force) as there:
        hashes = {}
        for name, values in arrays.items():
            with translate_os_errors(there / f"{name}.npy"), open(there / f"{name}.npy", "wb") as f:
                np.save(f, values, allow_pickle=False)
                os.fsync(f.fileno())
            hashes[name] = hashlib.sha256((there / f"{name}.npy").read_bytes()).hexdigest()
        body = {
            "schema": SCHEMA,
            "kind": KIND,
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
    return d / "manifest.json"


def _hash_json(body: dict[str, Any]) -> str:
    import hashlib

    from vcelltools.io.write.atomic import dump_json

    return hashlib.sha256(dump_json(body).encode()).hexdigest()


def load_statistics(dpath: str | os.PathLike) -> Statistics:
    """Read statistics that :func:`save_statistics` wrote, and check their hashes.

    Raises
    ------
    DataError
        If the folder does not hold statistics, has another schema, or the hash of an array is wrong.
    """
    import hashlib
    import io

    d = Path(dpath)
    try:
        body = parse_json((d / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(body, dict) or not isinstance(body.get("sha256"), dict):
            raise ValueError("its manifest is invalid")
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(
            f"{d} holds no gene statistics ({getattr(e, 'strerror', None) or e})",
            hint="write them with vcelltools hvg FILE --stats DIR",
        ) from e
    if body.get("schema") != SCHEMA or body.get("kind") != KIND:
        raise DataError(f"{d}: the gene statistics have schema {body.get('schema')!r} instead of {SCHEMA}")
    if body.pop("manifest_sha256", None) != _hash_json(body):
        raise DataError(
            f"{d / 'manifest.json'}: the file is damaged (its hash does not match)", hint="delete the folder"
        )
    arrays = {}
    for name in (*_ARRAYS, *_HIST, "genes", *(["ids"] if "ids" in body["sha256"] else [])):
        fpath = d / f"{name}.npy"
        try:
            raw = fpath.read_bytes()
            if hashlib.sha256(raw).hexdigest() != body["sha256"].get(name):
                raise DataError(
                    f"{fpath}: the file is damaged (its hash differs from that in the manifest)",
                    hint="delete the folder",
                )
            arrays[name] = np.load(io.BytesIO(raw), allow_pickle=False)
        except VcellError:
            raise
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f"{fpath} cannot be read ({e})", hint="delete the folder") from e
    try:
        return Statistics(
            genes=arrays["genes"].astype(object),
            ids=arrays["ids"].astype(object) if "ids" in arrays else None,
            batches=[str(b) for b in body["batches"]],
            histograms=Histograms(**{k: arrays[k] for k in _HIST}, single=bool(body["single"])),
            **{k: arrays[k] for k in _ARRAYS},
            n_duplicates=int(body["n_duplicates"]),
            n_unsorted=int(body["n_unsorted"]),
            bytes_read=int(body["bytes_read"]),
            passes=int(body["passes"]),
            source=dict(body["source"]),
            warnings=tuple(map(str, body["warnings"])),
            notes=tuple(map(str, body["notes"])),
        )
    except (TypeError, ValueError, KeyError) as e:
        raise DataError(f"{d / 'manifest.json'}: damaged ({e})", hint="delete the folder") from e
