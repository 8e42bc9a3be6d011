"""Choose the basis: the genes that all stores share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.config import BasisConfig, DatasetConfig
from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.genes.identity import Genes, is_ensembl, make_basis, read_genes, strip_version
from vcelltools.genes.table import read_aliases
from vcelltools.names import write_lines
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import one_blas_thread

_NEXT = 200  # number of genes below the cutoff that basis.json lists


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The ranked genes of one data set.

    Attributes
    ----------
    name
        The data set.
    genes
        Identity of every column.
    rank
        (n,) int64: 0 for the most variable column.
    weight
        Weight of the data set in the mean rank.
    targets
        Perturbation labels.
    source
        Path and settings, to record in basis.json.
    """

    name: str
    genes: Genes
    rank: np.ndarray
    weight: float = 1.0
    targets: tuple[str, ...] = ()
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class BasisGene:
    """The reason why a gene is in the basis, or is not.

    Attributes
    ----------
    label
        The line in ``basis.txt``: the symbol, or the id if several genes share the symbol.
    id, symbol
        Identity of the gene.
    ranks
        Data set -> rank (1 is best), or None if the data set lacks the gene.
    mean_rank
        Weighted mean; a missing gene counts as one past the last rank of the data set.
    n_hvg
        Number of data sets in which it is among the top genes.
    forced
        Whether the gene was requested.
    why
        The reason in words.
    """

    label: str
    id: str | None
    symbol: str | None
    ranks: Mapping[str, int | None]
    mean_rank: float
    n_hvg: int
    forced: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        out = {k: getattr(self, k) for k in ("label", "id", "symbol", "ranks", "mean_rank", "n_hvg", "forced", "why")}
        return out | {"datasets": [k for k, v in self.ranks.items() if v is not None]}


@dataclass(frozen=True, kw_only=True)
class BasisResult:
    """The basis and its derivation.

    Attributes
    ----------
    genes
        The chosen genes, best first.
    next
        The next genes below the cutoff.
    excluded
        Labels that a pattern excluded although their rank is high enough.
    settings, sources
        The settings, and the data sets.
    report
        The reconciliation of gene identities, one fact per line.
    warnings
        Messages for the user.
    """

    genes: tuple[BasisGene, ...]
    next: tuple[BasisGene, ...]
    excluded: tuple[str, ...]
    settings: Mapping[str, Any]
    sources: tuple[Mapping[str, Any], ...]
    report: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The lines of ``basis.txt``."""
        return [g.label for g in self.genes]

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``basis.json``."""
        from vcelltools.selection.hvg import get_versions

        return {
            "genes": [g.to_json() for g in self.genes],
            "next": [g.to_json() for g in self.next],
            "excluded": list(self.excluded),
            "settings": dict(self.settings),
            "sources": list(self.sources),
            "report": list(self.report),
            "sha256": make_basis(self.labels).sha256,
            "versions": get_versions(),
        }

    def write(self, fpath: str | os.PathLike, *, force: bool = False) -> tuple[Path, Path]:
        """Write ``basis.txt`` and ``basis.json`` beside it, both or neither; return both paths."""
        from vcelltools.io.write.atomic import put_beside, staged, write_json, write_text

        out = Path(fpath)
        beside = put_beside(out, ".json")
        with staged([beside, out], force=force) as there:
            write_json(there / beside.name, self.to_json())
            write_text(there / out.name, write_lines(self.labels))
        return out, beside


