"""Build the store of one data set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.config import NAME_PATTERN, DatasetConfig, Guides, convert
from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.genes.identity import Basis, make_basis, read_basis
from vcelltools.genes.table import read_aliases
from vcelltools.io import Dataset
from vcelltools.io.fingerprint import describe_source, fingerprinting
from vcelltools.io.library import suggest_library
from vcelltools.io.results import Result
from vcelltools.io.write.atomic import check_space, locked, translate_os_errors
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.presets import resolve_preset
from vcelltools.runtime.cluster import connect
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.stores.building.builder import Builder
from vcelltools.stores.building.layout import BUCKET_BYTES, CHECKPOINT_SECONDS, CHUNK_VALUES, MEMORY_BYTES, Layout
from vcelltools.stores.building.plan import StorePlan, make_plan, open_source
from vcelltools.stores.format import is_store, is_unfinished, read_manifest

if TYPE_CHECKING:
    from anndata import AnnData
    from distributed import Client


@dataclass(frozen=True, kw_only=True)
class BuildResult(Result):
    """The store that was built.

    Attributes
    ----------
    path
        The folder of the store.
    n_cells, n_genes, n_runs, n_perturbations
        Numbers of cells, basis genes, runs and perturbations (without the control).
    dropped
        Reason -> number of dropped cells.
    small_groups
        (cell line, perturbation, cells) of groups dropped as too small.
    genes
        The reconciliation of gene identities.
    sha256
        The hash of the store.
    seconds
        Wall-clock time.
    warnings
        Messages for the user.
    kept
        Whether a complete store of the same plan existed, so that nothing was built.
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
            f"{name!r} is not a valid name for a store",
            hint=f"{spell('name')} may hold letters, digits and ._+-, and starts with a letter",
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


@checked
def build_store(
    source: str | os.PathLike | AnnData | Dataset,
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
    preset: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    pert_col: str | None = None,
    control: str | Sequence[str] | None = None,
    control_is_missing: bool | None = None,
    unperturbed: bool | None = None,
    non_integer: str | None = None,
    group_by: str | Sequence[str] | None = None,
    cell_line: str | None = None,
    cell_line_col: str | None = None,
    direction: str | None = None,
    direction_col: str | None = None,
    gene_id_col: str | None = None,
    gene_name_col: str | None = None,
    guides: Guides | Mapping[str, Any] | None = None,
    min_cells: int | None = None,
    keep: Sequence[str] | None = None,
    library_size: str | None = None,
    stats: str | os.PathLike | None = None,
    sums: str | None = None,
    duplicates: str | None = None,
) -> BuildResult:
    """Build the store of one data set at ``out/name``.

    Parameters
    ----------
    source
        A file, an AnnData, or an open data set.
    basis
        ``basis.txt``, or the ordered genes.
    out, name
        The store is the folder ``out/name``; the default name is that of ``spec``, or of the file.
    spec
        The complete description of the data set, which replaces the arguments from ``preset`` on.
    preset, modality, layer, feature_type, genome, pert_col, control, control_is_missing, unperturbed, non_integer
        See :class:`vcelltools.config.DatasetConfig`, which also has the defaults of arguments that are None.
    group_by, cell_line, cell_line_col, direction, direction_col
        See :class:`vcelltools.config.DatasetConfig`, which also has the defaults of arguments that are None.
    gene_id_col, gene_name_col, guides, min_cells, keep, library_size, stats, sums, duplicates
        See the same class.
    aliases
        A tab-separated table of gene names: alias, symbol or id.
    target_sum, seed
        Counts per cell after normalisation; seed of the order of cells within a run.
    force, keep_whole
        How to handle an existing store: ``force`` replaces it; ``keep_whole`` keeps it if it is complete and equal to
        what would be built (same source, basis and options), and is an error otherwise.
    threads, chunk_values, bucket_bytes, checkpoint_seconds
        How the work is cut; the bytes of the store do not depend on them.
    memory_bytes
        Memory limit of the build. Sums of all genes for thousands of groups that do not fit are kept on disk,
        which takes somewhat longer.
    hash_source
        Whether the fingerprint of the source covers every byte; by default up to 4 GiB
        (:mod:`vcelltools.io.fingerprint`).
    dask, part_cells
        ``local``, the address of a Dask scheduler, or a Client: its workers read ranges of ``part_cells`` cells.
        Source and store must be on storage that all workers can access. The bytes do not depend on it.

    Raises
    ------
    UsageError
        If the store exists and ``force`` is off, or a required option is missing.
    DataError
        If the file does not match the options.
    EnvironmentFault
        If the disk is full or read-only, or another process writes the store.

    Examples
    --------
    >>> import vcelltools as vc
    >>> built = vc.build_store("atlas.h5ad", basis="basis.txt", out="new", pert_col="target_gene",
    ...                        control="non-targeting", cell_line_col="cell_line")
    >>> built.path.as_posix(), built.n_genes
    ('new/atlas', 30)
    """
    import time

    began = time.monotonic()
    genes = _as_basis(basis)
    fields = {
        "preset": preset, "modality": modality, "layer": layer, "feature_type": feature_type, "genome": genome,
        "pert_col": pert_col, "control": control, "control_is_missing": control_is_missing,
        "unperturbed": unperturbed, "non_integer": non_integer, "group_by": group_by, "cell_line": cell_line,
        "cell_line_col": cell_line_col, "direction": direction, "direction_col": direction_col,
        "gene_id_col": gene_id_col, "gene_name_col": gene_name_col, "guides": guides,
        "min_cells": min_cells, "keep": keep,
        "library_size": library_size, "stats": stats, "sums": sums, "duplicates": duplicates,
    }  # fmt: skip
    if spec is not None and (given := [k for k, v in fields.items() if v is not None]):
        raise UsageError(f"spec and {given[0]} are both given", hint="remove one of the two", field=given[0])
    spec = resolve_preset(spec or make_spec(source, name, fields))
    target = Path(out) / spec.name
    work_dpath = target.parent / f".{spec.name}.building"
    guard_outputs(
        [
            Target(target, "store", owns=is_store, reuse=keep_whole),
            Target(work_dpath, "unfinished store", owns=is_unfinished, reuse=True),
        ],
        reads=[source, basis, aliases, spec.stats],
        force=force,
    )
    with (
        translate_os_errors(target),
        locked(target),
        open_source(source, spec, seed) as ds,
        fingerprinting(ds, whole=hash_source) as fingerprint,
    ):
        plan = make_plan(
            ds,
            spec,
            genes,
            target_sum=target_sum,
            seed=seed,
            aliases=read_aliases(aliases) if aliases is not None else None,
        )
        layout = Layout(
            plan=plan,
            ds=ds,
            source={**describe_source(ds), "fingerprint": fingerprint.result()} | _describe_rounding(spec),
            threads=get_threads(threads),
            chunk_values=chunk_values,
            bucket_bytes=bucket_bytes,
            checkpoint_seconds=checkpoint_seconds,
            memory_bytes=memory_bytes,
        )
        builder = Builder(layout, work_dpath, progress)
        kept = keep_whole and not force and target.exists()
        if kept:
            if not _is_of(target, layout.fingerprint):
                hint = f"{spell('force', True)} overwrites it"
                raise UsageError(f"{target} exists with different data or options", hint=hint)
            progress.note(f"{target} is complete and up to date, and was kept")
        elif not builder.is_complete():
            if not builder.dpath.exists():
                check_space(target.parent, layout.disk_bytes)
            with connect(dask) as client:
                builder.run(client, part_cells)
        if not kept:
            builder.publish(target)
        larger = _suggest_library(layout, target)
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
        warnings=(*_get_warnings(plan, manifest), *larger),
        kept=kept,
    )


