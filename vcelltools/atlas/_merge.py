"""Merge a fetched atlas into one matrix over one list of genes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.atlas._folder import SAMPLES, Folder, open_folder
from vcelltools.atlas._obs import make_gene_table, make_obs, make_var
from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.genes.identity import Basis, read_basis
from vcelltools.genes.union import Member, Union, UnionGenes, UnionMatrix, open_union
from vcelltools.io import Dataset, H5adWriter, Span
from vcelltools.io.chunks import CsrChunk
from vcelltools.io.formats.zarr import is_zarr
from vcelltools.io.hdf5.table import EmptyTable
from vcelltools.io.stream import map_spans
from vcelltools.io.write.atomic import atomic_file, locked, write_json
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.runtime.memory import trim_heap
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.stores.format import is_store

FORMATS = ("h5ad", "zarr", "batches", "store")
_DTYPES = {"h5ad": ("uint8", "uint16", "uint32"), "batches": ("int16", "int32", "int64")}
SAMPLE_COLUMNS = ("tissue", "tech_10x", "cell_prep", "disease", "perturbation")
CONFIG = "config.json"
_SPAN_VALUES = 1 << 18
_OPEN_FILES = 16


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """The plan of a merge.

    Attributes
    ----------
    format, out
        The format, and the file or folder.
    experiments, skipped
        Experiments that are present, and chosen ones that are missing.
    cells
        Number of cells in the manifest.
    bytes_raw
        Size of the files that are read.
    """

    format: str
    out: Path
    experiments: int
    skipped: list[str]
    cells: int
    bytes_raw: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {k: getattr(self, k) for k in ("format", "experiments", "skipped", "cells", "bytes_raw")} | {
            "out": str(self.out)
        }


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The result of a merge.

    Attributes
    ----------
    out, format
        The file or folder.
    cells, genes, nnz
        Size of the matrix.
    dtype, max, sparsity
        The dtype, the largest value, and the share of zeros.
    lost_counts
        Number of counts of genes that are not in the given list.
    skipped
        Chosen experiments that were missing.
    warnings
        Warnings for the user.
    """

    out: Path
    format: str
    cells: int
    genes: int
    nnz: int
    dtype: str
    max: int
    sparsity: float
    lost_counts: int
    skipped: list[str]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        names = ("format", "cells", "genes", "nnz", "dtype", "max", "sparsity", "lost_counts", "skipped", "warnings")
        return {"out": str(self.out), **{k: getattr(self, k) for k in names}}


def get_default_out(dpath: Path, format: str) -> Path:
    """Return the default output of a merge."""
    names = {"h5ad": "merged.h5ad", "zarr": "merged.zarr", "batches": "processed", "store": "stores/atlas"}
    return dpath / names[format]


def _choose(folder: Folder, skip_failed: bool) -> tuple[list[Member], list[str]]:
    """Return the experiments that are present, and the chosen ones that are missing."""
    here = [x for x in folder.ids if x in folder.files and folder.get_raw(x).is_file()]
    lacking = [x for x in folder.ids if x not in here]
    if not here:
        raise DataError(f"{folder.dpath} holds no experiments", hint="download them with vcelltools atlas fetch")
    if lacking and not skip_failed:
        raise DataError(
            f"{folder.dpath}: {len(lacking):,} of {len(folder.ids):,} chosen experiments are missing "
            f"({', '.join(lacking[:5])}{' …' if len(lacking) > 5 else ''})",
            hint=f"fetch again, or merge the others with {spell('skip_failed', True)}",
        )
    return [Member(name=x, path=folder.get_raw(x), layer=folder.files[x].get("layer")) for x in here], lacking


@checked
def plan_merge(
    dpath: str | os.PathLike, *, format: str = "h5ad", out: str | os.PathLike | None = None, skip_failed: bool = False
) -> MergePlan:
    """Return what :func:`merge` would read and write.

    Raises
    ------
    DataError
        As in :func:`merge`.
    """
    folder = open_folder(dpath)
    _check_format(format)
    members, skipped = _choose(folder, skip_failed)
    return MergePlan(
        format=format,
        out=Path(out) if out is not None else get_default_out(folder.dpath, format),
        experiments=len(members),
        skipped=skipped,
        cells=sum(folder.files[m.name]["cells"] for m in members),
        bytes_raw=sum(folder.files[m.name]["bytes"] for m in members),
    )


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not known", hint=f"one of: {', '.join(FORMATS)}")


