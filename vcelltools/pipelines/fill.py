"""Genes outside the basis: what a perturbation did to them where it was measured in training, and the control cells.

The per-group sums of the stores cover all measured genes. Only the sums of training groups and of controls are looked
at, so that nothing of a held-out group leaks into its own prediction.

Most genes do not answer to most perturbations, and the means of lowly expressed genes are noise. What a gene did
beyond what all perturbations share is therefore kept only as far as it stands out from the noise, which the
disagreement of a perturbation's effects between cell lines tells: by ``1 - 4 / z**2``, nothing below two standard
errors (the positive-part rule of James and Stein; Efron & Morris 1973).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.chunks import CscChunk, CsrChunk
from vcelltools.errors import DataError
from vcelltools.io import CscMatrix, Dataset, DenseMatrix, open_dataset

if TYPE_CHECKING:
    from scipy import sparse

    from vcelltools.pipelines.splits import Split
    from vcelltools.pipelines.store import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """The genes of a prediction and how they relate to the basis and to the sums.

    Attributes
    ----------
    names
        Gene names, as the source's var index has them.
    basis_m
        (m,) int64: position in the basis, -1 outside.
    sums_m
        (m,) int64: column of the store's sums, -1 without one.
    keys
        A name for each column of the sums that other stores know too: the Ensembl id, else the symbol.
    """

    names: list[str]
    basis_m: np.ndarray
    sums_m: np.ndarray
    keys: list[str]


def make_panel(store: Store, source: Dataset) -> Panel:
    """Return the panel of a store's source file."""
    names = [str(g) for g in source.var.index]
    first = {g: j for j, g in reversed(list(enumerate(names)))}
    basis = np.full(len(names), -1, np.int64)
    for i, columns in enumerate(store.gene_table["columns"]):
        for column in filter(None, str(columns).split("|")):
            if column in first:
                basis[first[column]] = i
    measured = store.measured
    if len(measured) == len(names):
        sums = np.arange(len(names))
    else:  # some columns were merged, or only the basis has sums
        sums = np.full(len(names), -1, np.int64)
        for k, (gene_id, symbol, i) in enumerate(measured[["id", "symbol", "basis"]].itertuples(index=False)):
            hits = np.flatnonzero(basis == i) if i >= 0 else [first[n] for n in (gene_id, symbol) if n in first][:1]
            sums[hits] = k
    return Panel(names=names, basis_m=basis, sums_m=sums, keys=_get_keys(store))


def _get_keys(store: Store) -> list[str]:
    pairs = zip(store.measured["id"], store.measured["symbol"], strict=True)
    return [i if isinstance(i, str) and i else str(s) for i, s in pairs]


_THRESHOLD = 2.0  # standard errors
_HELD_GROUPS = 256  # perturbations whose sums stay in memory after they have been read
_FEW = 5  # degrees of freedom from which on the disagreement between lines is a variance


