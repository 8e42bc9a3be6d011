"""Rank highly variable genes with any flavour, from one pass of exact histograms."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError, check_number, checked, spell
from vcelltools.genes.identity import label_columns, strip_version
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.fingerprint import describe_source, find_difference, fingerprinting
from vcelltools.io.results import Shown
from vcelltools.io.rounding import round_matrix
from vcelltools.names import write_lines
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.selection.flavors import FLAVORS, Task, rank
from vcelltools.selection.histograms import stack_batches
from vcelltools.selection.ranking import get_mean_variance
from vcelltools.selection.statistics import Statistics, is_statistics, load_statistics, save_statistics, scan
from vcelltools.selection.trend import check_span

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

FIGURE = "hvg_analysis.png"  # beside hvg_info.json
SCORES = "hvg_scores.json"
NON_INTEGER = ("refuse", "round", "keep")
_WAIT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class HvgResult(Shown):
    """Ranked genes, and the per-gene columns of the ranking.

    Attributes
    ----------
    genes
        (g,) gene names in the order of the file.
    labels
        (g,) the labels in a gene list: the name, or the id if several genes share the name.
    columns
        Per-gene arrays under scanpy's names: ``means, variances, variances_norm, highly_variable_rank,
        highly_variable, n_cells`` and columns specific to the flavour.
    order
        Positions of the selected genes, best first.
    settings, source, versions
        The options, the file and the versions of the software.
    warnings, notes
        Messages that the user should act on, and decisions or findings of the reader.
    n_cells, bytes_read, seconds
        Size and cost.
    """

    genes: np.ndarray
    labels: np.ndarray
    columns: dict[str, np.ndarray]
    order: np.ndarray
    settings: dict[str, Any]
    source: list[dict[str, Any]]
    versions: dict[str, str]
    n_cells: int
    bytes_read: int
    seconds: float
    batches: list[str] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def selected(self) -> list[str]:
        """Labels of the selected genes, best first."""
        return [str(g) for g in self.labels[self.order]]

    def to_frame(self) -> pd.DataFrame:
        """Return the columns as a DataFrame indexed by gene, in the order of the file."""
        import pandas as pd

        return pd.DataFrame(self.columns, index=pd.Index(self.genes.astype(str)))

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``hvg_scores.json``."""
        per_gene = {"gene": self.genes.astype(str)} | self.columns
        return {"genes": per_gene, "settings": self.settings, "source": self.source, "versions": self.versions}

    def write(self, fpath: str | os.PathLike, *, force: bool = False) -> tuple[Path, Path]:
        """Write the gene list and ``hvg_scores.json`` beside it, both or neither; return both paths.

        Existing scores of another list are renamed to ``hvg_scores.<that list>.json``. If another process
        writes to the same folder, this method waits for it.
        """
        from vcelltools.io.write.atomic import staged, write_json, write_text

        out = Path(fpath)
        scores = out.with_name(SCORES)
        with staged([scores, out], force=force, over=[scores], wait_seconds=_WAIT_SECONDS) as there:
            write_text(there / out.name, write_lines(dict.fromkeys(self.selected)))
            write_json(there / scores.name, self.to_json() | {"list": out.name}, indent=None)
            _keep_other_scores(scores, out.name)
        return out, scores


def _keep_other_scores(scores: Path, mine: str) -> None:
    """Rename the scores of another list to a free name, or to one with older scores of the same list."""
    if not os.path.lexists(scores) or (listed := _read_list_name(scores)) == mine:
        return
    stem, name = (Path(listed).stem, listed) if listed else ("earlier", "earlier")
    names = chain((stem, name), (f"{name}.{i}" for i in count(2)))
    kept = (scores.with_name(f"hvg_scores.{n}.json") for n in names)
    os.replace(scores, next(k for k in kept if not os.path.lexists(k) or (listed and _read_list_name(k) == listed)))


