"""Building the store of one data set: what it is made from, where it goes, and what was made."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.config import NAME_PATTERN, DatasetConfig, Guides, convert
from vcelltools.errors import DataError, UsageError
from vcelltools.genes import Basis, make_basis, read_aliases, read_basis
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.atomic import check_output, check_space, locked, translate_os_errors
from vcelltools.pipelines.store_build import BUCKET_BYTES, CHECKPOINT_SECONDS, CHUNK_VALUES, MEMORY_BYTES, Builder
from vcelltools.pipelines.store_format import hash_file, read_manifest
from vcelltools.pipelines.store_plan import StorePlan, make_plan
from vcelltools.presets import resolve_preset
from vcelltools.progress import SILENT, Progress
from vcelltools.results import Result

if TYPE_CHECKING:
    from anndata import AnnData
    from distributed import Client

_HASH_WHOLE = 4 << 30


@dataclass(frozen=True, kw_only=True)
class BuildResult(Result):
    """What was built.

    Attributes
    ----------
    path
        The store's folder.
    n_cells, n_genes, n_runs, n_perturbations
        Cells and basis genes in the store, its runs, its perturbations (without control).
    dropped
        Reason -> cells left out.
    small_groups
        (cell line, perturbation, cells) of groups left out as too small.
    genes
        The reconciliation of gene identities.
    sha256
        The store's hash.
    seconds
        Wall-clock time.
    warnings
        What the user should know.
    kept
        Whether the store was there already, whole and of the same plan, and nothing was built.
    """

    path: Path
    n_cells: int
    n_genes: int
    n_runs: int
    n_perturbations: int
    dropped: Mapping[str, int]
    small_groups: tuple[tuple[str, str, int], ...]
    genes: Mapping[str, Any]
    sha256: str
    bytes: int
    seconds: float
    warnings: tuple[str, ...]
    kept: bool = False


def _as_basis(basis: Basis | str | os.PathLike | Sequence[str]) -> Basis:
    if isinstance(basis, Basis):
        return basis
    if isinstance(basis, str | os.PathLike):
        return read_basis(basis)
    return make_basis(basis)


def make_spec(source: Any, name: str | None, options: dict[str, Any]) -> DatasetConfig:
    """Make the description of a data set from keyword options."""
    if name is None:
        if not isinstance(source, str | os.PathLike):
            raise UsageError("a store of an AnnData needs a name", hint="name=...")
        name = Path(source).name.split(".")[0]
    if not re.match(NAME_PATTERN, name):
        raise UsageError(
            f"a store cannot be called {name!r}", hint="--name of letters, digits and ._+-, a letter first"
        )
    values = {k: os.fspath(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    for key in ("control", "group_by", "keep"):
        if isinstance(values.get(key), tuple):
            values[key] = list(values[key])
    if isinstance(values.get("group_by"), str):
        values["group_by"] = [values["group_by"]]
    guides = values.get("guides")
    if isinstance(guides, Guides):
        from msgspec import structs

        values["guides"] = structs.asdict(guides)
    path = str(source) if isinstance(source, str | os.PathLike) else ""
    return convert({"name": name, "path": path, **values}, DatasetConfig, where="build_store")


@contextmanager
def describing(ds: Dataset, *, hash_whole: bool | None) -> Iterator[Future[dict[str, Any]]]:
    """Describe the source in a thread, beside the reading of obs; an error there ends it early."""
    over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="vcelltools-hash") as pool:
        try:
            yield pool.submit(describe_source, ds, hash_whole=hash_whole, over=over)
        finally:
            over.set()


def describe_source(
    ds: Dataset, *, hash_whole: bool | None = None, over: threading.Event | None = None
) -> dict[str, Any]:
    """Return path, size and sha256 of a file; of one above 4 GiB the hash of its ends, unless asked for.

    Hashing all of a large file would read it a second time. Once ``over`` is set nobody wants to know.
    """
    import hashlib

    if ds.path is None:
        return {"path": None, "bytes": None, "sha256": None}
    if ds.path.is_dir():
        return {"path": str(ds.path), "bytes": None, "sha256": None}
    stat = ds.path.stat()
    out: dict[str, Any] = {"path": str(ds.path), "bytes": stat.st_size, "modality": ds.modality, "layer": ds.layer}
    if hash_whole or (hash_whole is None and stat.st_size <= _HASH_WHOLE):
        out["sha256"] = hash_file(ds.path, over)
    else:
        with open(ds.path, "rb") as f:
            ends = f.read(1 << 20)
            f.seek(-(1 << 20), os.SEEK_END)
            ends += f.read()
        out |= {"sha256": None, "sha256_of_ends": hashlib.sha256(ends).hexdigest(), "mtime_ns": stat.st_mtime_ns}
    return out


def build_store(
    source: str | os.PathLike | AnnData,
    *,
    basis: Basis | str | os.PathLike | Sequence[str],
    out: str | os.PathLike = "stores",
    name: str | None = None,
    spec: DatasetConfig | None = None,
    aliases: str | os.PathLike | None = None,
    target_sum: float = 10_000.0,
    seed: int = 0,
    force: bool = False,
    keep_whole: bool = False,
    threads: int | None = None,
    chunk_values: int = CHUNK_VALUES,
    bucket_bytes: int = BUCKET_BYTES,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    memory_bytes: float = MEMORY_BYTES,
    hash_source: bool | None = None,
    dask: str | Client | None = None,
    part_cells: int = 1 << 16,
    progress: Progress = SILENT,
    **options: Any,
) -> BuildResult:
    """Build the store of one data set at ``out/name``.

    Parameters
    ----------
    source
        A file, or an AnnData.
    basis
        ``basis.txt``, or the ordered genes.
    out, name
        The store is the folder ``out/name``; the name is by default that of ``spec``, or the file's.
    spec
        The whole description of the data set; or give its fields as keywords: ``pert_col``, ``control``,
        ``group_by``, ``cell_line``, ``cell_line_col``, ``gene_id_col``, ``guides``, ``min_cells``, ...
        (:class:`vcelltools.config.DatasetConfig`).
    aliases
        A tab-separated table of gene names: alias, symbol or id.
    target_sum, seed
        Counts per cell after normalisation; of the order of cells within a run.
    force, keep_whole
        What becomes of a store that exists: ``force`` replaces it; ``keep_whole`` leaves it where it is what would be
        built (the same source, basis and options), and refuses otherwise.
    threads, chunk_values, bucket_bytes, checkpoint_seconds
        How the work is cut; the bytes of the store do not depend on them.
    memory_bytes
        What building may hold. Sums of all genes for thousands of groups that do not fit beside the rest lie on disk,
        where adding to them takes some three times as long.
    hash_source
        Whether the manifest holds the sha256 of the whole file; by default up to 4 GiB, else that of its ends.
    dask, part_cells
        ``local``, the address of a Dask scheduler, or a Client: its workers read ranges of ``part_cells`` cells.
        Source and store must be on storage that they all see. The bytes do not depend on it.

    Raises
    ------
    UsageError
        Where the store exists and ``force`` is off, or a needed option is missing.
    DataError
        Where the file is not what the options say.
    EnvironmentFault
        Where the disk is full or read-only, or another process writes the store.
    """
    import time

    began = time.monotonic()
    genes = _as_basis(basis)
    spec = resolve_preset(spec or make_spec(source, name, options))
    target = check_output(Path(out) / spec.name, force=force or keep_whole, folder=True)
    with (
        translate_os_errors(target),
        locked(target),
        open_dataset(source, modality=spec.modality, layer=spec.layer) as ds,
        describing(ds, hash_whole=hash_source) as described,
    ):
        plan = make_plan(
            ds,
            spec,
            genes,
            target_sum=target_sum,
            seed=seed,
            aliases=read_aliases(aliases) if aliases is not None else None,
        )
        builder = Builder(
            plan,
            ds,
            target.parent / f".{spec.name}.building",
            source=described.result(),
            threads=threads,
            chunk_values=chunk_values,
            bucket_bytes=bucket_bytes,
            checkpoint_seconds=checkpoint_seconds,
            memory_bytes=memory_bytes,
            progress=progress,
        )
        kept = keep_whole and not force and target.exists()
        if kept:
            if not _is_of(target, builder.fingerprint):
                raise UsageError(f"{target} exists, and is of other data or options", hint="--force overwrites it")
            progress.note(f"{target} is whole and of the same plan: kept")
        elif not builder.is_complete():
            if not builder.dpath.exists():
                check_space(target.parent, builder.disk_bytes)
            with connect(dask) as client:
                builder.run(client, part_cells)
        if not kept:
            builder.publish(target)
    manifest = read_manifest(target)
    return BuildResult(
        path=target,
        n_cells=manifest["n_cells"],
        n_genes=manifest["n_genes"],
        n_runs=manifest["n_runs"],
        n_perturbations=int(plan.order.runs.loc[~plan.order.runs["is_control"], "perturbation"].nunique()),
        dropped=plan.labels.dropped,
        small_groups=tuple(plan.labels.small),
        genes=manifest["genes"],
        sha256=manifest["sha256"],
        bytes=sum(f["bytes"] for f in manifest["files"].values()),
        seconds=time.monotonic() - began,
        warnings=_get_warnings(plan, manifest),
        kept=kept,
    )


def _is_of(target: Path, fingerprint: str) -> bool:
    """Say whether the store at ``target`` is the one of this plan, with all its parts in their sizes."""
    try:
        manifest = read_manifest(target)
    except DataError:
        return False
    parts = manifest["files"].items()
    return manifest["plan"] == fingerprint and all(
        (target / name).exists() and (target / name).stat().st_size == facts["bytes"] for name, facts in parts
    )


@contextmanager
def connect(dask: str | Client | None) -> Iterator[Client | None]:
    """Yield a client of the cluster that was asked for, or None."""
    if not isinstance(dask, str):
        yield dask
        return
    from vcelltools.pipelines.cluster import open_cluster

    with open_cluster(dask) as client:
        yield client


def _get_warnings(plan: StorePlan, manifest: dict[str, Any]) -> tuple[str, ...]:
    out = list(plan.notes)
    out.append(plan.match.describe())
    runs = plan.order.runs
    with_controls = set(map(tuple, runs.loc[runs["is_control"], ["cell_line", "context"]].to_numpy()))
    alone = runs.loc[~runs["is_control"], ["cell_line", "context"]].drop_duplicates()
    bad = [c for c in map(tuple, alone.to_numpy()) if c not in with_controls]
    if bad:
        out.append(f"{len(bad)} contexts have no control cells (the first: {' / '.join(bad[0])})")
    if plan.labels.small:
        out.append(f"{len(plan.labels.small)} groups below {plan.spec.min_cells} cells were left out")
    out += [f"{n:,} cells left out: {why}" for why, n in plan.labels.dropped.items()]
    if manifest["duplicate_entries"]:
        out.append(f"{manifest['duplicate_entries']:,} duplicate entries of one cell and gene were summed")
    return tuple(out)
