"""Highly variable genes: every flavour from one pass of exact histograms."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.histograms import Histograms, stack_batches
from vcelltools.io import open_dataset
from vcelltools.pipelines.statistics import Statistics, load_statistics, save_statistics, scan
from vcelltools.progress import SILENT, Progress
from vcelltools.trend import fit_trend

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

FLAVORS = (
    "seurat_v3",
    "seurat_v3_paper",
    "seurat",
    "cell_ranger",
    "dispersion",
    "pearson_residuals",
    "vcell_lowess",
)
SCORES = "hvg_scores.json"
NEEDS_VALUES = ("seurat", "cell_ranger", "pearson_residuals", "vcell_lowess")  # a second look at the matrix


@dataclass(frozen=True, kw_only=True)
class HvgResult:
    """Ranked genes and the per-gene columns behind the ranking.

    Attributes
    ----------
    genes
        (g,) gene names in the file's order.
    columns
        Per-gene arrays under scanpy's names: ``means, variances, variances_norm, highly_variable_rank,
        highly_variable, n_cells`` and what else the flavour has.
    order
        Positions of the selected genes, best first.
    settings, source, versions
        What was asked for, of which file, by which software.
    warnings, notes
        What the user should act on; what the reader decided or found.
    n_cells, bytes_read, seconds
        Size and cost.
    """

    genes: np.ndarray
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
        """Names of the selected genes, best first."""
        return [str(g) for g in self.genes[self.order]]

    def to_frame(self) -> pd.DataFrame:
        """Return the columns as a DataFrame indexed by gene, in the file's order."""
        import pandas as pd

        return pd.DataFrame(self.columns, index=pd.Index(self.genes.astype(str)))

    def to_json(self) -> dict[str, Any]:
        """Return what ``hvg_scores.json`` holds."""
        per_gene = {"gene": self.genes.astype(str)} | self.columns
        return {"genes": per_gene, "settings": self.settings, "source": self.source, "versions": self.versions}

    def write(self, fpath: str | os.PathLike, *, force: bool = False) -> tuple[Path, Path]:
        """Write the gene list and, beside it, ``hvg_scores.json``, both or none; return both paths.

        Scores of another list that are there already are kept, as ``hvg_scores.<that list>.json``.
        """
        from vcelltools.io.atomic import staged, write_json, write_text

        out = Path(fpath)
        scores = out.with_name(SCORES)
        with staged([scores, out], force=force, over=[scores]) as there:
            write_text(there / out.name, "".join(f"{g}\n" for g in self.selected))
            write_json(there / scores.name, self.to_json() | {"list": out.name}, indent=None)
            _keep_other_scores(scores, out.name)
        return out, scores


def _keep_other_scores(scores: Path, mine: str) -> None:
    """Rename the scores of another list out of the way; they name their list at their end."""
    if not scores.exists():
        return
    with open(scores, "rb") as f:
        f.seek(max(0, scores.stat().st_size - 4096))
        tail = f.read().decode("utf-8", "replace")
    found = re.search(r'"list": "([^"/\\]+)"\}\s*$', tail)
    other = Path(found.group(1)).stem if found else "earlier"
    if not found or found.group(1) != mine:
        os.replace(scores, scores.with_name(f"hvg_scores.{other}.json"))


