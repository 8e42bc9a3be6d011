"""Plan a store before the counts are read: cells, groups, order and genes.

The final position of every cell depends only on ``obs``: cells are sorted by (cell line, controls first, perturbation,
context), and within a run by a seeded hash of the barcode. So the bytes depend on the data, not on how they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.config import DatasetConfig
from vcelltools.errors import DataError, spell
from vcelltools.genes.identity import Basis, Genes, Reconciliation, find_doubts, match_genes, read_genes
from vcelltools.io import CsrMatrix, Dataset, open_dataset
from vcelltools.io.counts import get_count_evidence
from vcelltools.io.fingerprint import find_difference
from vcelltools.io.library import read_library
from vcelltools.io.rounding import round_matrix
from vcelltools.io.survey import require_counts
from vcelltools.io.table import RANGE, Table, TableBase
from vcelltools.runtime.memory import trim_heap
from vcelltools.stores.building.labels import Labels, read_labels

if TYPE_CHECKING:
    import os

    import pandas as pd
    from anndata import AnnData

SEPARATOR = " | "
MAX_CELLS = 2**31 - 1
_RARE = 0.01  # share of the sampled values


def join_labels(labels: Sequence[str], separator: str) -> str:
    """Join labels uniquely: the separator is escaped within labels."""
    sign = separator.strip()
    if len(labels) == 1:
        return labels[0]
    escaped = [x.replace("\\", "\\\\").replace(sign, f"\\{sign}") if sign in x else x for x in labels]
    return separator.join(escaped)


def hash_barcodes(obs: Table, seed: int) -> np.ndarray:
    """Return (n,) uint64 xxh3-64 of every row name."""
    from xxhash import xxh3_64_intdigest

    out = np.empty(obs.n, np.uint64)
    for a in range(0, obs.n, RANGE):
        names = obs.names(a, min(a + RANGE, obs.n))
        out[a : a + RANGE] = np.fromiter((xxh3_64_intdigest(str(b).encode(), seed) for b in names), np.uint64)
    return out


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the cells in the store.

    Attributes
    ----------
    source
        (n,) int32: source cell of each store row.
    row_of_cell
        (cells,) int32: store row of each source cell, or -1 for dropped cells.
    runs
        One row per run: cell_line, perturbation, the context columns, context, start, length, is_control, sums_row,
        and direction if directions were given.
    """

    source: np.ndarray
    row_of_cell: np.ndarray
    runs: pd.DataFrame

    @property
    def n(self) -> int:
        """Cells in the store."""
        return len(self.source)

    @property
    def n_groups(self) -> int:
        """Number of rows of the sums."""
        return int(self.runs["sums_row"].max()) + 1

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """First store row of each run, and its row of the sums; the last is -1."""
        return self.runs["start"].to_numpy(), np.append(self.runs["sums_row"].to_numpy(np.int32), np.int32(-1))

    def get_groups(self, start: int, stop: int) -> np.ndarray:
        """Return (stop - start,) int32: the row of the sums of source cells, or -1 for dropped cells."""
        first, sums_row = self._groups
        return sums_row[np.searchsorted(first, self.row_of_cell[start:stop], side="right") - 1]

    def get_groups_of_rows(self) -> np.ndarray:
        """Return (n,) int32: the row of the sums of each store row."""
        return np.repeat(self._groups[1][:-1], self.runs["length"])


def make_order(labels: Labels, keys: np.ndarray, *, group_by: list[str]) -> Order:
    """Sort the cells that are kept; ``keys`` (cells,) determines the order within a run.

    Sums are stored per (cell line, perturbation), and for controls per run, so that held-out cells are never mixed with
    training cells, and their size does not depend on the number of batches.
    """
    import pandas as pd

    n_perts, n_contexts = len(labels.perturbations), len(labels.contexts)
    run = labels.line.astype(np.int64)  # -1 and below for dropped cells
    for size, codes in ((n_perts, labels.perturbation), (n_contexts, labels.context)):
        run *= size
        run += codes
    source = np.lexsort((keys, run)).astype(np.int32)  # stable, so that equal keys stay in the order of the source
    run = run[source]
    first = int(np.searchsorted(run, 0))
    source, run = source[first:].copy(), run[first:]
    start = np.flatnonzero(np.append(True, run[1:] != run[:-1])) if len(run) else np.empty(0, np.int64)
    length = np.diff(np.append(start, len(source))).astype(np.int64)
    at, r_ctx = np.divmod(run[start], n_contexts)
    r_line, r_pert = np.divmod(at, n_perts)
    del run
    new_group = np.ones(len(start), bool)
    new_group[1:] = (r_line[1:] != r_line[:-1]) | (r_pert[1:] != r_pert[:-1]) | (r_pert[1:] == 0)
    sums_row = (np.cumsum(new_group) - 1).astype(np.int32)
    tuples = [labels.contexts[c] for c in r_ctx]
    columns: dict[str, Any] = {
        "cell_line": [labels.lines[i] for i in r_line],
        "perturbation": [labels.perturbations[i] for i in r_pert],
        "context": [join_labels(t, SEPARATOR) for t in tuples],
    }
    for i, name in enumerate(group_by):
        columns[f"context.{name}"] = [t[i] for t in tuples]
    columns |= {"start": start, "length": length, "is_control": r_pert == 0, "sums_row": sums_row}
    if labels.direction is not None:
        columns["direction"] = labels.direction[r_line, r_pert].tolist()
    row_of_cell = np.full(len(labels.line), -1, np.int32)
    row_of_cell[source] = np.arange(len(source), dtype=np.int32)
    return Order(source=source, row_of_cell=row_of_cell, runs=pd.DataFrame(columns))


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

    def describe_labels(self) -> dict[str, Any]:
        """Return the entry of the manifest on how the cells were labelled."""
        given = {k: v for k in ("direction", "direction_col") if (v := getattr(self.spec, k)) is not None}
        return {
            "pert_col": self.spec.pert_col,
            "control": self.labels.perturbations[0],
            "controls": list(self.spec.controls),
            "control_is_missing": self.spec.control_is_missing,
            "group_by": list(self.spec.group_by),
            "cell_line": self.spec.cell_line,
            "cell_line_col": self.spec.cell_line_col,
            "dropped": self.labels.dropped,
            "small_groups": [list(x) for x in self.labels.small],
            **given,
        }

    @property
    def basis_of_column(self) -> np.ndarray:
        """(columns,) int32: position in the basis of each column of the file, -1 outside."""
        of_gene = np.full(len(self.match.merged.ids), -1, np.int32)
        present = self.match.present
        of_gene[self.match.gene_of[present]] = np.flatnonzero(present)
        return of_gene[self.match.merged.of_column]