@checked
def merge(
    dpath: str | os.PathLike,
    *,
    format: str = "h5ad",
    out: str | os.PathLike | None = None,
    genes: str | os.PathLike | None = None,
    dtype: str | None = None,
    batch_size: int = 10,
    skip_failed: bool = False,
    qc: bool = False,
    drop_raw: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> MergeResult:
    """Merge the experiments of a fetched atlas: one pass counts, and a second one writes.

    An h5ad is usually written in the first pass already.

    Parameters
    ----------
    dpath
        The folder that :func:`vcelltools.atlas.fetch` wrote.
    format
        ``h5ad`` (CSR), ``zarr`` (CSR), ``batches`` (``batch_%04d.h5``, dense) or ``store`` (needs ``genes``).
    out
        Output file or folder; by default inside ``dpath``.
    genes
        List of genes, one per line, which sets the genes and their order. By default all genes, sorted by id.
    dtype
        Dtype of the values; by default the smallest that holds the largest count.
    batch_size
        Number of experiments per file of the format ``batches``.
    skip_failed
        Merge the experiments that are present even if others are missing.
    qc
        Add the metrics and flags of :mod:`vcelltools.files.qc` to obs, with the default limits.
    drop_raw
        Delete the files of the experiments once the merge is complete.

    Raises
    ------
    DataError
        If experiments are missing, a file is damaged, or ``dtype`` cannot hold a count (whose cell and gene are named).
    UsageError
        If the format or dtype is not supported, or ``out`` exists and ``force`` is false.
    """
    folder = open_folder(dpath)
    _check_format(format)
    if dtype is not None and dtype not in ("uint8", "uint16", "uint32", "int16", "int32", "int64", "float32"):
        raise UsageError(
            f"dtype {dtype!r} is not supported for counts", hint="use uint8, uint16, uint32, int16, int32 or int64"
        )
    if format == "store" and genes is None:
        raise UsageError("a store needs a gene list", hint=f"pass {spell('genes')}")
    if format == "store" and dtype is not None:
        raise UsageError("the dtype of a store cannot be set", hint=f"remove {spell('dtype')}")
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}, but must be at least 1")
    target = Path(out) if out is not None else get_default_out(folder.dpath, format)
    members, skipped = _choose(folder, skip_failed)
    wanted = read_basis(genes) if genes is not None else None
    kinds = {"h5ad": Target(target, "hdf5"), "zarr": Target(target, "zarr store", owns=is_zarr),
             "batches": Target(target, "folder of batch files", owns=_holds_batches),
             "store": Target(target, "store", owns=is_store, reuse=True)}  # fmt: skip
    reads = [*(m.path for m in members), folder.manifest_fpath, folder.dpath / SAMPLES, genes]
    guard_outputs([kinds[format]], reads=reads, force=force)
    kept = None if format == "store" else wanted  # the library sizes of a store cover all genes
    with (
        locked(folder.dpath / "atlas"),
        _Draft(target, dtype, force=force, threads=threads) as draft,
        open_union(
            members, wanted=kept, most_open=_OPEN_FILES, threads=threads, progress=progress,
            draft=draft if format == "h5ad" and wanted is None and dtype != "float32" else None,
        ) as union,
    ):  # fmt: skip
        kind = choose_dtype(union, format, dtype)
        samples = folder.read_samples()
        obs, warnings = make_obs(union, samples)
        warnings += _describe_union(union)
        if qc:
            obs, said = _add_qc(union, obs, threads=threads, progress=progress)
            warnings += said
        if format == "store":
            assert wanted is not None
            warnings += _build_store(union, obs, target, wanted, force=force, threads=threads, progress=progress)
            return _finish(
                folder, union, samples, _make_result(union, target, format, kind, skipped, warnings), drop_raw
            )
        if draft.finish(obs, kind):
            return _finish(
                folder, union, samples, _make_result(union, target, format, kind, skipped, warnings), drop_raw
            )
        write = {"h5ad": _write_h5ad, "zarr": _write_zarr, "batches": _write_batches}[format]
        write(union, obs, target, kind, force=force, threads=threads, progress=progress, batch_size=batch_size)
        return _finish(folder, union, samples, _make_result(union, target, format, kind, skipped, warnings), drop_raw)


