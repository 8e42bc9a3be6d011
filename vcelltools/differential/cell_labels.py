"""Perturbation labels and contexts of the cells of a file, and random halves of every group."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io import Dataset
from vcelltools.io.table import Column

CONTEXT_NAMES = (
    "context", "cell_line", "cellline", "cell_line_id", "line", "cell_type", "celltype", "cell_name", "tissue",
    "organism", "species",
)  # fmt: skip
"""Columns that usually distinguish kinds of cells, such as cell lines, which should not be compared with each other."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The perturbation label of every cell.

    Attributes
    ----------
    labels
        All labels, sorted as text, including the control.
    codes
        (n,) int32 positions in ``labels``; -1 if the label is missing or the cell is left out.
    order
        The labels in the order of the column's categories (text order if it is not categorical).
    appearance
        The labels in the order in which they first occur.
    n_missing
        Number of cells without a label, which are left out.
    """

    labels: tuple[str, ...]
    codes: np.ndarray
    order: tuple[str, ...]
    appearance: tuple[str, ...]
    n_missing: int

    @property
    def size_k(self) -> np.ndarray:
        """(k,) number of cells with each label."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.labels))

    def keep(self, wanted_n: np.ndarray) -> Cells:
        """Return only the cells for which ``wanted_n`` is true, and only the labels that they have."""
        codes = np.where(wanted_n, self.codes, -1)
        left = np.unique(codes[codes >= 0])
        labels = tuple(self.labels[i] for i in left)
        lookup = np.full(len(self.labels) + 1, -1, np.int32)
        lookup[left] = np.arange(len(left), dtype=np.int32)
        known = set(labels)
        return replace(
            self,
            labels=labels,
            codes=lookup[codes],
            order=tuple(v for v in self.order if v in known),
            appearance=tuple(v for v in self.appearance if v in known),
        )

    def describe(self, limit: int = 12) -> str:
        """Return the most frequent labels with their numbers of cells."""
        counts = self.size_k
        order = np.argsort(-counts, kind="stable")[:limit]
        more = len(self.labels) - len(order)
        text = ", ".join(f"{self.labels[i]} ({counts[i]:,})" for i in order)
        return f"{text}{f' and {more:,} more' if more > 0 else ''}" or "no labels"

    def need_control(self, control: str, where: str) -> None:
        """Raise a :class:`DataError` that lists the labels if ``control`` is not among them."""
        if control not in self.labels:
            raise DataError(
                f"{where} is labelled {control!r}, the control",
                hint=f"set {spell('control')} to one of: {self.describe()}",
            )


def read_cells(dataset: Dataset, pert_col: str, control: str | None) -> Cells:
    """Read the labels, and raise a :class:`DataError` that lists them if ``control`` is not among them."""
    column = dataset.obs.column(pert_col)
    codes, levels = column.factorize()
    names = [str(v) for v in levels]
    present = set(names)
    order = names
    if column.codes is not None and column.categories is not None:
        every = Column(name=column.name, codes=np.arange(len(column.categories)), categories=column.categories)
        order = list(dict.fromkeys(v for v in every.labels() if v in present))
    labels = sorted(names)
    position = {v: i for i, v in enumerate(labels)}
    lookup = np.array([position[v] for v in names] + [-1], np.int32)
    codes = np.ascontiguousarray(lookup[codes])
    _, first = np.unique(codes[codes >= 0], return_index=True)
    cells = Cells(
        labels=tuple(labels),
        codes=codes,
        order=tuple(order),
        appearance=tuple(labels[i] for i in np.argsort(first)),
        n_missing=int(np.count_nonzero(codes < 0)),
    )
    if control is not None:
        cells.need_control(control, f"{dataset.label}: no cell of obs/{pert_col}")
    return cells


def read_contexts(dataset: Dataset, column: str) -> tuple[list[str], np.ndarray]:
    """Return the sorted contexts and (n,) the context of every cell; raise a :class:`DataError` if one has none."""
    codes, names = dataset.obs.column(column).factorize()
    if (codes < 0).any():
        raise DataError(f"{dataset.label}: {int((codes < 0).sum()):,} cells have no value in obs/{column}")
    return names, codes