def read_libsize(ds: Dataset, spec: DatasetConfig) -> tuple[np.ndarray | None, str]:
    """Return (library sizes that are known without a pass, their source); None if they are not known.

    Raises
    ------
    DataError
        If the column does not hold whole counts, or the statistics belong to another file.
    """
    if spec.library_size != "matrix":
        values = read_library(ds, spec.library_size)
        whole = values == np.floor(values)
        if not whole.all():
            i = int(np.argmin(whole))
            raise DataError(
                f"{ds.label}: obs/{spec.library_size} of cell {i:,} is {values[i]}, which is not a total of counts"
            )
        return values.astype(np.int64), f"obs/{spec.library_size}"
    if spec.stats is None:
        return None, "the matrix"
    from vcelltools.selection.statistics import load_statistics

    stats = load_statistics(spec.stats)
    if (differs := find_difference(ds, stats.source)) is not None:
        raise DataError(
            f"{spec.stats}: its statistics belong to another file than {ds.label}: {differs}",
            hint="write them again with vcelltools hvg FILE --stats DIR",
        )
    if isinstance(ds.matrix, CsrMatrix):  # the pass over the cells sums them anyway
        return None, "the matrix"
    return stats.library_size.astype(np.int64), "saved statistics"


def open_source(source: str | os.PathLike | AnnData, spec: DatasetConfig, seed: int) -> Dataset:
    """Open the counts of a data set, and round fractional ones if its description says so; others are refused."""
    ds = open_dataset(
        source, modality=spec.modality, layer=spec.layer, feature_type=spec.feature_type, genome=spec.genome
    )
    if spec.non_integer == "refuse":
        try:
            if get_count_evidence(ds.matrix).non_integer_share > _RARE:  # the passes name the cell of a rare one
                require_counts(ds, fractions=f"for fractional counts, use {spell('non_integer', 'round')}")
        except BaseException:
            ds.close()
            raise
    else:
        ds.matrix = round_matrix(ds.matrix, seed)
        ds.notes.append("fractional counts, where there are any, are rounded up or down at random")
    return ds


def make_plan(
    ds: Dataset,
    spec: DatasetConfig,
    basis: Basis,
    *,
    target_sum: float,
    seed: int,
    aliases: Mapping[str, str] | None = None,
) -> StorePlan:
    """Read obs and var, check everything that can be checked, and determine the order."""
    genes = read_genes(ds.var, id_col=spec.gene_id_col, name_col=spec.gene_name_col)
    match = match_genes(basis, genes, policy=spec.duplicates, aliases=aliases)
    if not match.present.any():
        sample = ", ".join(genes.keys[:5])
        raise DataError(
            f"{ds.label}: none of the {len(basis):,} basis genes ({', '.join(basis.labels[:3])}, ...) is in the file",
            hint=f"its genes look like: {sample}; set the columns with {spell('gene_id_col')} and "
            f"{spell('gene_name_col')}",
        )
    if ds.n_cells > MAX_CELLS:
        raise DataError(
            f"{ds.label}: the file has {ds.n_cells:,} cells, but a store holds at most {MAX_CELLS:,}",
            hint="split the file",
        )
    labels = read_labels(ds.obs, spec, where=ds.label)
    order = make_order(labels, hash_barcodes(ds.obs, seed), group_by=list(spec.group_by))
    labels = labels.without_cells()
    notes = [*ds.notes, *find_doubts(ds.var, ds.obs)]
    ds.obs.list_readable(notes)
    if isinstance(ds.obs, TableBase):
        ds.obs.forget()
    trim_heap()
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