class _Draft:
    """An h5ad that is written while pass 1 counts, which saves pass 2.

    This works if the stored values are those of the result (no zeros and no duplicates), and if the dtype was given or
    turns out to be the most frequent one of counts.
    """

    def __init__(self, target: Path, dtype: str | None, *, force: bool, threads: int | None) -> None:
        self._target, self._fixed, self._force, self._threads = target, dtype is not None, force, threads
        self.dtype = np.dtype(dtype or _DTYPES["h5ad"][1])
        self._out: H5adWriter | None = None

    def __enter__(self) -> _Draft:
        return self

    def __exit__(self, *error: Any) -> None:
        self.drop()

    @property
    def is_live(self) -> bool:
        return self._out is not None

    def begin(self, genes: UnionGenes, n_cells: int, nnz: int) -> None:
        self._out = _open_h5ad(self._target, genes, self.dtype, nnz, force=self._force, threads=self._threads)

    def is_worth(self, largest: int) -> bool:
        return self._fixed or largest > np.iinfo(_DTYPES["h5ad"][0]).max

    def append(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        assert self._out is not None
        self._out.append_csr(indptr, indices, data)

    def drop(self) -> None:
        out, self._out = self._out, None
        if out is not None:
            out.abandon()

    def finish(self, obs: EmptyTable, dtype: np.dtype) -> bool:
        """Complete the file; return False if there is no draft of that dtype."""
        if self._out is None or self.dtype != dtype:
            self.drop()
            return False
        with self._out as out:
            out.finish(obs=obs)
        self._out = None
        return True


def _add_qc(union: Union, obs: EmptyTable, *, threads: int | None, progress: Progress) -> tuple[EmptyTable, list[str]]:
    from vcelltools.files.qc import Limits, measure, read_batches

    batch, names = read_batches(union, None)
    found = measure(union, batch, names, limits=Limits(), threads=threads, progress=progress)
    return obs.extend(found.columns), found.warnings


def _finish(
    folder: Folder, union: Union, samples: dict[str, dict[str, Any]], result: MergeResult, drop_raw: bool
) -> MergeResult:
    """Write the files beside a merge, and delete the files of the experiments if requested."""
    union.close()  # HDF5 holds memory for open files
    trim_heap()
    _write_beside(folder, union, samples, result)
    if drop_raw:
        for m in union.members:
            m.path.unlink()
    return result


def _holds_batches(target: Path) -> bool:
    return (target / _name_batch(0)).is_file()


def choose_dtype(union: Union, format: str, dtype: str | None) -> np.dtype:
    """Return the dtype of the values; raise an error if it cannot hold the largest count.

    Raises
    ------
    DataError
        If ``dtype`` is too small; the message names the cell and the gene.
    """
    top = union.survey.maximum
    usual = _DTYPES.get(format, _DTYPES["h5ad"])
    if dtype is None:
        dtype = next((d for d in usual if top <= np.iinfo(d).max), usual[-1])
    kind = np.dtype(dtype)
    limit = 1 << 24 if kind.kind == "f" else int(np.iinfo(kind).max)
    if top > limit:
        k, cell, gene = union.survey.at
        member = union.members[k]
        with union.files.use(k) as here:
            name = here.dataset.obs.names(cell, cell + 1)[0]
        raise DataError(
            f"{member.name}: cell {name!r}, gene {union.genes.keys[gene]!r} has {top:,} counts, too many for {kind}",
            hint=f"choose a wider {spell('dtype')}",
        )
    return kind


def _describe_union(union: Union) -> list[str]:
    genes, survey = union.genes, union.survey
    out = []
    if genes.duplicates:
        out.append(f"{genes.duplicates:,} genes have several columns in a file; their counts were summed")
    lost = int(survey.umi_count.sum() - survey.kept_count.sum())
    if lost:
        share = lost / max(int(survey.umi_count.sum()), 1)
        out.append(f"{lost:,} counts ({share:.2%}) belong to genes that are not in the list and were dropped")
    absent = int(np.count_nonzero(genes.n_files[: genes.n_kept] == 0))
    if absent:
        out.append(f"{absent:,} of the listed genes are not in any file and are 0 in all cells")
    return out


def iterate_csr(
    union: Union,
    *,
    threads: int | None,
    progress: Progress,
    max_values: int = _SPAN_VALUES,
    dtype: np.dtype | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (first cell, indptr, indices, data) of the union's cells, in order; threads map the genes."""

    def take(chunk: object, span: object) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        assert isinstance(chunk, CsrChunk)
        data = chunk.data if dtype is None else chunk.data.astype(dtype)
        return chunk.start, chunk.indptr, chunk.indices, data

    spans = union.matrix.plan(max_values=max_values)
    yield from map_spans(union.matrix, spans, take, threads=threads, progress=progress)


def _open_h5ad(
    target: Path, genes: UnionGenes, dtype: np.dtype, nnz: int, *, force: bool, threads: int | None
) -> H5adWriter:
    return H5adWriter(
        target, n_genes=genes.n_kept, var=make_var(genes), dtype=dtype, contiguous=True, nnz=nnz, force=force,
        need_bytes=nnz * (4 + dtype.itemsize), threads=threads,
    )  # fmt: skip


def _write_h5ad(
    union: Union,
    obs: EmptyTable,
    target: Path,
    dtype: np.dtype,
    *,
    force: bool,
    threads: int | None,
    progress: Progress,
    **_: Any,
) -> None:
    m = union.matrix
    progress.start("merging", m.stored_bytes, "bytes")
    with _open_h5ad(target, union.genes, dtype, m.nnz, force=force, threads=threads) as out:
        out.finish(obs=obs)
        for _first, indptr, indices, data in iterate_csr(union, threads=threads, progress=progress, dtype=dtype):
            out.append_csr(indptr, indices, data)
    progress.finish()


def _make_result(
    union: Union, target: Path, format: str, dtype: np.dtype, skipped: list[str], warnings: list[str]
) -> MergeResult:
    n, g = union.matrix.shape
    survey = union.survey
    return MergeResult(
        out=target,
        format=format,
        cells=n,
        genes=g,
        nnz=union.matrix.nnz,
        dtype=str(dtype),
        max=survey.maximum,
        sparsity=1.0 - union.matrix.nnz / max(n * g, 1),
        lost_counts=int(survey.umi_count.sum() - survey.kept_count.sum()),
        skipped=skipped,
        warnings=warnings,
    )


def _write_beside(folder: Folder, union: Union, samples: dict[str, dict[str, Any]], result: MergeResult) -> None:
    """Write genes.parquet and config.json, and record the merge in the manifest."""
    import pyarrow.parquet as pq

    with atomic_file(folder.dpath / "genes.parquet", force=True) as tmp:
        pq.write_table(make_gene_table(union), tmp, compression="zstd")
    config = {
        "total_cells_requested": folder.body.get("requested_cells") or result.cells,
        "total_cells_downloaded": result.cells,
        "total_samples": len(union.members),
        "samples": [_make_sample(m.name, samples[m.name], folder) for m in union.members],
        "download_timestamp": folder.body.get("ended") or datetime.now(UTC).isoformat(timespec="seconds"),
        "gene_list": union.genes.kept,
        "max_expression_value": result.max,
        "sparsity": result.sparsity,
    }
    write_json(folder.dpath / CONFIG, config, force=True, indent=None)  # a long list takes Python long to indent
    folder.body.setdefault("merged", {})[result.format] = result.to_json()
    folder.save()


def _make_sample(name: str, row: dict[str, Any], folder: Folder) -> dict[str, Any]:
    cells = row.get("obs_count", row.get("_cells"))
    return {
        "srx_accession": name,
        "file_path": row["_path"],
        "obs_count": folder.files[name]["cells"] if cells is None else int(cells),
        **{c: row.get(c) for c in SAMPLE_COLUMNS},
    }


def _write_zarr(
    union: Union,
    obs: EmptyTable,
    target: Path,
    dtype: np.dtype,
    *,
    force: bool,
    threads: int | None,
    progress: Progress,
    **_: Any,
) -> None:
    from vcelltools.io.write.zarr import write_zarr

    m = union.matrix
    progress.start("merging", m.stored_bytes, "bytes")
    blocks = ((p, i, d) for _first, p, i, d in iterate_csr(union, threads=threads, progress=progress, dtype=dtype))
    write_zarr(target, blocks, shape=m.shape, nnz=m.nnz, dtype=dtype, obs=obs, var=make_var(union.genes), force=force)
    progress.finish()


def _build_store(
    union: Union,
    obs: EmptyTable,
    target: Path,
    basis: Basis,
    *,
    force: bool,
    threads: int | None,
    progress: Progress,
) -> list[str]:
    """Build a store of the union without an intermediate file; every cell is a control, in runs by experiment."""
    from vcelltools.stores.building.make import build_store

    ds = Dataset(
        path=None,
        kind="memory",
        modality=None,
        layer="X",
        matrix=union.matrix,
        obs=obs,
        var=make_var(union.genes),
        source=union,
    )
    built = build_store(
        ds, basis=basis, out=target.parent, name=target.name, unperturbed=True, group_by=["experiment"],
        gene_name_col="gene_symbols", force=force, threads=threads, progress=progress,
    )  # fmt: skip
    return list(built.warnings)


def _write_batches(
    union: Union,
    obs: EmptyTable,
    target: Path,
    dtype: np.dtype,
    *,
    force: bool,
    threads: int | None,
    progress: Progress,
    batch_size: int,
) -> None:
    from vcelltools.io.formats.batchfile import BatchWriter

    m, starts = union.matrix, union.survey.starts
    n_files = -(-len(union.members) // batch_size)
    stale = sorted(set(target.glob("batch_*.h5")) - {target / _name_batch(b) for b in range(n_files)})
    progress.start("merging", m.stored_bytes, "bytes")
    barcodes = obs.column("barcode").values
    assert barcodes is not None
    for b in range(n_files):
        first, stop = (int(starts[min(k * batch_size, len(union.members))]) for k in (b, b + 1))
        experiments = [x.name for x in union.members[b * batch_size : (b + 1) * batch_size]]
        sizes = np.diff(starts)[b * batch_size : (b + 1) * batch_size]
        with BatchWriter(target / _name_batch(b), genes=union.genes.kept, dtype=dtype, force=force) as out:
            per_cell = int(m.indptr[stop] - m.indptr[first]) // max(stop - first, 1) + 1
            step = out.rows * max(1, _SPAN_VALUES // per_cell // out.rows)
            spans = [_make_span(m, a, min(a + step, stop)) for a in range(first, stop, step)]
            for n_rows, packed in map_spans(m, spans, out.pack, threads=threads, progress=progress):
                out.append(n_rows, packed)
            out.finish(
                cells=barcodes[first:stop].tolist(),
                experiments=np.repeat(np.array(experiments, object), sizes).tolist(),
                gene_count=union.survey.gene_count[first:stop],
                umi_count=union.survey.umi_count[first:stop],
            )
    for path in stale:  # files of an earlier merge would be taken for files of this one
        path.unlink()
    progress.finish()


def _make_span(m: UnionMatrix, a: int, b: int) -> Span:
    """Return the cells ``a:b`` as a span."""
    n = int(m.indptr[b] - m.indptr[a])
    return Span(a, b, n, 8 * n)


def _name_batch(b: int) -> str:
    return f"batch_{b:04d}.h5"
