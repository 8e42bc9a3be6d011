"""What is in a file: matrices and whether they hold counts, the columns that steer a screen, genes, problems."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import VcellError
from vcelltools.io import CountEvidence, CsrMatrix, Dataset, get_count_evidence, open_dataset
from vcelltools.io.columns import SelectedCsrMatrix
from vcelltools.io.dataset import list_choices
from vcelltools.io.table import Column, Table

if TYPE_CHECKING:
    from anndata import AnnData

N_EXAMPLES = 5
_ENSEMBL = re.compile(r"^ENS[A-Z]{0,4}G\d{11}(\.\d+)?(_\w+)?$")
_CONTROL = re.compile(
    r"^(non[-_ ]?target(ing|ed)?|nt|ntc|neg(ative)?[-_ ]?(ctrl|control)s?|controls?|ctrl"
    r"|safe[-_ ]?(targeting|harbou?r)?"
    r"|scrambled?|mock|unperturbed|untreated|vehicle|dmso(_tf)?|wild[-_ ]?type|wt|lacz|aavs1|intergenic|pbs)"
    r"([-_ ]?(\d+|gene|guide|sgrna|ctrl|control)s?)*$",
    re.IGNORECASE,
)
_GUIDES = re.compile(r"guide|crispr|grna|perturb|hto", re.IGNORECASE)
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
_GENE_NAMES = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "name", "feature_name")


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """One matrix of the file; ``counts`` and the sizes are None where it cannot be read (``problem`` says why)."""

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
        """The options that open it."""
        parts = [f"--modality {shlex.quote(self.modality)}"] if self.modality is not None else []
        return " ".join([*parts, *([] if self.layer == "X" else [f"--layer {shlex.quote(self.layer)}"])])


@dataclass(frozen=True, kw_only=True)
class ColumnReport:
    """One column of obs or var.

    Attributes
    ----------
    roles
        What the column may be: ``perturbation``, ``batch``, ``cell_line``, ``n_guides``; ``gene_id`` (Ensembl) or
        ``gene_name`` in var.
    examples
        The most frequent labels and their cells.
    controls
        Labels that look like controls, and their cells.
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
    """What :func:`inspect` found.

    Attributes
    ----------
    opened
        The (modality, layer) whose obs and var are described: the one that holds counts, where there is one.
    index_kind
        What the genes' own names are: ``ensembl`` or ``symbols``.
    problems
        All that is wrong, one line each.
    notes
        What the reader decided.
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
        """Whether nothing is wrong."""
        return not self.problems

    def get_columns(self, role: str) -> list[ColumnReport]:
        """Return the columns that may play a role, likeliest first."""
        found = [c for c in (*self.obs, *self.var) if role in c.roles]
        return sorted(found, key=lambda c: -c.score)

    def get_column(self, role: str) -> ColumnReport | None:
        """Return the likeliest column for a role."""
        return next(iter(self.get_columns(role)), None)

    @property
    def control(self) -> list[str]:
        """Control labels of the likeliest perturbation column."""
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


def inspect(
    source: str | os.PathLike | AnnData, *, modality: str | None = None, layer: str | None = None
) -> InspectReport:
    """Describe a data set without reading it whole: matrices, columns with a role, genes, all problems at once.

    Parameters
    ----------
    source
        A path of any supported kind, or an AnnData.
    modality, layer
        Whose obs and var to describe; by default those of the counts.

    Raises
    ------
    DataError
        When the file cannot be opened at all, or lacks the modality or layer that was asked for.
    """
    problems: list[str] = []
    choices = list_choices(source)
    matrices = tuple(_inspect_matrix(source, m, k, problems) for m, k in choices)
    if not matrices:
        problems.append("it holds no matrix (neither X, layers nor raw)")
    chosen = _choose(source, matrices, modality, layer, problems)
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
        names = _read_index(ds.var, "genes", problems)
        _read_index(ds.obs, "cells", problems)
        _count_empty(ds)
        genes = set() if names is None else set(names.tolist())
        obs = tuple(_inspect_columns(ds.obs, genes, problems))
        var = tuple(_inspect_columns(ds.var, None, problems))
        if not any(m.is_counts for m in matrices):
            problems.append("no matrix of it looks like counts")
        if not any("perturbation" in c.roles for c in obs):
            guides = [m for m in dict.fromkeys(m.modality for m in matrices) if m and _GUIDES.search(m)]
            ds.notes += [f"no obs column looks like perturbation; modality {m!r} may hold the guides" for m in guides]
        return InspectReport(
            **common, kind=ds.kind, opened=(ds.modality, ds.layer), n_cells=ds.n_cells, n_genes=ds.n_genes,
            index_kind=None if names is None else _get_name_kind(names), obs=obs, var=var,
            problems=tuple(dict.fromkeys(problems)), notes=tuple(ds.notes),
        )  # fmt: skip


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
                "nnz": None if isinstance(m, SelectedCsrMatrix) else m.nnz,  # that of the whole file
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
    source: Any, matrices: tuple[MatrixReport, ...], modality: str | None, layer: str | None, problems: list[str]
) -> Dataset | None:
    """Open the matrix whose tables are described."""
    if modality is not None or layer is not None:
        return open_dataset(source, modality=modality, layer=layer)
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


def _read_index(table: Table, what: str, problems: list[str]) -> np.ndarray | None:
    """Return the row names, noting what is wrong with them."""
    try:
        names = table.index
    except VcellError as e:
        problems.append(str(e))
        return None
    unique = set(names.tolist())
    if len(unique) < len(names):
        name, k = Counter(names.tolist()).most_common(1)[0]
        more = f"{len(names) - len(unique):,} of {len(names):,} names of {what} are repeated"
        problems.append(f"{more} ({name!r} {k:,} times)")
    if any(n is None or n == "" for n in unique):
        problems.append(f"some {what} have no name")
    return names


def _count_empty(ds: Dataset) -> None:
    """Note cells (or genes) without a stored value, where the index pointer alone tells."""
    m = ds.matrix
    if m.layout == "dense":
        return
    empty = int(np.count_nonzero(np.diff(m.indptr) == 0))  # type: ignore[union-attr]
    if empty:
        what = "cells" if isinstance(m, CsrMatrix) else "genes"
        ds.notes.append(f"{empty:,} {what} have no counts at all")


def _inspect_columns(table: Table, genes: set[str] | None, problems: list[str]) -> list[ColumnReport]:
    """Describe every column; ``genes`` are the gene names for obs, None for var."""
    out = []
    for name in table.columns:
        try:
            column = table.column(name)
            counts = _count_labels(column)
        except VcellError as e:
            problems.append(str(e))
            continue
        report = _judge_obs(column, counts, genes) if genes is not None else _judge_var(column)
        out.append(report)
    return out


def _count_labels(column: Column) -> Counter[str] | None:
    """Return how often each label occurs; None for fractional numbers. Missing values count under ``""``."""
    if column.codes is not None:
        assert column.categories is not None
        n_each = np.bincount(column.codes + 1, minlength=len(column.categories) + 1)
        labels = ["", *(str(c.decode() if isinstance(c, bytes) else c) for c in column.categories)]
        counts: Counter[str] = Counter()
        for label, k in zip(labels, n_each.tolist(), strict=True):
            if k:
                counts[label] += k
        return counts
    assert column.values is not None
    if column.values.dtype == object:
        return Counter("" if v is None else str(v) for v in column.values)
    if column.values.dtype.kind == "f":
        return None
    values, n_each = np.unique(column.values, return_counts=True)
    return Counter({str(v): int(k) for v, k in zip(values, n_each, strict=True)})


def _judge_obs(column: Column, counts: Counter[str] | None, genes: set[str]) -> ColumnReport:
    """Give a column of obs its roles, by its name and by its labels."""
    if counts is None:
        assert column.values is not None
        missing = int(np.count_nonzero(np.isnan(column.values)))
        return ColumnReport(name=column.name, kind=column.kind, n_labels=None, n_missing=missing)
    n = len(column)
    n_missing = counts.pop("", 0) + (0 if column.missing is None else int(column.missing.sum()))
    lower = column.name.lower()
    is_text = column.kind in ("categorical", "string")
    labels = [*counts] if is_text else []
    controls = [(v, counts[v]) for v in labels if _CONTROL.match(v)] if len(labels) < 1_000_000 else []
    by_name = {role: lower in names or lower.split(":")[-1] in names for role, names in _NAMES.items()}
    roles, score = [], 0
    if is_text and 1 < len(labels) < max(0.5 * n, 3):
        parts = {p for v in labels for p in re.split(r"[|+;,_]", v)} if len(labels) < 200_000 else set()
        targets = sum(v in genes or v.split("_")[0] in genes or v.split("-")[0] in genes for v in labels)
        share = targets / len(labels) if labels else 0.0
        score = 2 * by_name["perturbation"] + 3 * bool(controls) + 3 * (share > 0.3 and len(parts) > 1)
        if score >= 3 or (by_name["perturbation"] and len(labels) > 3):
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
        name=column.name,
        kind=column.kind,
        n_labels=len(counts),
        n_missing=n_missing,
        examples=tuple(counts.most_common(N_EXAMPLES)) if len(counts) < n or not is_text else (),
        controls=tuple(controls[:N_EXAMPLES]),
        roles=tuple(roles),
        score=int(score),
    )


def _judge_var(column: Column) -> ColumnReport:
    """Tell a column of Ensembl ids from one of symbols."""
    labels = [v for v in column.labels()[:20_000].tolist() if v] if column.kind in ("string", "categorical") else []
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
    """Return ``ensembl`` where most names are Ensembl gene ids, else ``symbols``."""
    some = [n for n in names[:: max(1, len(names) // 2_000)].tolist() if n]
    return "ensembl" if some and sum(bool(_ENSEMBL.match(n)) for n in some) > 0.5 * len(some) else "symbols"
