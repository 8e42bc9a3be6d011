"""Effects on genes outside the basis, estimated from the training groups, and the control cells over all genes.

The per-group sums of the stores cover all measured genes. Only those of training groups and controls are used, so that
no information of a held-out group leaks into its own prediction.

Most genes do not respond to most perturbations, and the means of lowly expressed genes are noisy. The
perturbation-specific effect on a gene is therefore shrunken by the factor ``1 - 4 / z**2``, which is zero below two
standard errors (the positive-part rule of James and Stein; Efron & Morris 1973). The noise is estimated from the
disagreement of a perturbation's effects between cell lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.fingerprint import find_difference
from vcelltools.io.rounding import round_matrix
from vcelltools.sampling.effects import split_name
from vcelltools.stores.directions import get_senses

if TYPE_CHECKING:
    from scipy import sparse

    from vcelltools.sampling.splits import Split
    from vcelltools.stores.store import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """The genes of a prediction, and their positions in the basis and in the sums.

    Attributes
    ----------
    names
        Gene names, as in the var index of the source.
    basis_m
        (m,) int64: position in the basis, -1 for genes outside it.
    sums_m
        (m,) int64: column of the store's sums, -1 without one.
    keys
        A name for each column of the sums that is common to all stores: the Ensembl id, or the symbol without one.
    """

    names: list[str]
    basis_m: np.ndarray
    sums_m: np.ndarray
    keys: list[str]


def make_panel(store: Store, source: Dataset) -> Panel:
    """Return the panel of all genes in the source of a store."""
    names = [str(g) for g in source.var.index]
    placed = []
    for table in (store.gene_table, store.measured):
        at = np.full(len(names), -1, np.int64)
        for i, columns in enumerate(table["column_indices"]):
            at[columns] = i
        placed.append(at)
    return Panel(names=names, basis_m=placed[0], sums_m=placed[1], keys=_get_keys(store))


def _get_keys(store: Store) -> list[str]:
    pairs = zip(store.measured["id"], store.measured["symbol"], strict=True)
    return [i if isinstance(i, str) and i else str(s) for i, s in pairs]


_THRESHOLD = 2.0  # standard errors
_HELD_GROUPS = 256  # number of perturbations whose sums are kept in memory
_FEW = 5  # minimum degrees of freedom for a variance between lines


class Fill:
    """Shrunken training effects of perturbations on all genes of a panel.

    With a ``direction``, groups that were measured in another one are left out.
    """

    def __init__(self, stores: tuple[Store, ...], split: Split, panel: Panel, direction: int = -1) -> None:
        self._panel = panel
        self._groups: dict[str, list[tuple[Store, int, int, np.ndarray]]] = {}
        position = {k: i for i, k in enumerate(panel.keys)}
        for store in stores:
            there = np.array([position.get(k, -1) for k in _get_keys(store)], np.int64)
            trains, runs = split.get_train_groups(store), store.runs
            control = runs[runs["is_control"]].drop_duplicates("cell_line").set_index("cell_line")["sums_row"]
            sense = get_senses(store.directions)
            fits = (sense == direction) | (sense < 0) | (direction < 0)
            perturbed = runs[~runs["is_control"] & fits].drop_duplicates("sums_row")
            for r in perturbed.itertuples():
                if trains[r.sums_row] and r.cell_line in control.index:
                    entry = (store, int(r.sums_row), int(control[r.cell_line]), there)
                    self._groups.setdefault(r.perturbation, []).append(entry)

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the shrunken effect (m,) of a perturbation in its training groups; 0 for genes that none measured.

        The effects of the parts of a combination without training groups are added.
        """
        groups, parts = self._measure(perturbation), split_name(perturbation)
        if not groups and parts:
            return np.sum([self.effect(part) for part in parts], axis=0)
        if not groups:
            return np.zeros(len(self._panel.sums_m))
        mean, cells = _average(groups)
        shared, noise = self._background
        own = mean - shared
        z2 = own**2 * cells / np.maximum(noise, 1e-12)
        kept = 1.0 - np.minimum(_THRESHOLD**2 / np.maximum(z2, 1e-12), 1.0)
        kept[self._named.get(perturbation, [])] = 1.0  # the targeted gene is not shrunken: it should be knocked down
        out = np.where(cells > 0, shared + kept * own, 0.0)
        return np.where(self._panel.sums_m >= 0, out[np.maximum(self._panel.sums_m, 0)], 0.0)

    @cached_property
    def _named(self) -> dict[str, list[int]]:
        """Columns of the sums for each gene name in the source."""
        out: dict[str, list[int]] = {}
        for name, k in zip(self._panel.names, self._panel.sums_m.tolist(), strict=True):
            if k >= 0:
                out.setdefault(name, []).append(k)
        return out

    def _measure(self, perturbation: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (effect, cells) of each training group of a perturbation, both over the columns of the sums."""
        out = []
        for store, row, control, there in self._groups.get(perturbation, []):
            sizes, known = store.group_sizes, there >= 0
            change = store.sums[row] / sizes[row] - store.sums[control] / sizes[control]
            effect, cells = np.zeros(len(self._panel.keys)), np.zeros(len(self._panel.keys))
            effect[there[known]], cells[there[known]] = change[known], sizes[row]
            out.append((effect, cells))
        return out

    def _measure_all(self) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """Yield the result of :meth:`_measure` for each perturbation, and release memory pages regularly."""
        for i, name in enumerate(self._groups):
            if i % _HELD_GROUPS == 0:
                self._release()
            yield self._measure(name)
        self._release()

    def _release(self) -> None:
        for store in {id(entry[0]): entry[0] for groups in self._groups.values() for entry in groups}.values():
            store.release()

    @cached_property
    def _background(self) -> tuple[np.ndarray, np.ndarray]:
        """Shared effect of all perturbations, and noise variance of an effect measured on one cell, both per column.

        The shared effect is the mean over perturbations. The noise is the variation of a perturbation's effects between
        lines, or, if each was measured in only one line, the variation between perturbations.
        """
        n = len(self._panel.keys)
        mean, count = np.zeros(n), np.zeros(n)
        for groups in self._measure_all():
            effect, cells = _average(groups)
            mean += effect
            count += cells > 0
        mean /= np.maximum(count, 1)
        within, freedom, between = np.zeros(n), np.zeros(n), np.zeros(n)
        for groups in self._measure_all():
            own, cells = _average(groups)
            between += np.where(cells > 0, (own - mean) ** 2 * cells, 0.0)
            for effect, sizes in groups:
                within += (effect - own) ** 2 * sizes
                freedom += sizes > 0
            freedom -= cells > 0
        spread = between / np.maximum(count - 1, 1)
        noise = np.where(freedom >= _FEW, within / np.maximum(freedom, 1), spread)
        return mean, noise


def _average(groups: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean effect, weighted by cells, and the number of cells."""
    cells = np.sum([c for _, c in groups], axis=0)
    total = np.sum([e * c for e, c in groups], axis=0)
    return np.where(cells > 0, total / np.maximum(cells, 1), 0.0), cells


def open_source(store: Store, path: Path | None, *, compare: bool = True) -> Dataset:
    """Open the source of a store; with ``compare``, check its content against the fingerprint in the store.

    Raises
    ------
    DataError
        If the source is missing or its content has changed.
    """
    facts = store.manifest["source"]
    if "fingerprint" not in facts or "column_indices" not in store.gene_table:
        raise DataError(
            f"{store.path}: this store was built by an earlier version, without a fingerprint of its source",
            hint=f"build the store again, or predict only the basis genes ({spell('basis_only', True)})",
        )
    fpath = path or Path(facts["path"] or "")
    if not fpath.exists() or not (path or facts["path"]):
        raise DataError(
            f"{fpath}: the source of the store {store.name} is missing",
            hint=f"pass {spell('source')} FILE, or {spell('basis_only', True)}",
        )
    layer = None if facts["layer"] == "X" else facts["layer"]
    features = {k: facts.get(k) for k in ("modality", "feature_type", "genome")}
    source = open_dataset(fpath, layer=layer, **features)
    if facts.get("non_integer") == "round":
        source.matrix = round_matrix(source.matrix, store.manifest["seed"])
    # an AnnData in memory has no fingerprint; `read_cells` compares its cells
    memory = facts["kind"] == "memory"
    shape = (source.n_cells, source.n_genes)
    differs = find_difference(source, facts) if compare and not memory else None
    if memory and shape != (facts["n_cells"], facts["n_genes"]):
        differs = f"it holds {shape[0]:,} cells and {shape[1]:,} genes"
    if differs is not None:
        source.close()
        raise DataError(
            f"{fpath} is not the source of the store {store.name}: {differs}",
            hint=f"build the store again, pass the original file with {spell('source')}, or predict only the basis "
            f"genes ({spell('basis_only', True)})",
        )
    return source


def read_cells(store: Store, source: Dataset, panel: Panel, rows: np.ndarray) -> sparse.csr_matrix:
    """Return the counts of some rows of a store over all genes of its source, as CSR float32.

    Raises
    ------
    DataError
        If the counts of the cells differ from those in the store.
    """
    from scipy import sparse

    counts = read_rows(source, store.source_rows[rows])
    inside = np.flatnonzero(panel.basis_m >= 0)
    to_basis = sparse.csr_matrix(
        (np.ones(len(inside), np.float32), (inside, panel.basis_m[inside])), (len(panel.names), store.n_genes)
    )
    known = store.counts(rows).astype(np.float32)
    if (abs(counts @ to_basis - known) - 1e-6 * known > 0.5).nnz:  # float32 is exact up to 2**24
        raise DataError(
            f"{source.label}: the counts of its cells differ from those in the store {store.name}",
            hint=f"pass the source of the store with {spell('source')}",
        )
    return counts


def read_rows(source: Dataset, rows: np.ndarray) -> sparse.csr_matrix:
    """Return the counts of some cells of a file, in the given order, as CSR float32."""
    from scipy import sparse

    matrix, wanted = source.matrix, np.unique(rows)
    place = np.full(source.n_cells, -1, np.int64)
    place[wanted] = np.arange(len(wanted))
    spans = matrix.plan() if matrix.by_gene else [s for r in wanted for s in matrix.plan(start=int(r), stop=int(r) + 1)]
    parts = []
    for span in spans:
        chunk = matrix.read(span)
        if chunk.find_outside() is not None:
            raise DataError(f"{source.label}: an index is out of range", hint="the file is damaged")
        cells, genes, values = chunk.get_entries()
        keep = place[cells] >= 0
        parts.append((values[keep].astype(np.float32), place[cells[keep]], genes[keep].copy()))
    values, cells, genes = (np.concatenate(x) for x in zip(*parts, strict=True))
    out = sparse.csr_matrix((values, (cells, genes)), (len(wanted), source.n_genes))[np.searchsorted(wanted, rows)]
    out.sum_duplicates()
    out.eliminate_zeros()
    return out
