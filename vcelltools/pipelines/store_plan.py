"""What a store will be, worked out before the counts are read: cells, groups, order, genes.

The final place of every cell follows from ``obs`` alone: sorted by (cell line, control first, perturbation,
context), and within a run by a seeded hash of the barcode. So the bytes depend on the data, not on how it was read.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.config import DatasetConfig
from vcelltools.errors import DataError, UsageError
from vcelltools.genes import Basis, Genes, Reconciliation, match_genes, read_genes
from vcelltools.io import CsrMatrix, Dataset
from vcelltools.io.table import Table, TableBase

if TYPE_CHECKING:
    import pandas as pd

_CENSUS = 12
SEPARATOR = " | "


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What each cell is.

    Attributes
    ----------
    line, perturbation, context
        (n,) int32 codes into the lists below; perturbation 0 is control; -1 where the cell is left out.
    lines, perturbations, contexts
        The labels; a context is a tuple of the values of ``group_by``.
    dropped
        Reason -> number of cells left out.
    small
        (cell line, perturbation, cells) of the groups below ``min_cells``.
    """

    line: np.ndarray
    perturbation: np.ndarray
    context: np.ndarray
    lines: list[str]
    perturbations: list[str]
    contexts: list[tuple[str, ...]]
    dropped: dict[str, int]
    small: list[tuple[str, str, int]]


def _census(labels: np.ndarray) -> str:
    from collections import Counter

    counts = Counter("(missing)" if x is None else x for x in labels)
    top = ", ".join(f"{k} {n:,}" for k, n in counts.most_common(_CENSUS))
    more = f", and {len(counts) - _CENSUS:,} more" if len(counts) > _CENSUS else ""
    return f"labels found: {top}{more}"


def _factorize(obs: Table, name: str) -> tuple[np.ndarray, list[str]]:
    codes, labels = obs.column(name).factorize()
    if (codes < 0).any():
        codes = np.where(codes < 0, len(labels), codes).astype(np.int32)
        labels = [*labels, "(missing)"]
    return codes, labels


def check_controls(found: set[str], controls: tuple[str, ...], labels: np.ndarray, where: str) -> None:
    """Raise a :class:`DataError` with a census where a control label matches no cell."""
    for c in controls:
        if c not in found:
            near = difflib.get_close_matches(c, list(found), 1, 0.6)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{where}: no cell has the control label {c!r}", hint=f"{guess}{_census(labels)}")


