"""Describe a file: its matrices and whether they hold counts, the roles of its columns, genes and problems."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import VcellError, checked
from vcelltools.genes.identity import ID_COLUMNS, find_doubts
from vcelltools.io import CountEvidence, CsrMatrix, Dataset, get_count_evidence, open_dataset
from vcelltools.io.columns import SelectedCsrMatrix
from vcelltools.io.dataset import list_choices
from vcelltools.io.table import Column, Table, decode, tidy_levels

if TYPE_CHECKING:
    from anndata import AnnData

N_EXAMPLES = 5
_STEP = 1 << 20  # number of cells whose names or labels are held at once
_MAX_LABELS = 1 << 18  # number of labels beyond which a column holds names
_MAX_COLUMNS = 5_000  # maximum number of columns to describe in a table
_ENSEMBL = re.compile(r"^ENS[A-Z]{0,4}G\d{11}(\.\d+)?(_\w+)?$")
_CONTROL = re.compile(
    r"^(non[-_ ]?target(ing|ed)?|nt|ntc|neg(ative)?[-_ ]?(ctrl|control)s?|controls?|ctrl"
    r"|safe[-_ ]?(targeting|harbou?r)?"
    r"|scrambled?|mock|unperturbed|untreated|vehicle|dmso(_tf)?|wild[-_ ]?type|wt|lacz|aavs1|intergenic|pbs)"
    r"([-_ ]?(\d+|gene|guide|sgrna|ctrl|control)s?)*$",
    re.IGNORECASE,
)
_GUIDES = re.compile(r"guide|crispr|grna|perturb", re.IGNORECASE)
_NAMES = {
    "perturbation": (
        "feature_call", "perturbation", "perturbations", "target_gene", "gene_target", "target", "targets",
        "perturbed_gene", "guide_identity", "guide_id", "guide", "guides", "sgrna", "grna", "grna_id", "condition",
        "treatment", "drug", "crispr", "gene", "perturbation_name", "guide_target", "gene_id_target", "confident_guide",
    ),
    "batch": (
        "batch", "batch_id", "batch_var", "lane", "bio_rep", "replicate", "rep", "library", "library_id", "gem_group",
        "channel", "plate", "sample", "sample_id", "donor", "run", "experiment", "srx_accession", "pool",
    ),
    "cell_line": ("cell_line", "cellline", "cell_line_id", "line", "cell_type", "celltype", "cell_name"),
    "n_guides": ("num_features", "n_guides", "num_guides", "n_features_guide", "guide_count", "n_guide", "nperts"),
}  # fmt: skip
# columns that are not perturbations although their labels look like genes or controls ("normal", "CD4")
_NO_PERTURBATION = {
    "cell_types", "celltypes", "cluster", "clusters", "leiden", "louvain", "seurat_clusters", "annotation", "tissue",
    "cell_ontology_class", "cell_class", "cell_subtype", "organ", "donor", "donor_id", "disease", "sex", "phase",
    "assay", "organism", "species", "development_stage", "ethnicity",
}  # fmt: skip
_GENE_NAMES = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "name", "feature_name")


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """One matrix of the file; ``counts`` and the sizes are None if it cannot be read, as ``problem`` explains."""

    modality: str | None
    layer: str
    layout: str | None = None
    shape: tuple[int, int] | None = None
    dtype: str | None = None
    index_dtype: str | None = None
    nnz: int | None = None
    compression: tuple[str, ...] = ()
    stored_bytes: int | None = None
    counts: CountEvidence | None = None
    problem: str | None = None

    @property
    def is_counts(self) -> bool:
        """Whether it looks like counts."""
        return self.counts is not None and self.counts.is_counts

    @property
    def options(self) -> str:
        """The command-line options that open it."""
        parts = [f"--modality {shlex.quote(self.modality)}"] if self.modality is not None else []
        return " ".join([*parts, *([] if self.layer == "X" else [f"--layer {shlex.quote(self.layer)}"])])


@dataclass(frozen=True, kw_only=True)
class ColumnReport:
    """One column of obs or var.

    Attributes
    ----------
    roles
        Possible roles of the column: ``perturbation``, ``batch``, ``cell_line``, ``n_guides``; ``gene_id`` (Ensembl) or
        ``gene_name`` in var.
    examples
        The most frequent labels and their numbers of cells.
    controls
        Labels that look like controls, and their numbers of cells.
    """

    name: str
    kind: str
    n_labels: int | None
    n_missing: int
    examples: tuple[tuple[str, int], ...] = ()
    controls: tuple[tuple[str, int], ...] = ()
    roles: tuple[str, ...] = ()
    score: int = 0


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """The result of :func:`inspect`.

    Attributes
    ----------
    opened
        The (modality, layer) whose obs and var are described: the one that holds counts, if any.
    index_kind
        The kind of gene names: ``ensembl`` or ``symbols``.
    problems
        All problems, one line each.
    notes
        Decisions of the reader.
    """

    path: str
    kind: str | None
    size_bytes: int | None
    opened: tuple[str | None, str] | None
    n_cells: int | None
    n_genes: int | None
    index_kind: str | None
    matrices: tuple[MatrixReport, ...]
    obs: tuple[ColumnReport, ...]
    var: tuple[ColumnReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def get_columns(self, role: str) -> list[ColumnReport]:
        """Return the candidate columns for a role, most likely first."""
        found = [c for c in (*self.obs, *self.var) if role in c.roles]
        return sorted(found, key=lambda c: -c.score)

    def get_column(self, role: str) -> ColumnReport | None:
        """Return the most likely column for a role."""
        return next(iter(self.get_columns(role)), None)

    @property
    def guide_modalities(self) -> list[str]:
        """Modalities that may hold the guides, if no obs column looks like the perturbation."""
        labelled = any("perturbation" in c.roles for c in self.obs)
        names = dict.fromkeys(m.modality for m in self.matrices if m.modality is not None)
        return [] if labelled else [m for m in names if _GUIDES.search(m)]

    @property
    def control(self) -> list[str]:
        """Control labels of the most likely perturbation column."""
        column = self.get_column("perturbation")
        return [label for label, _ in column.controls] if column else []

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        roles = {r: [c.name for c in self.get_columns(r)] for r in (*_NAMES, "gene_id", "gene_name")}
        matrices = []
        for m in self.matrices:
            body = asdict(m)
            body["counts"] = m.counts.to_json() if m.counts else None
            matrices.append({**body, "is_counts": m.is_counts, "options": m.options})
        body = {k: v for k, v in asdict(self).items() if k not in ("matrices", "opened")}
        opened = None if self.opened is None else {"modality": self.opened[0], "layer": self.opened[1]}
        return {"ok": self.ok, **body, "opened": opened, "matrices": matrices, **roles, "control": self.control}


@checked
def inspect(
    source: str | os.PathLike | AnnData,
    *,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
) -> InspectReport:
    """Describe a data set without reading all of it: matrices, roles of columns, genes and all problems.

    Parameters
    ----------
    source
        A path of any supported kind, or an AnnData.
    modality, layer, feature_type, genome
        The matrix whose obs and var to describe; by default, that of the counts.

    Raises
    ------
    DataError
        If the file cannot be opened, or lacks the requested modality or layer.

    Examples
    --------
    >>> import vcelltools as vc
    >>> report = vc.inspect("atlas.h5ad")
    >>> report.n_cells, [m.layer for m in report.matrices if m.is_counts]
    (200, ['X'])
    """
    problems: list[str] = []
    choices = list_choices(source)
    matrices = tuple(_inspect_matrix(source, m, k, problems) for m, k in choices)
    if not matrices:
        problems.append("the file holds no matrix (X, layers or raw)")
    part = {"modality": modality, "layer": layer, "feature_type": feature_type, "genome": genome}
    chosen = _choose(source, matrices, part, problems)
    is_path = isinstance(source, str | os.PathLike)
    common: dict[str, Any] = {
        "path": str(source) if is_path else "AnnData",
        "size_bytes": _get_size(Path(source)) if is_path else None,
        "matrices": matrices,
    }
    if chosen is None:
        return InspectReport(
            **common, kind=None, opened=None, n_cells=None, n_genes=None, index_kind=None, obs=(), var=(),
            problems=tuple(problems),
        )  # fmt: skip
    with chosen as ds:
        names = ds.var.index if _check_names(ds.var, "genes", problems) else None
        _check_names(ds.obs, "cells", problems)
        _count_empty(ds)
        problems += find_doubts(ds.var, ds.obs) if names is not None else []
        genes = _get_gene_names(ds.var, names)
        obs = tuple(_inspect_columns(ds.obs, genes, problems, ds.notes))
        var = tuple(_inspect_columns(ds.var, None, problems, ds.notes))
        if not any(m.is_counts for m in matrices):
            problems.append("no matrix looks like counts")
        if not any("perturbation" in c.roles for c in obs):
            guides = [m for m in dict.fromkeys(m.modality for m in matrices) if m and _GUIDES.search(m)]
            ds.notes += [
                f"no obs column looks like the perturbation; modality {m!r} may hold the guides" for m in guides
            ]
        return InspectReport(
            **common, kind=ds.kind, opened=(ds.modality, ds.layer), n_cells=ds.n_cells, n_genes=ds.n_genes,
            index_kind=None if names is None else _get_name_kind(names), obs=obs, var=var,
            problems=tuple(dict.fromkeys(problems)), notes=tuple(ds.notes),
        )  # fmt: skip


def inspect_table(ds: Dataset) -> list[ColumnReport]:
    """Return the description of every obs column of an open data set; columns that cannot be read are left out."""
    return _inspect_columns(ds.obs, _get_gene_names(ds.var, ds.var.index), [], [])


def _get_gene_names(var: Table, index: np.ndarray | None) -> set[str]:
    """Return the names by which perturbation labels may refer to genes: names, symbols and ids."""
    out = set() if index is None else set(index.tolist())
    for name in var.columns:
        if name.lower() in _GENE_NAMES or name in ID_COLUMNS:
            try:
                out.update(var.column(name).labels().tolist())
            except VcellError:  # reported with the description of the columns
                continue
    return out


def _get_size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    return path.stat().st_size


def _inspect_matrix(source: Any, modality: str | None, layer: str, problems: list[str]) -> MatrixReport:
    try:
        with open_dataset(source, modality=modality, layer=layer) as ds:
            m = ds.matrix
            known: dict[str, Any] = {
                "layout": m.layout,
                "shape": m.shape,
                "dtype": str(m.dtype),
                "index_dtype": None if m.index_dtype is None else str(m.index_dtype),
                "nnz": None if isinstance(m, SelectedCsrMatrix) else m.nnz,  # the obs of the whole file
                "compression": m.filters,
                "stored_bytes": m.stored_bytes,
            }
            try:
                return MatrixReport(modality=modality, layer=layer, **known, counts=get_count_evidence(m))
            except VcellError as e:
                problems.append(str(e))
                return MatrixReport(modality=modality, layer=layer, **known, problem=e.message)
    except VcellError as e:
        problems.append(str(e))
        return MatrixReport(modality=modality, layer=layer, problem=e.message)


def _choose(
    source: Any, matrices: tuple[MatrixReport, ...], part: dict[str, str | None], problems: list[str]
) -> Dataset | None:
    """Open the matrix whose tables are described."""
    if any(part.values()):
        return open_dataset(source, **part)
    try:
        ds = open_dataset(source)
    except VcellError as e:
        problems.append(str(e))
    else:
        if any(m.is_counts and (m.modality, m.layer) == (ds.modality, ds.layer) for m in matrices):
            return ds
        ds.close()
    good = sorted((m for m in matrices if m.shape is not None), key=lambda m: (not m.is_counts, -m.shape[1]))  # type: ignore[index]
    for m in good:
        try:
            return open_dataset(source, modality=m.modality, layer=m.layer)
        except VcellError as e:  # pragma: no cover  it opened a moment ago
            problems.append(str(e))
    return None


def _check_names(table: Table, what: str, problems: list[str]) -> bool:
    """Add the problems of row names, reading one range at a time; return whether they can be read."""
    hashes = np.empty(table.n, np.int64)  # for a million cells, the probability of a hash collision is 1e-7
    nameless, odd = 0, ""
    try:
        for a in range(0, table.n, _STEP):
            names = table.names(a, min(a + _STEP, table.n)).tolist()
            hashes[a : a + len(names)] = [hash(n) for n in names]
            nameless += sum(n is None or n == "" for n in names)
            odd = odd or next((n for n in names if n and (n != n.strip() or not n.isprintable())), "")
        table.forget()
        hashes.sort()
        first = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
        if len(first) < table.n:
            n_each = np.diff([*first.tolist(), table.n])
            most = int(hashes[first[int(n_each.argmax())]])
            ranges = ((a, min(a + _STEP, table.n)) for a in range(0, table.n, _STEP))
            name = next(n for a, b in ranges for n in table.names(a, b) if hash(n) == most)
            more = f"{table.n - len(first):,} of {table.n:,} names of {what} are duplicates"
            problems.append(f"{more} ({name!r} {int(n_each.max()):,} times)")
    except VcellError as e:
        problems.append(str(e))
        return False
    if nameless:
        problems.append(f"some {what} have no name")
    if odd:
        problems.append(f"names of {what} have surrounding spaces or non-printing characters, such as {odd!r}")
    return True


def _count_empty(ds: Dataset) -> None:
    """Add a problem for cells (or genes) without stored values, if the index pointer shows them."""
    m = ds.matrix
    if m.layout == "dense":
        return
    empty = int(np.count_nonzero(np.diff(m.indptr) == 0))  # type: ignore[union-attr]
    if empty:
        what = "cells" if isinstance(m, CsrMatrix) else "genes"
        ds.notes.append(f"{empty:,} {what} have no counts at all")


def _inspect_columns(table: Table, genes: set[str] | None, problems: list[str], notes: list[str]) -> list[ColumnReport]:
    """Describe every column; ``genes`` are the gene names for obs, None for var."""
    out = []
    columns = table.columns
    if len(columns) > _MAX_COLUMNS:
        notes.append(f"{table.where} has {len(columns):,} columns; only the first {_MAX_COLUMNS:,} are described")
    for name in columns[:_MAX_COLUMNS]:
        try:
            if genes is None:
                out.append(_judge_var(table.column(name)))
                continue
            census = _take_census(table, name)
            out.append(_judge_obs(census, genes))
            if out[-1].roles and census.counts and census.kind != "number":
                tidy_levels(name, np.empty(0, np.int32), sorted(census.counts), notes)  # for its notes alone
        except VcellError as e:
            problems.append(str(e))
    return out


@dataclass(kw_only=True)
class _Census:
    """The labels of an obs column, collected from consecutive ranges of rows.

    Attributes
    ----------
    counts
        Label -> number of cells; None for fractional numbers, and if there are too many labels to keep.
    n_labels
        Number of labels; None for fractional numbers.
    """

    name: str
    kind: str
    n: int
    n_missing: int = 0
    counts: Counter[str] | None = None
    n_labels: int | None = None


def _take_census(table: Table, name: str) -> _Census:
    out = _Census(name=name, kind=table.read(name, 0, 0).kind, n=table.n)
    counts: Counter[str] = Counter()
    hashes: list[np.ndarray] = []
    for _, column in table.ranges(name, _STEP):
        missing = column.get_missing()
        out.n_missing += int(missing.sum())
        if column.codes is not None:
            assert column.categories is not None
            n_each = np.bincount(column.codes[~missing], minlength=len(column.categories))
            part = Counter({_text(c): k for c, k in zip(column.categories, n_each.tolist(), strict=True) if k})
        else:
            assert column.values is not None
            values = column.values[~missing]
            if values.dtype.kind == "f":
                continue
            if values.dtype == object:
                part = Counter(values.tolist())
            else:
                levels, n_each = np.unique(values, return_counts=True)
                part = Counter({str(v): int(k) for v, k in zip(levels, n_each, strict=True)})
        out.n_missing += part.pop("", 0)
        if hashes or len(counts) + len(part) > _MAX_LABELS:  # names rather than labels, so only their number is kept
            hashes.append(np.unique([hash(v) for v in (*counts, *part)]))
            counts.clear()
        else:
            counts.update(part)
    if hashes:
        out.n_labels = len(np.unique(np.concatenate(hashes)))
    elif not (out.kind == "number" and not counts):
        out.counts, out.n_labels = counts, len(counts)
    return out


def _text(category: Any) -> str:
    return decode(category) if isinstance(category, bytes) else str(category)


def _judge_obs(census: _Census, genes: set[str]) -> ColumnReport:
    """Assign roles to an obs column, by its name and its labels."""
    counts, n, name = census.counts, census.n, census.name
    if counts is None:
        return ColumnReport(name=name, kind=census.kind, n_labels=census.n_labels, n_missing=census.n_missing)
    lower = name.lower()
    is_text = census.kind in ("categorical", "string")
    labels = [*counts] if is_text else []
    controls = [(v, counts[v]) for v in labels if _CONTROL.match(v)] if len(labels) < 1_000_000 else []
    by_name = {role: lower in names or lower.split(":")[-1] in names for role, names in _NAMES.items()}
    roles, score = [], 0
    if is_text and 1 < len(labels) < max(0.5 * n, 3):
        parts = {p for v in labels for p in re.split(r"[|+;,_]", v)} if len(labels) < 200_000 else set()
        targets = sum(v in genes or v.split("_")[0] in genes or v.split("-")[0] in genes for v in labels)
        share = targets / len(labels) if labels else 0.0
        excluded = lower in _NO_PERTURBATION or by_name["cell_line"]
        score = 2 * by_name["perturbation"] + 3 * bool(controls) + 3 * (share > 0.3 and len(parts) > 1)
        if not excluded and (score >= 3 or (by_name["perturbation"] and len(labels) > 3)):
            roles.append("perturbation")
            score += share > 0.8
    if not roles:
        if by_name["batch"] and 1 <= len(counts) <= max(n // 10, 2):
            roles.append("batch")
        if by_name["cell_line"] and len(counts) <= max(n // 10, 2):
            roles.append("cell_line")
        if by_name["n_guides"] and not is_text:
            roles.append("n_guides")
        for role in roles:
            score = max(score, len(_NAMES[role]) - _NAMES[role].index(lower.split(":")[-1]))
    controls.sort(key=lambda c: -c[1])
    return ColumnReport(
        name=name,
        kind=census.kind,
        n_labels=len(counts),
        n_missing=census.n_missing,
        examples=tuple(counts.most_common(N_EXAMPLES)) if len(counts) < n or not is_text else (),
        controls=tuple(controls[:N_EXAMPLES]),
        roles=tuple(roles),
        score=int(score),
    )


def _judge_var(column: Column) -> ColumnReport:
    """Determine whether a column holds Ensembl ids or symbols."""
    labels = [v for v in column.labels().tolist() if v] if column.kind in ("string", "categorical") else []
    roles: tuple[str, ...] = ()
    if labels and _get_name_kind(np.array(labels, dtype=object)) == "ensembl":
        roles = ("gene_id",)
    elif labels and column.name.lower() in _GENE_NAMES:
        roles = ("gene_name",)
    return ColumnReport(
        name=column.name,
        kind=column.kind,
        n_labels=len(set(labels)) if labels else None,
        n_missing=0 if column.missing is None else int(column.missing.sum()),
        examples=tuple((v, 1) for v in dict.fromkeys(labels[:3])),
        roles=roles,
    )


def _get_name_kind(names: np.ndarray) -> str:
    """Return ``ensembl`` if most names are Ensembl gene ids, otherwise ``symbols``."""
    some = [n for n in names[:: max(1, len(names) // 2_000)].tolist() if n]
    return "ensembl" if some and sum(bool(_ENSEMBL.match(n)) for n in some) > 0.5 * len(some) else "symbols"