def _describe_rounding(spec: DatasetConfig) -> dict[str, str]:
    """Return the entry of a manifest on rounded counts, so that later reads of the source round in the same way."""
    return {"non_integer": spec.non_integer} if spec.non_integer == "round" else {}


def _is_of(target: Path, fingerprint: str) -> bool:
    """Return whether the store at ``target`` belongs to this plan and all its parts have the right size."""
    try:
        manifest = read_manifest(target)
    except DataError:
        return False
    parts = manifest["files"].items()
    return manifest["plan"] == fingerprint and all(
        (target / name).exists() and (target / name).stat().st_size == facts["bytes"] for name, facts in parts
    )


def _suggest_library(layout: Layout, target: Path) -> list[str]:
    """Return a warning if obs holds larger totals than those by which the counts were divided."""
    if layout.plan.libsize_from.startswith("obs/"):
        return []
    counted_n = np.full(layout.ds.n_cells, np.nan)
    counted_n[np.load(target / "source_row.npy")] = np.load(target / "libsize.npy")
    return suggest_library(layout.ds, counted_n)


def _get_warnings(plan: StorePlan, manifest: dict[str, Any]) -> tuple[str, ...]:
    out = list(plan.notes)
    out.append(plan.match.describe())
    runs = plan.order.runs
    with_controls = set(map(tuple, runs.loc[runs["is_control"], ["cell_line", "context"]].to_numpy()))
    alone = runs.loc[~runs["is_control"], ["cell_line", "context"]].drop_duplicates()
    bad = [c for c in map(tuple, alone.to_numpy()) if c not in with_controls]
    if bad:
        out.append(f"{len(bad)} contexts have no control cells (the first: {' / '.join(bad[0])})")
    if runs["is_control"].all() and not plan.spec.unperturbed:
        out.append("every cell is a control, so the store can be used to predict into, but not to train on")
    if plan.labels.small:
        out.append(f"{len(plan.labels.small)} groups below {plan.spec.min_cells} cells were dropped")
    out += [f"{n:,} cells were dropped: {why}" for why, n in plan.labels.dropped.items()]
    if manifest["duplicate_entries"]:
        out.append(f"{manifest['duplicate_entries']:,} duplicate entries of a cell and gene were summed")
    return tuple(out)