def find_pooled(dataset: Dataset, cells: Cells, control: str) -> str | None:
    """Return a warning if different kinds of cells are compared with each other, or None.

    The warning requires a column of a usual name (:data:`CONTEXT_NAMES`) that varies among both the controls and the
    perturbed cells.
    """
    is_control = cells.codes == (cells.labels.index(control) if control in cells.labels else -2)
    known = {c.lower(): c for c in dataset.obs.columns}
    for name in (known[c] for c in CONTEXT_NAMES if c in known):
        codes, levels = dataset.obs.column(name).factorize()
        if any(len(np.unique(codes[m & (codes >= 0)])) < 2 for m in (is_control, (cells.codes >= 0) & ~is_control)):
            continue
        some = ", ".join(levels[:5]) + (", …" if len(levels) > 5 else "")
        return (
            f"{dataset.label}: obs/{name} distinguishes {len(levels):,} kinds of cells ({some}), and all of them were "
            f"pooled, so differences between them count as effects; {spell('context_col', name)} treats each separately"
        )
    return None


def read_parts(
    dataset: Dataset, pert_col: str, control: str, keep: str | None, context_col: str | None, notes: list[str]
) -> tuple[Cells, dict[str, Cells]]:
    """Read the labels of the cells to compare; return all of them, and those of each context ("" without a column).

    Contexts without a perturbation are left out, with a note, and a note says if different kinds of cells are pooled.

    Raises
    ------
    DataError
        If a column or the control is missing, or there is no perturbation.
    """
    cells = read_cells(dataset, pert_col, control)
    if keep is not None:
        cells = _keep_cells(dataset, cells, keep, control, pert_col)
    parts = {"": cells}
    if context_col is not None:
        names, context_n = read_contexts(dataset, context_col)
        parts = {name: cells.keep((context_n == i) & (cells.codes >= 0)) for i, name in enumerate(names)}
        parts = {name: part for name, part in parts.items() if part.labels}
    elif pooled := find_pooled(dataset, cells, control):
        notes.append(pooled)
    bare = [name for name, part in parts.items() if set(part.labels) <= {control}]
    if len(bare) == len(parts):
        said = f" selected by obs/{keep}" if keep is not None else ""
        raise DataError(f"{dataset.label}: no cell{said} has a label in obs/{pert_col} other than {control!r}")
    if bare:
        notes.append(f"contexts without a perturbation were left out: {', '.join(bare)}")
        parts = {name: part for name, part in parts.items() if name not in bare}
    for name, part in parts.items():
        where = f"{dataset.label}, context {name}" if name else dataset.label
        part.need_control(control, f"{where}: no cell of obs/{pert_col}")
    return cells, parts


def _keep_cells(dataset: Dataset, cells: Cells, column_name: str, control: str, pert_col: str) -> Cells:
    """Remove cells that are not selected, and labels that no selected cell has."""
    column = dataset.obs.column(column_name)
    if column.kind != "bool":
        raise DataError(
            f"{dataset.label}: obs/{column_name} is a {column.kind} column, but {spell('keep')} needs booleans"
        )
    assert column.values is not None
    wanted = column.values.astype(bool) & (True if column.missing is None else ~column.missing)
    kept = cells.keep(wanted)
    if control not in kept.labels:
        raise DataError(f"{dataset.label}: obs/{column_name} selects no cell with obs/{pert_col} = {control!r}")
    return replace(kept, n_missing=int(np.count_nonzero(kept.codes < 0)))


def split_halves(codes: np.ndarray, group_order: np.ndarray, n_groups: int, seed: int) -> np.ndarray:
    """Return (n,) int32 codes of two disjoint halves of every group: k in the first, k + ``n_groups`` in the second.

    One random stream permutes the cells of each group in turn (in the order of the column's categories, as in the
    reference implementations). The first ⌊n/2⌋ are one half and the next ⌊n/2⌋ the other. An odd cell is left out.
    """
    rng = np.random.default_rng(seed)
    out = np.full(len(codes), -1, np.int32)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(n_groups + 1))
    for k in group_order:
        mixed = rng.permutation(order[bounds[k] : bounds[k + 1]])
        half = len(mixed) // 2
        out[mixed[:half]] = k
        out[mixed[half : 2 * half]] = k + n_groups
    return out


def count_copies(codes: np.ndarray, hash_n: np.ndarray) -> int:
    """Return the number of cells that are copies of another cell with the same label; empty cells do not count.

    ``hash_n`` are hashes of the cells, 0 for empty ones (:func:`vcelltools.kernels.scan.csr_hash_cells`).
    """
    used = (codes >= 0) & (hash_n != 0)
    order = np.lexsort((hash_n[used], codes[used]))
    code, value = codes[used][order], hash_n[used][order]
    return int(np.count_nonzero((code[1:] == code[:-1]) & (value[1:] == value[:-1])))
