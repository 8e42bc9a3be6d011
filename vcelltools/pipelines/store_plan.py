"""What a store will be, worked out before the counts are read: cells, groups, order, genes.

The final place of every cell follows from ``obs`` alone: sorted by (cell line, control first, perturbation,
context), and within a run by a seeded hash of the barcode. So the bytes depend on the data, not on how it was read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.config import DatasetConfig
from vcelltools.errors import DataError
from vcelltools.genes import Basis, Genes, Reconciliation, match_genes, read_genes
from vcelltools.io import CsrMatrix, Dataset
from vcelltools.io.table import RANGE, Table, TableBase
from vcelltools.pipelines.memory import trim_heap
from vcelltools.pipelines.store_labels import Labels, read_labels

if TYPE_CHECKING:
    import pandas as pd

SEPARATOR = " | "
MAX_CELLS = 2**31 - 1


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
    """Where every cell goes.

    Attributes
    ----------
    source
        (n,) int32: the source cell of each store row.
    row_of_cell
        (cells,) int32: the store row of each source cell, -1 where it is left out.
    runs
        One row a run: cell_line, perturbation, the context columns, context, start, length, is_control, sums_row.
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
        """Rows of the sums."""
        return int(self.runs["sums_row"].max()) + 1

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """First store row of each run, and the row of the sums of each run; the last is -1."""
        return self.runs["start"].to_numpy(), np.append(self.runs["sums_row"].to_numpy(np.int32), np.int32(-1))

    def get_groups(self, start: int, stop: int) -> np.ndarray:
        """Return (stop - start,) int32: the row of the sums of source cells, -1 where they are left out."""
        first, sums_row = self._groups
        return sums_row[np.searchsorted(first, self.row_of_cell[start:stop], side="right") - 1]

    def get_groups_of_rows(self) -> np.ndarray:
        """Return (n,) int32: the row of the sums of each store row."""
        return np.repeat(self._groups[1][:-1], self.runs["length"])


def make_order(labels: Labels, keys: np.ndarray, *, group_by: list[str]) -> Order:
    """Sort the cells that are kept; ``keys`` (cells,) decides within a run.

    Sums are kept per (cell line, perturbation), and for controls per run: what can be held out is never mixed with
    what is trained on, and their size does not follow the number of batches.
    """
    import pandas as pd

    n_perts, n_contexts = len(labels.perturbations), len(labels.contexts)
    run = labels.line.astype(np.int64)  # -1 and below where the cell is left out
    for size, codes in ((n_perts, labels.perturbation), (n_contexts, labels.context)):
        run *= size
        run += codes
    source = np.lexsort((keys, run)).astype(np.int32)  # stable: equal keys stay in the source's order
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
        "context": [SEPARATOR.join(t) for t in tuples],
    }
    for i, name in enumerate(group_by):
        columns[f"context.{name}"] = [t[i] for t in tuples]
    columns |= {"start": start, "length": length, "is_control": r_pert == 0, "sums_row": sums_row}
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
    if ds.n_cells > MAX_CELLS:
        raise DataError(f"{ds.label}: {ds.n_cells:,} cells; a store holds at most {MAX_CELLS:,}", hint="split the file")
    labels = read_labels(ds.obs, spec, where=ds.label)
    order = make_order(labels, hash_barcodes(ds.obs, seed), group_by=list(spec.group_by))
    labels = labels.without_cells()
    if isinstance(ds.obs, TableBase):
        ds.obs.forget()
    trim_heap()
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