def compute_hvg(
    sources: str | os.PathLike | AnnData | Sequence[str | os.PathLike],
    *,
    top: int = 2000,
    flavor: str = "seurat_v3",
    batch_key: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    span: float = 0.3,
    min_share: float = 0.01,
    theta: float = 100.0,
    stats_dpath: str | os.PathLike | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    max_values: int | None = None,
    dask: str | None = None,
) -> HvgResult:
    """Rank the genes of one or more data sets by how much they vary.

    Parameters
    ----------
    sources
        A file (any that :func:`vcelltools.io.open_dataset` opens), a folder of saved statistics, an AnnData, or
        a list of files, which are then merged on the genes that they share, each file a batch of its own.
    top
        How many genes to select.
    flavor
        One of ``FLAVORS``; see ``docs/hvg.md``.
    batch_key
        obs column: rank within each batch, then combine as scanpy does.
    span
        Loess span of seurat_v3 and seurat_v3_paper.
    min_share
        dispersion alone: genes expressed in a smaller share of the cells are not selected.
    theta
        pearson_residuals alone: inverse dispersion of the negative binomial.
    stats_dpath
        Folder of the statistics: reused where they fit the file, written where there are none.
    threads, max_values
        Worker threads, and values read at once by each; the result depends on neither.
    dask
        ``local``, or the address of a Dask scheduler whose workers see the file: they count ranges of cells.

    Raises
    ------
    UsageError
        For an unknown flavour or a ``top`` below 1.
    DataError
        When a file is damaged, lacks what was asked for, or does not hold counts.
    """
    began = time.monotonic()
    if flavor not in FLAVORS:
        raise UsageError(f"flavor {flavor!r} is not known", hint=f"one of: {', '.join(FLAVORS)}")
    if top < 1:
        raise UsageError(f"top is {top}; at least 1 expected")
    many = list(sources) if isinstance(sources, list | tuple) else [sources]
    if not many:
        raise UsageError("no file was given")
    paths = [os.path.realpath(s) for s in many if isinstance(s, str | os.PathLike)]
    if len(set(paths)) < len(paths):
        twice = next(p for p in paths if paths.count(p) > 1)
        raise UsageError(f"{os.path.relpath(twice)} is given twice", hint="name every file once")
    if len(many) > 1 and flavor in NEEDS_VALUES:
        raise UsageError(
            f"flavor {flavor} ranks one file at a time",
            hint=f"{', '.join(f for f in FLAVORS if f not in NEEDS_VALUES)} merge several",
        )
    if len(many) > 1 and stats_dpath is not None:
        raise UsageError("--stats keeps the statistics of one file", hint="run hvg --stats once per file, then merge")
    notes: list[str] = []
    warnings: list[str] = []
    parts = []
    for source in many:
        stats, said = _get_statistics(
            source,
            batch_key,
            modality,
            layer,
            stats_dpath,
            threads=threads,
            progress=progress,
            max_values=max_values,
            dask=dask,
        )
        parts.append(stats)
        notes += said
    merged = parts[0] if len(parts) == 1 else _merge_files(parts, [_label(s) for s in many], warnings)
    for p, source in zip(parts, many, strict=True):
        of = f"{_label(source)}: " if len(many) > 1 else ""
        warnings += [of + w for w in p.warnings]
        notes += [of + n for n in p.notes]
    if top > merged.n_genes:
        warnings.append(f"top {top:,} exceeds the {merged.n_genes:,} genes there are: all are selected")
    with_batches = batch_key is not None or len(parts) > 1
    columns, order, said = _rank(
        merged,
        flavor,
        top,
        span=span,
        min_share=min_share,
        theta=theta,
        opener=lambda: open_dataset(many[0], modality=modality, layer=layer),
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
        "modality": modality,
        "layer": layer or "X",
    }
    settings |= {"seurat_v3": {"span": span}, "seurat_v3_paper": {"span": span}}.get(flavor, {})
    settings |= {"dispersion": {"min_share": min_share}, "pearson_residuals": {"theta": theta}}.get(flavor, {})
    return HvgResult(
        genes=merged.genes,
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


def hvg(
    source: str | os.PathLike | AnnData | Sequence[str | os.PathLike], *, top: int = 2000, **options: Any
) -> pd.DataFrame:
    """Rank genes and return scanpy's columns, one row a gene, in the file's order.

    Takes the options of :func:`compute_hvg`. ``frame.attrs["genes"]`` is the ranked list of the selected genes;
    ``attrs`` also holds settings, sources, versions and warnings.

    Examples
    --------
    >>> import vcelltools as vc
    >>> frame = vc.hvg("atlas.h5mu", top=2000)  # doctest: +SKIP
    >>> frame.attrs["genes"][:5]  # doctest: +SKIP
    """
    result = compute_hvg(source, top=top, **options)
    frame = result.to_frame()
    frame.attrs = {
        "genes": result.selected,
        "settings": result.settings,
        "source": result.source,
        "versions": result.versions,
        "warnings": list(result.warnings),
    }
    return frame


def get_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import importlib.metadata as m

    names = ("numpy", "numba", "h5py", "scikit-misc")
    return {"vcelltools": m.version("vcelltools")} | {n: m.version(n) for n in names}


def _label(source: Any) -> str:
    return Path(source).name if isinstance(source, str | os.PathLike) else "AnnData"


def _get_statistics(
    source: Any,
    batch_key: str | None,
    modality: str | None,
    layer: str | None,
    stats_dpath: str | os.PathLike | None,
    *,
    threads: int | None,
    progress: Progress,
    max_values: int | None,
    dask: str | None = None,
) -> tuple[Statistics, list[str]]:
    """Return the statistics of one source, saved ones where they fit, and notes."""
    if isinstance(source, str | os.PathLike) and (Path(source) / "manifest.json").is_file():
        return load_statistics(source), [f"{source}: saved statistics were used"]
    from vcelltools.io.atomic import check_output
    from vcelltools.io.counts import require_counts
    from vcelltools.pipelines.statistics import describe_source

    with open_dataset(source, modality=modality, layer=layer) as ds:
        notes = list(ds.notes)
        if stats_dpath is not None and (Path(stats_dpath) / "manifest.json").is_file():
            saved = load_statistics(stats_dpath)
            now = describe_source(ds) | {"batch_key": batch_key}
            if saved.source == now:
                return saved, [*notes, f"{stats_dpath}: saved statistics were used"]
            differs = next(k for k in {**saved.source, **now} if saved.source.get(k) != now.get(k))
            raise UsageError(
                f"{stats_dpath} holds the statistics of something else: {differs} was "
                f"{saved.source.get(differs)!r} and is {now.get(differs)!r}",
                hint="give another folder, or delete this one",
            )
        if stats_dpath is not None:
            check_output(Path(stats_dpath) / "manifest.json", force=False)
        require_counts(ds)
        if dask is not None:
            from vcelltools.pipelines.cluster import open_cluster, scan_on_cluster

            with open_cluster(dask) as client:
                stats = scan_on_cluster(
                    source, client, batch_key=batch_key, modality=ds.modality, layer=layer, progress=progress
                )
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
        if stats_dpath is not None:
            save_statistics(stats, stats_dpath)
        return stats, notes


def _merge_files(parts: list[Statistics], names: list[str], notes: list[str]) -> Statistics:
    """Put the batches of several files behind each other, on the genes that all of them have."""
    for p, name in zip(parts, names, strict=True):
        if len(set(p.genes.tolist())) != p.n_genes:
            raise DataError(f"{name}: gene names occur more than once, so files cannot be matched by name")
    common = set(parts[0].genes.tolist()).intersection(*(p.genes.tolist() for p in parts[1:]))
    if not common:
        raise DataError(
            f"{' and '.join(names)} share no gene names",
            hint="one file may use symbols and another Ensembl ids; vcelltools basis reconciles them",
        )
    genes = np.array([g for g in parts[0].genes.tolist() if g in common], dtype=object)
    picked = []
    for p, name in zip(parts, names, strict=True):
        at = {g: i for i, g in enumerate(p.genes.tolist())}
        picked.append(p.histograms.select_genes(np.array([at[g] for g in genes], np.int64)))
        if p.n_genes != len(genes):
            notes.append(
                f"{name}: {p.n_genes - len(genes):,} of {p.n_genes:,} genes are not in every file and are left out"
            )
    labels = [f"{name}:{b}" if b else name for p, name in zip(parts, names, strict=True) for b in p.batches]
    shift = np.cumsum([0] + [len(p.batches) for p in parts[:-1]])
    return Statistics(
        genes=genes,
        batches=labels,
        histograms=stack_batches(picked),
        library_size=np.concatenate([p.library_size for p in parts]),
        genes_per_cell=np.concatenate([p.genes_per_cell for p in parts]),
        batch_n=np.concatenate([p.batch_n + s for p, s in zip(parts, shift, strict=True)]),
        bytes_read=sum(p.bytes_read for p in parts),
    )


def _mean_variance(h: Histograms, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, variance with ddof 1) of batch ``k``, with scanpy's order of operations on exact sums."""
    n = float(h.n_cells_k[k])
    s1, s2 = h.moments(k)
    mean = s1 / n
    variance = s2 / n - mean * mean
    if n != 1:
        variance *= n / (n - 1)
    return mean, variance


def _rank(
    stats: Statistics, flavor: str, top: int, *, span: float, min_share: float, theta: float, opener, threads, progress
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Return (columns, positions of the selected genes best first, notes)."""
    pooled = stats.histograms.pooled()
    mean, variance = _mean_variance(pooled, 0)
    columns: dict[str, np.ndarray] = {"means": mean, "variances": variance}
    notes: list[str] = []
    if flavor in ("seurat_v3", "seurat_v3_paper"):
        more, order = _rank_seurat_v3(stats, flavor, top, span, notes)
    elif flavor == "dispersion":
        more, order = _rank_dispersion(stats, mean, variance, top, min_share, notes)
    else:
        from vcelltools.pipelines import hvg_values

        with opener() as ds:
            more, order = hvg_values.rank(
                ds, stats, flavor, top, theta=theta, threads=threads, progress=progress, notes=notes
            )
    columns |= more
    columns["n_cells"] = pooled.expressing(0)
    chosen = np.zeros(stats.n_genes, bool)
    chosen[order] = True
    columns["highly_variable"] = chosen
    return columns, order, notes


def sort_genes(names: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Return positions sorted by ``keys`` ascending (NaN last), ties by gene name, then by position.

    The name is what makes the order independent of the order of genes in the file, of chunks and of threads.
    """
    by_name = np.argsort(names.astype(str), kind="stable")
    name_rank = np.empty(len(names), np.int64)
    name_rank[by_name] = np.arange(len(names))
    if len(names) and len(set(names.tolist())) != len(names):
        sorted_names = names[by_name]
        same = np.r_[False, sorted_names[1:] == sorted_names[:-1]]
        name_rank[by_name] = np.cumsum(~same)
    return np.lexsort((name_rank, *reversed(keys)))


def combine_ranks(
    names: np.ndarray, score_kg: np.ndarray, top: int, flavor: str, tie_kg: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rank genes in each batch by descending score and combine the batches as scanpy does.

    Ranks from ``top`` on are missing; a gene's rank is the median over the batches that have one.
    ``seurat_v3`` sorts by (median rank, number of batches descending), every other flavour by (number of batches
    descending, median rank); ties by mean score descending, then by name.
    """
    n_batches, g = score_kg.shape
    ranks = np.full((n_batches, g), np.nan, np.float32)
    for k in range(n_batches):
        order = sort_genes(names, -score_kg[k])[:top]
        ranks[k, order] = np.arange(len(order), dtype=np.float32)
    n_in = np.sum(~np.isnan(ranks), axis=0)
    median = np.full(g, np.nan)
    some = n_in > 0
    median[some] = np.nanmedian(ranks[:, some], axis=0)
    score = score_kg.mean(axis=0)
    first, second = (median, -n_in) if flavor == "seurat_v3" else (-n_in, median)
    order = sort_genes(names, first, second, -score)
    columns = {"highly_variable_rank": median, "highly_variable_nbatches": n_in.astype(np.int64)}
    return columns, order[:top]


def _rank_seurat_v3(
    stats: Statistics, flavor: str, top: int, span: float, notes: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Normalised variance after clipping (Stuart et al., Cell 2019), in scanpy 1.11.5's order of operations."""
    h = stats.histograms
    norm_kg = np.zeros((h.n_batches, h.n_genes))
    for k in range(h.n_batches):
        norm_kg[k], reason = _get_normalised_variance(h, k, span)
        if reason:
            where = f"batch {stats.batches[k]!r} ({h.n_cells_k[k]:,} cells): " if stats.batches[k] else ""
            notes.append(f"{where}{reason}; a quadratic trend was used instead of loess")
        if h.n_cells_k[k] < 2:
            notes.append(f"batch {stats.batches[k]!r} has one cell: no variance, its genes all rank by name")
    columns, order = combine_ranks(stats.genes, norm_kg, top, flavor)
    columns["variances_norm"] = norm_kg.mean(axis=0)
    return columns, order


def _get_normalised_variance(h: Histograms, k: int, span: float) -> tuple[np.ndarray, str | None]:
    n = float(h.n_cells_k[k])
    if n < 2:
        return np.zeros(h.n_genes), None
    mean, variance = _mean_variance(h, k)
    varies = variance > 0
    log_variance = np.zeros(h.n_genes)
    log_variance[varies], reason = fit_trend(mean[varies], variance[varies], span=span)
    reg_std = np.sqrt(10**log_variance)
    clip = reg_std * np.sqrt(n) + mean
    s1, s2 = h.clipped_moments(k, clip)
    norm = (1 / ((n - 1) * np.square(reg_std))) * ((n * np.square(mean)) + s2 - 2 * s1 * mean)
    return norm, reason


def _rank_dispersion(
    stats: Statistics, mean: np.ndarray, variance: np.ndarray, top: int, min_share: float, notes: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Variance / mean of the counts (ddof 1) among genes expressed in at least ``min_share`` of the cells."""
    h = stats.histograms
    score = np.full((h.n_batches, h.n_genes), -np.inf)
    for k in range(h.n_batches):
        m, v = _mean_variance(h, k)
        ok = (h.expressing(k) >= min_share * float(h.n_cells_k[k])) & (m > 0)
        score[k, ok] = v[ok] / m[ok]
    eligible = np.isfinite(score).any(axis=0)
    if int(eligible.sum()) < top:
        notes.append(
            f"{int(eligible.sum()):,} genes are expressed in at least {min_share:.2%} of the cells; all are selected"
        )
    dispersions = np.divide(variance, mean, out=np.zeros_like(mean), where=mean > 0)
    columns, order = combine_ranks(stats.genes, score, top, "dispersion")
    return columns | {"dispersions": dispersions}, order[eligible[order]]