def _read_guides(labels: np.ndarray, obs: Table, spec: DatasetConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (labels, keep) after the policy for labels that name several guides."""
    guides = spec.guides
    if guides is None:
        return labels, np.ones(len(labels), bool)
    keep = np.ones(len(labels), bool)
    if guides.n_col is not None:
        col = obs.column(guides.n_col)
        if col.kind not in ("number", "bool"):
            raise DataError(f"obs/{guides.n_col} does not hold numbers of guides ({col.kind})")
        values = col.values
        assert values is not None
        n_guides = np.where(np.isfinite(values.astype(float)), values.astype(float), 0)
    else:
        n_guides = np.array([0 if x is None else len(set(x.split(guides.sep))) for x in labels])
    cache: dict[Any, Any] = {None: None}
    for x in set(labels) - {None}:
        parts = list(dict.fromkeys(p for p in x.split(guides.sep) if p))
        if guides.policy == "first":
            cache[x] = parts[0] if parts else None
        else:  # two guides of one target are one perturbation, and A|B is B|A
            cache[x] = guides.sep.join(sorted(parts)) or None
    out = np.array([cache[x] for x in labels], dtype=object)
    if guides.policy == "single":
        keep = np.array([x is not None and guides.sep not in x for x in out]) & (n_guides <= 1)
        keep |= np.array([x is None for x in out])
    return out, keep


def read_labels(obs: Table, spec: DatasetConfig, *, where: str) -> Labels:
    """Read what each cell is, and check it against what was asked for.

    Raises
    ------
    DataError
        For a missing column, or a control label that matches no cell (with a census of the labels).
    UsageError
        Where the perturbation column or the controls are not given.
    """
    if not spec.pert_col:
        raise UsageError("which obs column holds the perturbation?", hint=f"--pert-col; columns: {_columns(obs)}")
    raw = obs.column(spec.pert_col).labels()
    if not spec.controls and not spec.control_is_missing:
        raise UsageError("which label do control cells carry?", hint=f"--control; {_census(raw)}")
    labels, keep = _read_guides(raw, obs, spec)
    dropped: dict[str, int] = {}

    def drop(mask: np.ndarray, why: str) -> None:
        nonlocal keep
        n = int((mask & keep).sum())
        if n:
            dropped[why] = n
        keep = keep & ~mask

    if not keep.all():
        dropped["several guides"] = int((~keep).sum())
    for name in spec.keep:
        flags = _read_flags(obs, name, where)
        drop(~flags, f"not {name}")
    missing = np.array([x is None for x in labels], bool)
    if not spec.control_is_missing:
        drop(missing, "no perturbation label")
    check_controls(set(labels[keep]) - {None}, spec.controls, labels[keep], where)
    is_control = np.isin(labels.astype(str), spec.controls) & ~missing
    if spec.control_is_missing:
        is_control |= missing
    control_label = spec.controls[0] if spec.controls else "control"
    names = sorted(set(labels[keep & ~is_control]))
    if not names:
        raise DataError(f"{where}: every cell is a control; nothing is perturbed", hint=_census(labels))
    perturbations = [control_label, *names]
    position = {x: i for i, x in enumerate(perturbations)}
    perturbation = np.array(
        [0 if c else position[x] if k else -1 for x, c, k in zip(labels, is_control, keep, strict=True)], np.int32
    )
    line, lines = _read_lines(obs, spec)
    context, contexts = _read_contexts(obs, spec.group_by)
    small = _drop_small(line, perturbation, keep, spec.min_cells, lines, perturbations, dropped)
    out = ~keep
    line, perturbation, context = (np.where(out, -1, x).astype(np.int32) for x in (line, perturbation, context))
    if not (perturbation == 0).any():
        raise DataError(f"{where}: no control cell is left", hint=_census(labels))
    return Labels(
        line=line,
        perturbation=perturbation,
        context=context,
        lines=lines,
        perturbations=perturbations,
        contexts=contexts,
        dropped=dropped,
        small=small,
    )


def _read_flags(obs: Table, name: str, where: str) -> np.ndarray:
    """Return (n,) bool of a column of booleans, or of 0 and 1; missing counts as False."""
    col = obs.column(name)
    values = col.values
    if values is None or values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise DataError(f"{where}: obs/{name} is not a column of booleans (or of 0 and 1)")
    flags = values.astype(bool)
    return flags if col.missing is None else flags & ~col.missing


def _columns(obs: Table) -> str:
    return ", ".join(obs.columns[:30]) or "none"


def _read_lines(obs: Table, spec: DatasetConfig) -> tuple[np.ndarray, list[str]]:
    if spec.cell_line is not None and spec.cell_line_col is not None:
        raise UsageError("cell_line and cell_line_col are both given", hint="give one of them")
    if spec.cell_line_col is not None:
        return _factorize(obs, spec.cell_line_col)
    return np.zeros(obs.n, np.int32), [spec.cell_line or spec.name]


def _read_contexts(obs: Table, columns: list[str]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Return (codes, tuples of values) of the combinations of the columns, in sorted order."""
    code = np.zeros(obs.n, np.int64)
    levels = []
    for name in columns:
        codes, labels = _factorize(obs, name)
        levels.append(labels)
        code = code * len(labels) + codes
    present, inverse = np.unique(code, return_inverse=True)
    tuples = []
    for value in present.tolist():
        parts = []
        for labels in reversed(levels):
            value, k = divmod(value, len(labels))  # noqa: PLW2901
            parts.append(labels[k])
        tuples.append(tuple(reversed(parts)))
    return inverse.astype(np.int32), tuples


def _drop_small(line, perturbation, keep, min_cells, lines, perturbations, dropped) -> list[tuple[str, str, int]]:
    """Take cells of groups below ``min_cells`` out of ``keep`` (in place); return the groups."""
    if min_cells <= 1:
        return []
    group = line.astype(np.int64) * len(perturbations) + np.maximum(perturbation, 0)
    counts = np.bincount(group[keep], minlength=len(lines) * len(perturbations))
    bad = (counts > 0) & (counts < min_cells)
    bad[:: len(perturbations)] = False  # controls stay, however few
    gone = keep & bad[group]
    if gone.any():
        dropped[f"group below {min_cells} cells"] = int(gone.sum())
        keep &= ~gone
    found = np.flatnonzero(bad)
    return [(lines[g // len(perturbations)], perturbations[g % len(perturbations)], int(counts[g])) for g in found]


def hash_barcodes(barcodes: np.ndarray, seed: int) -> np.ndarray:
    """Return (n,) uint64 xxh3-64 of every barcode."""
    from xxhash import xxh3_64_intdigest

    return np.fromiter((xxh3_64_intdigest(str(b).encode(), seed) for b in barcodes), np.uint64, len(barcodes))


@dataclass(frozen=True, kw_only=True)
class Order:
    """Where every cell goes.

    Attributes
    ----------
    source
        (n,) int64: the source cell of each store row.
    row_of_cell
        (cells,) int64: the store row of each source cell, -1 where it is left out.
    group_of_cell
        (cells,) int32: the row of the sums, -1 where it is left out.
    runs
        One row a run: cell_line, perturbation, the context columns, context, start, length, is_control, sums_row.
    """

    source: np.ndarray
    row_of_cell: np.ndarray
    group_of_cell: np.ndarray
    runs: pd.DataFrame

    @property
    def n(self) -> int:
        """Cells in the store."""
        return len(self.source)

    @property
    def n_groups(self) -> int:
        """Rows of the sums."""
        return int(self.runs["sums_row"].max()) + 1


def make_order(labels: Labels, barcodes: np.ndarray, *, seed: int, group_by: list[str]) -> Order:
    """Sort the cells that are kept.

    Sums are kept per (cell line, perturbation), and for controls per run: what can be held out is never mixed with
    what is trained on, and their size does not follow the number of batches.
    """
    import pandas as pd

    kept = np.flatnonzero(labels.perturbation >= 0)
    keys = hash_barcodes(barcodes, seed)[kept]
    line, pert, ctx = (x[kept] for x in (labels.line, labels.perturbation, labels.context))
    source = kept[np.lexsort((kept, keys, ctx, pert, line))].astype(np.int64)
    line, pert, ctx = (x[source] for x in (labels.line, labels.perturbation, labels.context))
    new_run = np.ones(len(source), bool)
    new_run[1:] = (line[1:] != line[:-1]) | (pert[1:] != pert[:-1]) | (ctx[1:] != ctx[:-1])
    start = np.flatnonzero(new_run).astype(np.int64)
    length = np.diff(np.append(start, len(source))).astype(np.int64)
    r_line, r_pert, r_ctx = line[start], pert[start], ctx[start]
    new_group = np.ones(len(start), bool)
    new_group[1:] = (r_line[1:] != r_line[:-1]) | (r_pert[1:] != r_pert[:-1]) | (r_pert[1:] == 0)
    sums_row = (np.cumsum(new_group) - 1).astype(np.int32)
    tuples = [labels.contexts[c] for c in r_ctx]
    columns: dict[str, Any] = {
        "cell_line": [labels.lines[i] for i in r_line],
        "perturbation": [labels.perturbations[i] for i in r_pert],
        "context": [SEPARATOR.join(t) for t in tuples],
    }
    for i, name in enumerate(group_by):
        columns[f"context.{name}"] = [t[i] for t in tuples]
    columns |= {"start": start, "length": length, "is_control": r_pert == 0, "sums_row": sums_row}
    row_of_cell = np.full(len(labels.line), -1, np.int64)
    row_of_cell[source] = np.arange(len(source))
    group_of_cell = np.full(len(labels.line), -1, np.int32)
    group_of_cell[source] = np.repeat(sums_row, length)
    return Order(source=source, row_of_cell=row_of_cell, group_of_cell=group_of_cell, runs=pd.DataFrame(columns))


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Everything that is known before the counts are read."""

    spec: DatasetConfig
    basis: Basis
    genes: Genes
    match: Reconciliation
    labels: Labels
    order: Order
    target_sum: float
    seed: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    libsize: np.ndarray | None = None
    libsize_from: str = "the matrix"
    notes: tuple[str, ...] = field(default=())

    @property
    def n_basis(self) -> int:
        """Genes in the basis."""
        return len(self.basis)

    @property
    def basis_of_column(self) -> np.ndarray:
        """(columns,) int32: position in the basis of each column of the file, -1 outside."""
        of_gene = np.full(len(self.match.merged.ids), -1, np.int32)
        present = self.match.present
        of_gene[self.match.gene_of[present]] = np.flatnonzero(present)
        return of_gene[self.match.merged.of_column]


def read_libsize(ds: Dataset, spec: DatasetConfig) -> tuple[np.ndarray | None, str]:
    """Return (library sizes that are known without a pass, where they came from); None where they are not.

    Raises
    ------
    DataError
        Where the column does not hold whole counts, or the statistics are of another file.
    """
    if spec.library_size != "matrix":
        col = ds.obs.column(spec.library_size)
        values = col.values
        if values is None or values.dtype.kind not in "iuf" or col.missing is not None:
            raise DataError(f"{ds.label}: obs/{spec.library_size} does not hold a total count for every cell")
        whole = np.isfinite(values) & (values >= 0) & (values == np.floor(values))
        if not whole.all():
            i = int(np.argmin(whole))
            raise DataError(f"{ds.label}: obs/{spec.library_size} of cell {i:,} is {values[i]}, not a total of counts")
        return values.astype(np.int64), f"obs/{spec.library_size}"
    if spec.stats is not None and not os.path.exists(os.path.join(spec.stats, "manifest.json")):
        raise DataError(f"{spec.stats}: holds no gene statistics", hint="vcelltools hvg FILE --stats DIR writes them")
    if spec.stats is None or isinstance(ds.matrix, CsrMatrix):  # a pass over cells adds them up on its way
        return None, "the matrix"
    from vcelltools.pipelines.statistics import describe_source, load_statistics

    stats = load_statistics(spec.stats)
    now = describe_source(ds)
    for key in ("size", "modality", "layer"):
        if stats.source.get(key) != now.get(key):
            raise DataError(
                f"{spec.stats}: its statistics are of another file: {key} was {stats.source.get(key)!r} and is "
                f"{now.get(key)!r}",
                hint="vcelltools hvg FILE --stats DIR makes them anew",
            )
    if stats.n_cells != ds.n_cells or not np.array_equal(stats.genes.astype(str), ds.var.index.astype(str)):
        raise DataError(f"{spec.stats}: its statistics are of other cells or genes than {ds.label}")
    return stats.library_size.astype(np.int64), "saved statistics"


def make_plan(
    ds: Dataset,
    spec: DatasetConfig,
    basis: Basis,
    *,
    target_sum: float,
    seed: int,
    aliases: Mapping[str, str] | None = None,
) -> StorePlan:
    """Read obs and var, check everything that can be checked, and work out the order."""
    genes = read_genes(ds.var, id_col=spec.gene_id_col, name_col=spec.gene_name_col)
    match = match_genes(basis, genes, policy=spec.duplicates, aliases=aliases)
    if not match.present.any():
        sample = ", ".join(genes.keys[:5])
        raise DataError(
            f"{ds.label}: none of the {len(basis):,} basis genes ({', '.join(basis.labels[:3])}, ...) is in the file",
            hint=f"its genes look like: {sample}; name the columns with --gene-id-col and --gene-name-col",
        )
    labels = read_labels(ds.obs, spec, where=ds.label)
    order = make_order(labels, ds.obs.index, seed=seed, group_by=list(spec.group_by))
    if isinstance(ds.obs, TableBase):
        ds.obs.forget()
    notes = list(ds.notes)
    libsize, libsize_from = read_libsize(ds, spec)
    if order.n == 0:
        raise DataError(f"{ds.label}: no cell is left", hint=str(labels.dropped))
    return StorePlan(
        spec=spec,
        basis=basis,
        genes=genes,
        match=match,
        labels=labels,
        order=order,
        target_sum=target_sum,
        seed=seed,
        aliases=aliases or {},
        libsize=libsize,
        libsize_from=libsize_from,
        notes=tuple(notes),
    )