def _read_list_name(scores: Path) -> str | None:
    """Return the name of the list to which scores belong, which is at the end of the file."""
    try:
        with open(scores, "rb") as f:
            f.seek(max(0, scores.stat().st_size - 4096))
            tail = f.read().decode("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r'"list": "((?:[^"\\]|\\.)+)"\}\s*$', tail)
    return json.loads(f'"{found.group(1)}"') if found else None


@contextmanager
def writing(
    sources: Sequence[object],
    out: str | os.PathLike,
    *,
    plot: str | os.PathLike | None = None,
    stats_dpath: str | os.PathLike | None = None,
    hvg_info: str | os.PathLike | None = None,
    force: bool = False,
) -> Iterator[None]:
    """Check all outputs of a selection, and hold the lock of the list while it is made.

    Raises
    ------
    UsageError
        If an output must not be written.
    EnvironmentFault
        If another process writes the list.
    """
    from vcelltools.io.write.atomic import locked
    from vcelltools.io.write.guard import Target, guard_outputs

    list_fpath = Path(out)
    targets = [Target(list_fpath), Target(list_fpath.with_name(SCORES), "json", reuse=True)]
    if plot is not None:
        targets.append(Target(plot, "png"))
    if hvg_info is not None:
        targets += [Target(hvg_info, "json"), Target(Path(hvg_info).with_name(FIGURE), "png")]
    if stats_dpath is not None:
        targets.append(Target(stats_dpath, "folder of statistics", owns=is_statistics, reuse=True))
    guard_outputs(targets, reads=sources, force=force)
    with locked(list_fpath):
        yield


def _check_request(
    many: list[Any],
    top: int,
    flavor: str,
    span: float,
    non_integer: str,
    stats_dpath: str | os.PathLike | None,
    dask: str | None,
) -> None:
    """Raise for options that cannot be combined."""
    if flavor not in FLAVORS:
        raise UsageError(f"flavor {flavor!r} is not known", hint=f"one of: {', '.join(FLAVORS)}")
    if top < 1:
        raise UsageError(f"top is {top}, but must be at least 1")
    check_span(span)
    if non_integer not in NON_INTEGER:
        raise UsageError(f"non_integer {non_integer!r} is not known", hint=f"one of: {', '.join(NON_INTEGER)}")
    if not many:
        raise UsageError("no file was given")
    paths = [os.path.realpath(s) for s in many if isinstance(s, str | os.PathLike)]
    if len(set(paths)) < len(paths):
        twice = next(p for p in paths if paths.count(p) > 1)
        raise UsageError(f"{os.path.relpath(twice)} is given twice", hint="list every file once")
    if len(many) > 1 and FLAVORS[flavor].needs_values:
        raise UsageError(
            f"flavor {flavor} can only rank one file",
            hint=f"for several files, use one of: {', '.join(f for f, x in FLAVORS.items() if not x.needs_values)}",
        )
    if len(many) > 1 and stats_dpath is not None:
        raise UsageError(
            f"{spell('stats')} saves the statistics of only one file",
            hint="run vcelltools hvg --stats once per file, then merge",
        )
    if non_integer != "refuse" and (len(many) > 1 or stats_dpath is not None or dask is not None):
        raise UsageError(
            f"fractional counts ({non_integer}) are only supported for one file, without saved statistics or Dask",
            hint=f"give one file, without {spell('stats')} and {spell('dask')}",
        )


def compute_hvg(
    sources: str | os.PathLike | AnnData | Sequence[str | os.PathLike],
    *,
    top: int = 2000,
    flavor: str = "seurat_v3",
    batch_key: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    library_size: str | None = None,
    span: float = 0.3,
    min_share: float = 0.001,
    theta: float = 100.0,
    stats_dpath: str | os.PathLike | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    max_values: int | None = None,
    dask: str | None = None,
    non_integer: str = "refuse",
    seed: int = 0,
) -> HvgResult:
    """Rank the genes of one or more data sets by variability.

    Parameters
    ----------
    sources
        A file (any that :func:`vcelltools.io.open_dataset` opens), a folder of saved statistics, an AnnData, or
        a list of files, which are merged on the genes that they share, with each file as a batch.
    top
        Number of genes to select.
    flavor
        One of ``FLAVORS``; see ``docs/hvg.md``.
    batch_key
        obs column of the batch; genes are ranked within each batch and combined as in scanpy.
    span
        Loess span of seurat_v3 and seurat_v3_paper.
    min_share
        dispersion only: minimum fraction of cells that express a selected gene.
    theta
        pearson_residuals only: inverse dispersion of the negative binomial.
    stats_dpath
        Folder of the statistics, which are reused if they match the file and written if there are none.
    threads, max_values
        Number of worker threads, and of values that each reads at once; neither changes the result.
    dask
        ``local``, or the address of a Dask scheduler whose workers can access the file and count ranges of cells.
    library_size
        Flavours that normalise: obs column with the library sizes of the whole transcriptome, by which the counts are
        divided instead of their sum if the file holds only some of the genes.
    non_integer
        How to handle fractional counts: ``refuse`` them; ``round`` them stochastically with ``seed``; or ``keep`` them,
        with moments of floats instead of exact counts. The last two need a single file, without ``stats_dpath`` and
        ``dask``.
    seed
        Random seed of the rounding.

    Raises
    ------
    UsageError
        If the flavour is unknown, ``top`` is below 1, or ``span`` is not above 0 and at most 1.
    DataError
        If a file is damaged, lacks something requested, or does not hold counts.
    """
    began = time.monotonic()
    check_number("min_share", min_share, low=0, high=1)
    check_number("theta", theta, low=1e-6)
    many = list(sources) if isinstance(sources, list | tuple) else [sources]
    _check_request(many, top, flavor, span, non_integer, stats_dpath, dask)
    if library_size is not None and not FLAVORS[flavor].needs_values:
        raise UsageError(
            f"{spell('library_size')} cannot be used with {spell('flavor', flavor)}, which ranks counts as they are",
            hint=f"one of: {', '.join(k for k, f in FLAVORS.items() if f.needs_values)}",
        )

    part: dict[str, Any] = {"modality": modality, "layer": layer, "feature_type": feature_type, "genome": genome}

    def opener() -> Dataset:
        ds = open_dataset(many[0], **part)
        if non_integer == "round":
            ds.matrix = round_matrix(ds.matrix, seed)
        return ds

    warnings: list[str] = []
    notes: list[str] = []
    rounded = False
    as_log = FLAVORS[flavor].takes_log and len(many) == 1 and _holds_log(many[0], part)
    if as_log:
        refused = {"stats_dpath": stats_dpath, "dask": dask, "non_integer": non_integer != "refuse",
                   "library_size": library_size}  # fmt: skip
        if wrong := [spell(k) for k, v in refused.items() if v]:
            raise UsageError(f"{', '.join(wrong)}: not with log1p values", hint="leave it out, or pass counts")
        with opener() as ds:
            parts = [_scan_log(ds, flavor, batch_key, opener, threads, progress)]
            notes += ds.notes
    elif non_integer == "refuse":
        parts = []
        for source in many:
            stats, said = _get_statistics(
                source, batch_key, part, stats_dpath, threads=threads, progress=progress, max_values=max_values,
                dask=dask,
            )  # fmt: skip
            parts.append(stats)
            notes += said
    else:
        with opener() as ds:
            parts = [_scan_fractions(ds, non_integer, batch_key, opener, threads, progress)]
            rounded = getattr(ds.matrix, "rounded", False)
            notes += ds.notes
    merged = parts[0] if len(parts) == 1 else _merge_files(parts, [_label(s) for s in many], warnings)
    for p, source in zip(parts, many, strict=True):
        of = f"{_label(source)}: " if len(many) > 1 else ""
        warnings += [of + w for w in p.warnings]
        notes += [of + n for n in p.notes]
    if FLAVORS[flavor].needs_values and not as_log:
        merged = _divide_by_library(merged, opener, library_size, warnings)
    if top > merged.n_genes:
        warnings.append(f"top is {top:,}, but there are only {merged.n_genes:,} genes; all of them were selected")
    with_batches = batch_key is not None or len(parts) > 1
    given = {"span": span, "min_share": min_share, "theta": theta}
    own = {k: given[k] for k in FLAVORS[flavor].options}
    columns, order, said = _rank(
        merged,
        flavor,
        top,
        options=own,
        opener=opener,
        threads=threads,
        progress=progress,
    )
    warnings += said
    if not with_batches:
        columns.pop("highly_variable_nbatches", None)
        columns.pop("highly_variable_intersection", None)
    settings: dict[str, Any] = {
        "flavor": flavor,
        "top": top,
        "batch_key": batch_key,
        **part,
        "layer": layer or "X",
    }
    settings |= own | ({} if library_size is None else {"library_size": library_size})
    if as_log:
        settings["values"] = "log1p"
    if rounded or non_integer == "keep":
        settings |= {"non_integer": non_integer} | ({"seed": seed} if rounded else {})
    return HvgResult(
        genes=merged.genes,
        labels=label_columns(merged.genes, merged.ids),
        columns=columns,
        order=order,
        settings=settings,
        source=[p.source for p in parts],
        versions=get_versions(),
        n_cells=merged.n_cells,
        bytes_read=sum(p.bytes_read for p in parts),
        seconds=time.monotonic() - began,
        batches=merged.batches if with_batches else [],
        warnings=tuple(dict.fromkeys(warnings)),
        notes=tuple(dict.fromkeys(notes)),
    )


@checked
def hvg(
    source: str | os.PathLike | AnnData | Sequence[str | os.PathLike],
    *,
    top: int = 2000,
    flavor: str = "seurat_v3",
    batch_key: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    library_size: str | None = None,
    span: float = 0.3,
    min_share: float = 0.001,
    theta: float = 100.0,
    stats_dpath: str | os.PathLike | None = None,
    non_integer: str = "refuse",
    seed: int = 0,
    inplace: bool = False,
    threads: int | None = None,
    dask: str | None = None,
    progress: Progress = SILENT,
) -> pd.DataFrame | None:
    """Rank genes and return scanpy's columns, one row per gene, in the order of the file.

    Takes the options of :func:`compute_hvg`.

    Parameters
    ----------
    inplace
        For an AnnData, write the columns to ``adata.var`` and the flavour to ``adata.uns["hvg"]``, like scanpy,
        and return None.

    Returns
    -------
    A DataFrame whose ``attrs["genes"]`` is the ranked list of selected genes; ``attrs`` also holds settings, sources,
    versions and warnings.

    Raises
    ------
    UsageError
        If options are invalid, or ``inplace`` is used without an AnnData.
    DataError
        If a file is damaged, lacks something requested, or does not hold counts.

    Examples
    --------
    >>> import vcelltools as vc
    >>> frame = vc.hvg("atlas.h5ad", top=20)
    >>> len(frame.attrs["genes"]), int(frame["highly_variable"].sum())
    (20, 20)
    >>> import anndata
    >>> adata = anndata.read_h5ad("atlas.h5ad")
    >>> vc.hvg(adata, top=20, inplace=True)
    >>> adata.var["highly_variable"].sum(), adata.uns["hvg"]
    (np.int64(20), {'flavor': 'seurat_v3'})
    """
    if inplace and not hasattr(source, "n_vars"):
        raise UsageError("only an AnnData can be changed in place", hint="remove inplace", field="inplace")
    result = compute_hvg(
        source, top=top, flavor=flavor, batch_key=batch_key, modality=modality, layer=layer,
        feature_type=feature_type, genome=genome, library_size=library_size, span=span, min_share=min_share,
        theta=theta, stats_dpath=stats_dpath,
        non_integer=non_integer, seed=seed, threads=threads, dask=dask, progress=progress,
    )  # fmt: skip
    frame = result.to_frame()
    if inplace:
        adata: Any = source
        if len(frame) != adata.n_vars:  # antibodies and guides are not genes
            frame = frame.reindex(adata.var_names)
            frame["highly_variable"] = frame["highly_variable"].fillna(value=False).astype(bool)
        for name in frame.columns:
            adata.var[name] = frame[name].to_numpy()
        adata.uns["hvg"] = {"flavor": flavor}
        return None
    frame.attrs = {
        "genes": result.selected,
        "settings": result.settings,
        "source": result.source,
        "versions": result.versions,
        "warnings": list(result.warnings),
    }
    return frame


def get_versions() -> dict[str, str]:
    """Return the versions of the software that a result depends on."""
    import importlib.metadata as m

    names = ("numpy", "numba", "h5py", "scikit-misc")
    return {"vcelltools": m.version("vcelltools")} | {n: m.version(n) for n in names}


def _label(source: Any) -> str:
    return Path(source).name if isinstance(source, str | os.PathLike) else "AnnData"


def _get_statistics(
    source: Any,
    batch_key: str | None,
    part: dict[str, Any],
    stats_dpath: str | os.PathLike | None,
    *,
    threads: int | None,
    progress: Progress,
    max_values: int | None,
    dask: str | None = None,
) -> tuple[Statistics, list[str]]:
    """Return the statistics of one source, from saved ones if they match, and notes."""
    if isinstance(source, str | os.PathLike) and (Path(source) / "manifest.json").is_file():
        return load_statistics(source), [f"{source}: saved statistics were used"]
    from vcelltools.io.survey import require_counts
    from vcelltools.io.write.atomic import locked

    with locked(stats_dpath), open_dataset(source, **part) as ds:
        notes = list(ds.notes)
        if stats_dpath is not None and (Path(stats_dpath) / "manifest.json").is_file():
            saved, stale = _load_saved(stats_dpath, ds, batch_key)
            if stale is None:
                return saved, [*notes, f"{stats_dpath}: saved statistics were used"]
            notes.append(f"{stats_dpath}: its statistics were computed again, because {stale}")
        require_counts(ds, fractions=f"for fractional counts, use {spell('non_integer', 'round')} or 'keep'")
        with fingerprinting(ds) if stats_dpath is not None else nullcontext() as fingerprint:
            if dask is not None:
                from vcelltools.runtime.cluster import open_cluster
                from vcelltools.selection.distributed import scan_on_cluster

                with open_cluster(dask) as client:
                    stats = scan_on_cluster(source, client, batch_key=batch_key, progress=progress, **ds.part)
            else:
                stats = scan(
                    ds,
                    batch_key=batch_key,
                    threads=threads,
                    progress=progress,
                    phase=f"reading {_label(source)}",
                    max_values=max_values,
                )
            stats.source["batch_key"] = batch_key
            if stats_dpath is not None and fingerprint is not None:
                stats.source["fingerprint"] = fingerprint.result()
                save_statistics(stats, stats_dpath, force=True)  # new, or replacing stale ones
        return stats, notes


def _divide_by_library(
    stats: Statistics, opener: Callable[[], Dataset], column: str | None, warnings: list[str]
) -> Statistics:
    """Return statistics with the library sizes of an obs column; without one, warn of a column with larger totals."""
    from vcelltools.io.library import check_library, read_library, suggest_library

    with opener() as ds:
        if column is None:
            warnings += suggest_library(ds, stats.library_size)
            return stats
        given = read_library(ds, column)
        check_library(given, stats.library_size, column)
    whole = given.astype(np.int64)
    return replace(stats, library_size=whole if np.array_equal(whole, given) else given)


def _scan_fractions(
    ds: Dataset,
    non_integer: str,
    batch_key: str | None,
    opener: Callable[[], Dataset],
    threads: int | None,
    progress: Progress,
) -> Statistics:
    """Return the statistics of fractional counts, rounded by the matrix or unchanged."""
    from vcelltools.io.survey import require_counts

    require_counts(ds, whole=False, small=True)
    if non_integer == "keep" and ds.matrix.dtype.kind == "f":
        from vcelltools.selection.moments import scan_fractions

        return scan_fractions(ds, batch_key, opener, threads, progress)
    stats = scan(ds, batch_key=batch_key, threads=threads, progress=progress)
    if not getattr(ds.matrix, "rounded", False):
        return stats
    return replace(stats, warnings=(*stats.warnings, "fractional counts were rounded up or down at random"))


def _holds_log(source: Any, part: dict[str, str | None]) -> bool:
    """Return whether what is opened holds log1p values."""
    from vcelltools.io.counts import get_count_evidence

    if isinstance(source, str | os.PathLike) and (Path(source) / "manifest.json").is_file():
        return False
    with open_dataset(source, **part) as ds:
        return get_count_evidence(ds.matrix).looks_like in ("log1p", "log1p CP10K")


def _scan_log(
    ds: Dataset,
    flavor: str,
    batch_key: str | None,
    opener: Callable[[], Dataset],
    threads: int | None,
    progress: Progress,
) -> Statistics:
    """Return the statistics of log1p values: seurat looks at expm1 of them, cell_ranger at them as they are."""
    from vcelltools.io.counts import find_log_base
    from vcelltools.selection.moments import scan_fractions

    base, _, said = find_log_base(ds)
    ds.notes += [*said, f"{ds.label}: log1p values are ranked as they are, which {flavor} does in scanpy too"]

    def undo(values: np.ndarray) -> np.ndarray:
        return np.expm1(values if base == math.e else values * values.dtype.type(math.log(base)))

    return scan_fractions(ds, batch_key, opener, threads, progress, undo if flavor == "seurat" else lambda v: v)


def _load_saved(stats_dpath: str | os.PathLike, ds: Dataset, batch_key: str | None) -> tuple[Statistics, str | None]:
    """Return the saved statistics in a folder, and why they are stale if the source has changed.

    A :class:`UsageError` is raised if they belong to another source or another batch key.
    """
    saved = load_statistics(stats_dpath)
    differs = find_difference(ds, saved.source)
    now = describe_source(ds)
    if differs is not None and all(saved.source.get(k) == now[k] for k in ("path", *ds.part)):
        return saved, differs
    if differs is None and saved.source.get("batch_key") != batch_key:
        differs = f"batch_key was {saved.source.get('batch_key')!r} and is {batch_key!r}"
    if differs is not None:
        raise UsageError(
            f"{stats_dpath} holds statistics of another source than {ds.label}: {differs}",
            hint="choose another folder, or delete this one",
        )
    return saved, None


def _merge_files(parts: list[Statistics], names: list[str], notes: list[str]) -> Statistics:
    """Concatenate the batches of several files, on the genes that all of them have.

    Genes are matched by name, or by id if a name belongs to several genes or no name is shared.
    """
    keys = [p.genes.tolist() for p in parts]
    repeated = next((n for k, n in zip(keys, names, strict=True) if len(set(k)) != len(k)), None)
    if repeated is not None or not set(keys[0]).intersection(*keys[1:]):
        by_id = [None if p.ids is None else [strip_version(str(i)) for i in p.ids] for p in parts]
        if all(k is not None and len(set(k)) == len(k) for k in by_id):
            keys = [k for k in by_id if k is not None]
            notes.append("genes are matched by their Ensembl ids")
        elif repeated is not None:
            raise DataError(
                f"{repeated}: gene names occur more than once and not every file has distinct ids, so files "
                "cannot be matched"
            )
    common = set(keys[0]).intersection(*keys[1:])
    if not common:
        raise DataError(
            f"{' and '.join(names)} share no gene names",
            hint="one file may use symbols and another Ensembl ids, which vcelltools basis reconciles",
        )
    wanted = [i for i, g in enumerate(keys[0]) if g in common]
    picked = []
    for p, key, name in zip(parts, keys, names, strict=True):
        at = {g: i for i, g in enumerate(key)}
        picked.append(p.histograms.select_genes(np.array([at[keys[0][i]] for i in wanted], np.int64)))
        if p.n_genes != len(wanted):
            notes.append(
                f"{name}: {p.n_genes - len(wanted):,} of {p.n_genes:,} genes are not in every file and were dropped"
            )
    labels = [f"{name}:{b}" if b else name for p, name in zip(parts, names, strict=True) for b in p.batches]
    shift = np.cumsum([0] + [len(p.batches) for p in parts[:-1]])
    return Statistics(
        genes=parts[0].genes[wanted],
        ids=None if parts[0].ids is None else parts[0].ids[wanted],
        batches=labels,
        histograms=stack_batches(picked),
        library_size=np.concatenate([p.library_size for p in parts]),
        genes_per_cell=np.concatenate([p.genes_per_cell for p in parts]),
        batch_n=np.concatenate([p.batch_n + s for p, s in zip(parts, shift, strict=True)]),
        bytes_read=sum(p.bytes_read for p in parts),
    )


def _rank(
    stats: Statistics, flavor: str, top: int, *, options: dict[str, float], opener, threads, progress
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Return (columns, positions of the selected genes best first, notes)."""
    pooled = stats.histograms.pooled()
    mean, variance = get_mean_variance(pooled, 0)
    task = Task(
        stats=stats, flavor=flavor, top=top, mean=mean, variance=variance, options=options, open_dataset=opener,
        threads=threads, progress=progress,
    )  # fmt: skip
    more, order = rank(task)
    columns = {"means": mean, "variances": variance} | more
    columns["n_cells"] = pooled.expressing(0)
    chosen = np.zeros(stats.n_genes, bool)
    chosen[order] = True
    columns["highly_variable"] = chosen
    return columns, order, task.notes