def rank_dataset(
    spec: DatasetConfig,
    base: Path = Path(),
    *,
    flavor: str = "seurat_v3",
    targets: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Ranking:
    """Rank the genes of one data set (a file, or a folder of saved statistics) by variability."""
    from vcelltools.io import open_dataset
    from vcelltools.selection.hvg import compute_hvg
    from vcelltools.stores.building.labels import read_labels

    path = base / spec.path
    part: dict[str, Any] = {
        "modality": spec.modality, "layer": spec.layer, "feature_type": spec.feature_type, "genome": spec.genome
    }  # fmt: skip
    result = compute_hvg(
        path,
        top=1 << 40,
        flavor=flavor,
        **part,
        stats_dpath=base / spec.stats if spec.stats else None,
        threads=threads,
        progress=progress,
    )
    labels: tuple[str, ...] = ()
    if (path / "manifest.json").is_file():  # saved statistics only have names
        names = result.genes.astype(object)
        ids = np.array([strip_version(x) if is_ensembl(x) else None for x in names], dtype=object)
        genes = Genes(ids=ids, names=names, id_source=None, name_source="statistics")
    else:
        with open_dataset(path, **part) as ds:
            genes = read_genes(ds.var, id_col=spec.gene_id_col, name_col=spec.gene_name_col)
            if targets:
                labels = tuple(read_labels(ds.obs, spec, where=ds.label).perturbations[1:])
    rank = np.full(len(result.genes), len(result.genes), np.int64)
    rank[result.order] = np.arange(len(result.order))
    return Ranking(
        name=spec.name,
        genes=genes,
        rank=rank,
        weight=spec.weight,
        targets=labels,
        source={
            "name": spec.name,
            "source": result.source,
            "settings": {k: v for k, v in result.settings.items() if k != "top"},  # all genes are ranked
        },
    )


@dataclass
class _Universe:
    """All genes of all data sets, each with one identity."""

    ids: list[str | None]
    symbols: list[str | None]
    rank: np.ndarray  # (datasets, genes), -1 where absent
    report: list[str]


def _unite(rankings: Sequence[Ranking], aliases: Mapping[str, str]) -> _Universe:
    """Assign common identities to the columns of all data sets: ids, and symbols if they match a single id."""
    ids_of: dict[str, set[str]] = {}
    for r in rankings:
        for gene_id, name in zip(r.genes.ids, r.genes.names, strict=True):
            if gene_id is not None and not is_ensembl(name):
                ids_of.setdefault(name, set()).add(gene_id)
    place: dict[str, int] = {}
    ids: list[str | None] = []
    symbols: list[str | None] = []
    report, columns = [], []
    for r in rankings:
        said = dict.fromkeys(("by id", "by symbol", "by alias", "ambiguous", "of its own"), 0)
        found: dict[int, int] = {}
        doubles = 0
        for j, (gene_id, name) in enumerate(zip(r.genes.ids, r.genes.names, strict=True)):
            key, how = _identify(gene_id, name, ids_of, aliases)
            said[how] += 1
            if key not in place:
                place[key] = len(ids)
                ids.append(key if is_ensembl(key) else None)
                symbols.append(None)
            k = place[key]
            if symbols[k] is None and not is_ensembl(name) and how != "by alias":
                symbols[k] = name
            doubles += k in found
            found[k] = min(int(r.rank[j]), found.get(k, int(r.rank[j])))
        columns.append(found)
        facts = ", ".join(f"{n:,} {how}" for how, n in said.items() if n)
        report.append(f"{r.name}: {len(r.rank):,} columns: {facts}" + (f"; {doubles:,} double" if doubles else ""))
    rank = np.full((len(rankings), len(ids)), -1, np.int64)
    for d, found in enumerate(columns):
        rank[d, list(found)] = list(found.values())
    shared = int((rank >= 0).all(axis=0).sum())
    report.append(f"{len(ids):,} genes in all, {shared:,} in every data set")
    return _Universe(ids, symbols, rank, report)


def _identify(gene_id, name: str, ids_of: Mapping[str, set[str]], aliases: Mapping[str, str]) -> tuple[str, str]:
    """Return (key, how) of one column; an ambiguous symbol stays a separate gene."""
    if gene_id is not None:
        return gene_id, "by id"
    for label, how in ((name, "by symbol"), (aliases.get(name), "by alias")):
        if label is None:
            continue
        if is_ensembl(label):
            return strip_version(label), how
        known = ids_of.get(label, ())
        if len(known) == 1:
            return next(iter(known)), how
        if len(known) > 1:
            return label, "ambiguous"
        if how == "by alias":
            return label, how
    return name, "of its own"


@one_blas_thread()
def choose_basis(
    rankings: Sequence[Ranking],
    *,
    top: int = 2000,
    rule: str = "mean-rank",
    force: Iterable[str] = (),
    force_targets: bool = False,
    exclude: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> BasisResult:
    """Choose the basis.

    Parameters
    ----------
    top
        Number of genes.
    rule
        ``mean-rank`` sorts by the weighted mean of the ranks. ``intersection`` takes genes among the top of all data
        sets first, then of most (by weight), and sorts equal ones by mean rank.
    force
        Symbols or ids to include regardless of rank; ``force_targets`` adds all perturbation targets.
    exclude
        Regular expressions; a gene whose symbol or id matches is excluded (unless forced).
    aliases
        Old symbol -> symbol or id.

    Raises
    ------
    UsageError
        If the rule is unknown, a pattern is invalid, or more genes are forced than the basis holds.
    DataError
        If a forced gene is in no data set.
    """
    if rule not in ("mean-rank", "intersection"):
        raise UsageError(f"rule {rule!r} is not known", hint="use mean-rank or intersection")
    if not rankings:
        raise UsageError("there is no data set to choose a basis from")
    patterns = _compile(exclude)
    u = _unite(rankings, aliases or {})
    n = np.array([len(r.rank) for r in rankings])
    weight = np.array([r.weight for r in rankings])
    weight = weight / weight.sum()
    absent = u.rank < 0
    rank1 = np.where(absent, n[:, None], u.rank) + 1
    mean_rank = weight @ rank1
    is_hvg = ~absent & (u.rank < top)
    share = weight @ is_hvg
    labels = _label(u)
    by_label = np.argsort(np.argsort(np.array(labels, dtype=object).astype(str)))
    keys = (by_label, mean_rank) if rule == "mean-rank" else (by_label, mean_rank, -share)
    order = np.lexsort(keys)
    forced, warnings = _find_forced(u, labels, rankings, force, force_targets, aliases or {})
    out = np.array(
        [any(p.search(x) for p in patterns for x in (u.symbols[k], u.ids[k]) if x) for k in range(len(labels))], bool
    )
    both = sorted(labels[k] for k in forced if out[k])
    if both:
        warnings.append(f"forced although a pattern excludes them: {', '.join(both[:10])}")
    if len(forced) > top:
        raise UsageError(f"{len(forced):,} genes are forced into a basis of {top:,}", hint=f"a larger {spell('top')}")
    free = [k for k in order.tolist() if k not in forced and not out[k]]
    chosen = set(free[: top - len(forced)]) | forced
    picked = [k for k in order.tolist() if k in chosen]
    if len(picked) < top:
        warnings.append(f"only {len(picked):,} genes are available of the {top:,} requested")

    def explain(k: int) -> BasisGene:
        ranks = {r.name: None if absent[d, k] else int(rank1[d, k]) for d, r in enumerate(rankings)}
        n_hvg = int(is_hvg[:, k].sum())
        parts = ", ".join(f"{name} {v if v is not None else 'absent'}" for name, v in ranks.items())
        why = f"mean rank {mean_rank[k]:,.1f} ({parts}); among the top {top:,} of {n_hvg} of {len(rankings)} data sets"
        return BasisGene(
            label=labels[k],
            id=u.ids[k],
            symbol=u.symbols[k],
            ranks=ranks,
            mean_rank=float(mean_rank[k]),
            n_hvg=n_hvg,
            forced=k in forced,
            why=f"forced; {why}" if k in forced else why,
        )

    first_out = order[: len(picked)].tolist()
    several = len(rankings) > 1  # one ranking has nothing to be combined with
    return BasisResult(
        genes=tuple(explain(k) for k in picked),
        next=tuple(explain(k) for k in [k for k in free if k not in chosen][:_NEXT]),
        excluded=tuple(labels[k] for k in first_out if out[k] and k not in forced),
        settings={
            "top": top,
            **({"rule": rule} if several else {}),
            "force": list(force),
            "force_targets": force_targets,
            "exclude": [p.pattern for p in patterns],
            **({"weights": {r.name: float(w) for r, w in zip(rankings, weight, strict=True)}} if several else {}),
        },
        sources=tuple(r.source or {"name": r.name} for r in rankings),
        report=tuple(u.report),
        warnings=tuple(warnings),
    )


def _compile(exclude: Iterable[str]) -> list[re.Pattern[str]]:
    out = []
    for text in exclude:
        try:
            out.append(re.compile(text))
        except re.error as e:
            raise UsageError(f"{text!r} is not a regular expression: {e}", hint="for example '^MT-'") from e
    return out


def _label(u: _Universe) -> list[str]:
    """Return a unique label of each gene: the symbol if no other gene has it, otherwise the id."""
    counts: dict[str, int] = {}
    for s in u.symbols:
        if s is not None:
            counts[s] = counts.get(s, 0) + 1
    return [
        s if s is not None and (counts[s] == 1 or i is None) else str(i) for s, i in zip(u.symbols, u.ids, strict=True)
    ]


def _find_forced(u: _Universe, labels, rankings, force, force_targets, aliases) -> tuple[set[int], list[str]]:
    by_name: dict[str, list[int]] = {}
    for k, (i, s) in enumerate(zip(u.ids, u.symbols, strict=True)):
        for x in {x for x in (i, s) if x is not None}:
            by_name.setdefault(x, []).append(k)
    out: set[int] = set()
    warnings = []
    for label in force:
        hits = by_name.get(strip_version(label)) or by_name.get(aliases.get(label, ""), [])
        if not hits:
            raise DataError(f"the forced gene {label!r} is in no data set", hint="check its spelling, or use its id")
        if len(hits) > 1:
            raise DataError(
                f"the forced gene {label!r} is ambiguous: {', '.join(labels[k] for k in hits)}", hint="use its id"
            )
        out.add(hits[0])
    if force_targets:
        missed = 0
        for t in sorted({t for r in rankings for t in r.targets}):
            hits = by_name.get(strip_version(t)) or by_name.get(aliases.get(t, ""), [])
            if len(hits) == 1:
                out.add(hits[0])
            else:
                missed += 1
        if missed:
            warnings.append(f"{missed:,} perturbation labels do not match a single gene and were not forced")
    return out, warnings


@checked
def basis(
    datasets: Sequence[DatasetConfig | str | os.PathLike],
    *,
    base: Path = Path(),
    config: BasisConfig | None = None,
    top: int | None = None,
    rule: str | None = None,
    force_genes: Iterable[str] | None = None,
    force_targets: bool | None = None,
    exclude: Iterable[str] | None = None,
    aliases: Mapping[str, str] | None = None,
    flavor: str = "seurat_v3",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> BasisResult:
    """Rank the genes of every data set and choose the basis.

    Parameters
    ----------
    datasets
        Descriptions of data sets, or paths of files or of saved statistics.
    base
        Folder to which the paths in the descriptions are relative.
    config
        Source of the arguments below that are None.
    top, rule, force_targets, exclude, aliases
        See :func:`choose_basis`.
    force_genes
        Symbols or ids to include regardless of rank.
    flavor
        Flavour that ranks the genes of each data set; see ``docs/hvg.md``.

    Raises
    ------
    UsageError
        If options are invalid, or two data sets have the same name.
    DataError
        If a file is damaged or does not hold counts, or a forced gene is missing or ambiguous.

    Examples
    --------
    >>> import vcelltools as vc
    >>> chosen = vc.basis(["atlas.h5ad"], top=30, exclude=["^MT-"])
    >>> len(chosen.labels)
    30
    """
    conf = config or BasisConfig()
    if aliases is None and conf.aliases:
        aliases = read_aliases(base / conf.aliases)
    forces_targets = conf.force_targets if force_targets is None else force_targets
    specs = [d if isinstance(d, DatasetConfig) else _name_file(Path(d)) for d in datasets]
    names = [s.name for s in specs]
    if len(set(names)) != len(names):
        raise UsageError(
            f"two data sets are named {next(n for n in names if names.count(n) > 1)!r}", hint="rename a file"
        )
    rankings = [
        rank_dataset(s, base, flavor=flavor, targets=forces_targets, threads=threads, progress=progress) for s in specs
    ]
    return choose_basis(
        rankings,
        top=conf.top if top is None else top,
        rule=conf.rule if rule is None else rule,
        force=conf.force if force_genes is None else force_genes,
        force_targets=forces_targets,
        exclude=conf.exclude if exclude is None else exclude,
        aliases=aliases,
    )


def _name_file(path: Path) -> DatasetConfig:
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", path.name.split(".")[0]) or "data"
    return DatasetConfig(name=name if name[0].isalnum() else f"d{name}", path=str(path.absolute()))