class Fill:
    """Training effects of perturbations on all genes of a panel, freed of noise."""

    def __init__(self, stores: tuple[Store, ...], split: Split, panel: Panel) -> None:
        self._panel = panel
        self._groups: dict[str, list[tuple[Store, int, int, np.ndarray]]] = {}
        position = {k: i for i, k in enumerate(panel.keys)}
        for store in stores:
            there = np.array([position.get(k, -1) for k in _get_keys(store)], np.int64)
            trains, runs = split.get_train_groups(store), store.runs
            control = runs[runs["is_control"]].drop_duplicates("cell_line").set_index("cell_line")["sums_row"]
            perturbed = runs[~runs["is_control"]].drop_duplicates("sums_row")
            for r in perturbed.itertuples():
                if trains[r.sums_row] and r.cell_line in control.index:
                    entry = (store, int(r.sums_row), int(control[r.cell_line]), there)
                    self._groups.setdefault(r.perturbation, []).append(entry)

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the effect (m,) of a perturbation as its training groups support it; 0 where none measured a gene."""
        groups = self._measure(perturbation)
        if not groups:
            return np.zeros(len(self._panel.sums_m))
        mean, cells = _average(groups)
        shared, noise = self._background
        own = mean - shared
        z2 = own**2 * cells / np.maximum(noise, 1e-12)
        kept = 1.0 - np.minimum(_THRESHOLD**2 / np.maximum(z2, 1e-12), 1.0)
        kept[self._named.get(perturbation, [])] = 1.0  # its own gene: a knock-down is expected there
        out = np.where(cells > 0, shared + kept * own, 0.0)
        return np.where(self._panel.sums_m >= 0, out[np.maximum(self._panel.sums_m, 0)], 0.0)

    @cached_property
    def _named(self) -> dict[str, list[int]]:
        """Columns of the sums by the name of their gene in the source."""
        out: dict[str, list[int]] = {}
        for name, k in zip(self._panel.names, self._panel.sums_m.tolist(), strict=True):
            if k >= 0:
                out.setdefault(name, []).append(k)
        return out

    def _measure(self, perturbation: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (effect, cells), each over the sums' columns, of the perturbation's training groups."""
        out = []
        for store, row, control, there in self._groups.get(perturbation, []):
            sizes, known = store.group_sizes, there >= 0
            change = store.sums[row] / sizes[row] - store.sums[control] / sizes[control]
            effect, cells = np.zeros(len(self._panel.keys)), np.zeros(len(self._panel.keys))
            effect[there[known]], cells[there[known]] = change[known], sizes[row]
            out.append((effect, cells))
        return out

    def _measure_all(self) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """Yield what :meth:`_measure` returns, perturbation by perturbation; what was read is let go now and then."""
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
        """What all perturbations share, and the noise variance of one cell's worth of effect; both by column.

        The shared effect is the mean over perturbations. The noise is what effects of one perturbation differ by
        from line to line; where each was measured in one line alone, what perturbations differ by.
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
    """Return the mean effect by cells, and the cells."""
    cells = np.sum([c for _, c in groups], axis=0)
    total = np.sum([e * c for e, c in groups], axis=0)
    return np.where(cells > 0, total / np.maximum(cells, 1), 0.0), cells


def open_source(store: Store, path: Path | None) -> Dataset:
    """Open the file that a store was built from.

    Raises
    ------
    DataError
        When it is not there, or is another file.
    """
    facts = store.manifest["source"]
    fpath = path or Path(facts["path"] or "")
    if not fpath.exists():
        raise DataError(
            f"{fpath}: the file that the store {store.name} was built from is not there",
            hint="--source FILE, or --basis-only",
        )
    source = open_dataset(fpath, modality=facts["modality"], layer=facts["layer"])
    shape = (source.n_cells, source.n_genes)
    if shape != (facts["n_cells"], facts["n_genes"]):
        source.close()
        raise DataError(f"{fpath}: {shape} cells and genes; the store {store.name} was built from another file")
    return source


def read_rows(source: Dataset, rows: np.ndarray) -> sparse.csr_matrix:
    """Return some cells of a file, in the order asked for, as CSR float32 counts; all else is only passed over."""
    from scipy import sparse

    matrix, wanted = source.matrix, np.unique(rows)
    shape = (len(wanted), source.n_genes)
    by_column = isinstance(matrix, CscMatrix) or (isinstance(matrix, DenseMatrix) and matrix.axis == 1)
    parts = []
    spans = matrix.plan() if by_column else [s for r in wanted for s in matrix.plan(start=int(r), stop=int(r) + 1)]
    for span in spans:
        chunk = matrix.read(span)
        if isinstance(chunk, CsrChunk):
            check_indices(source, chunk.indices, shape[1])
            parts.append(
                sparse.csr_matrix((chunk.data.astype(np.float32), chunk.indices.copy(), chunk.indptr), (1, shape[1]))
            )
        elif isinstance(chunk, CscChunk):
            check_indices(source, chunk.indices, source.n_cells)
            block = sparse.csc_matrix(
                (chunk.data.astype(np.float32), chunk.indices.copy(), chunk.indptr), (source.n_cells, chunk.n_cols)
            )
            parts.append(block[wanted])
        else:
            block = chunk.block[wanted - chunk.row_start] if by_column else chunk.block
            parts.append(sparse.csr_matrix(block.astype(np.float32)))
    order = np.searchsorted(wanted, rows)
    if by_column:
        out = sparse.hstack(parts, format="csr")[order]
    else:
        out = sparse.vstack([parts[i] for i in order], format="csr")
    out.sum_duplicates()
    out.eliminate_zeros()
    return out


def check_indices(source: Dataset, indices: np.ndarray, bound: int) -> None:
    """Raise a DataError where a stored index lies outside the matrix."""
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= bound):
        raise DataError(f"{source.label}: an index is out of range", hint="the file is damaged")
