"""Matching a prediction with a truth: labels, contexts, genes, and each perturbation's own gene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io import Dataset, open_dataset


class _Keep:
    """A context manager that leaves an already open data set open."""

    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __enter__(self) -> Dataset:
        return self._data

    def __exit__(self, *args: object) -> None:
        pass


def opened(source: Any, layer: str | None) -> Any:
    """Open a file or an AnnData; an open data set is used as it is, and left open."""
    return _Keep(source) if isinstance(source, Dataset) else open_dataset(source, layer=layer)


def get_labels(data: Dataset, pert_col: str, what: str) -> np.ndarray:
    """Return (n,) the perturbation of every cell; a cell without one is an error."""
    labels = data.obs.column(pert_col).labels()
    missing = np.array([v is None for v in labels])
    if missing.any():
        i = int(np.flatnonzero(missing)[0])
        raise DataError(
            f"{data.label}: {int(missing.sum()):,} cells of the {what} have no {pert_col} "
            f"(first: cell {data.obs.index[i]})",
            hint="label every cell, or drop those cells",
        )
    return labels


def get_contexts(data: Dataset, context_col: str) -> tuple[list[str], np.ndarray]:
    """Return the contexts in name order and (n,) the context of every cell; [""] where there is no such column."""
    if context_col not in data.obs.columns:
        return [""], np.zeros(data.n_cells, np.int32)
    codes, names = data.obs.column(context_col).factorize()
    if (codes < 0).any():
        raise DataError(f"{data.label}: {int((codes < 0).sum()):,} cells have no {context_col}")
    return names, codes


def get_genes(data: Dataset, what: str) -> np.ndarray:
    """Return (g,) gene names; a name that occurs twice is an error."""
    genes = data.var.index
    names, n = np.unique(genes.astype(str), return_counts=True)
    if (n > 1).any():
        twice = ", ".join(names[n > 1][:5])
        raise DataError(f"{data.label}: {int((n > 1).sum())} gene names of the {what} are not unique ({twice})")
    return genes


def check_groups(in_n: np.ndarray, labels: np.ndarray, control: str, where: str, pert_col: str) -> None:
    """Raise, with a census, where there are no controls or nothing but controls."""
    if control not in set(in_n):
        census = ", ".join(f"{k} ({n})" for k, n in _count_labels(in_n)[:12])
        raise DataError(
            f"{where}: no cell of the truth is the control {control!r} in {pert_col}",
            hint=f"--control; the labels are {census}",
        )
    if len(labels) == 0:
        raise DataError(f"{where}: every cell is the control {control!r}; there is no perturbation to score")


def _count_labels(in_n: np.ndarray) -> list[tuple[str, int]]:
    names, n = np.unique(in_n.astype(str), return_counts=True)
    return sorted(zip(names.tolist(), n.tolist(), strict=True), key=lambda x: -x[1])


def resolve_targets(
    labels: np.ndarray, genes: np.ndarray, target_gene_map: Mapping[str, str | None] | None, where: str
) -> tuple[np.ndarray, list[str]]:
    """Return (p,) the position of each perturbation's own gene (−1: none), and warnings.

    Raises
    ------
    DataError
        When no perturbation has one and none is declared to have none: labels and genes are then spelt differently.
    """
    at = {str(g): i for i, g in enumerate(genes)}
    given = dict(target_gene_map or {})
    target_p = np.full(len(labels), -1, np.int64)
    unresolved, declared = [], 0
    for i, label in enumerate(labels):
        gene = given.get(label, given.get("*", label) if "*" in given else label)
        if gene is None:
            declared += 1
        elif gene in at:
            target_p[i] = at[gene]
        else:
            unresolved.append(str(label))
    if unresolved and not declared and len(unresolved) == len(labels):
        raise DataError(
            f"{where}: none of the {len(labels)} perturbations is the name of a gene ({', '.join(unresolved[:3])}, …)",
            hint="the metrics leave each perturbation's own gene out: give --target-gene-map, perturbation to gene",
        )
    warnings = []
    if unresolved:
        warnings.append(
            f"{where}: {len(unresolved)} of {len(labels)} perturbations are not the name of a gene "
            f"({', '.join(unresolved[:5])}{', …' if len(unresolved) > 5 else ''}); no gene is left out for them"
        )
    return target_p, warnings


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The prediction's cells: part (context) and group of each, and its genes in the truth's order."""

    part_n: np.ndarray
    code_n: np.ndarray
    gene_order: np.ndarray | None
    warnings: list[str]


def match_prediction(data: Dataset, truths: Sequence[Any], pert_col: str, control: str, context_col: str) -> Matched:
    """Match the prediction's cells with the contexts' truths; a difference lists what is missing and what is extra."""
    labels_n = get_labels(data, pert_col, "prediction")
    genes = get_genes(data, "prediction")
    gene_order = _match_genes(data.label, genes, truths[0].genes)
    names = [t.context for t in truths]
    alone = len(names) == 1 and context_col not in data.obs.columns
    if names == [""] or alone:
        contexts, context_n = list(names), np.zeros(data.n_cells, np.int32)
    else:
        contexts, context_n = get_contexts(data, context_col)
    _say_difference(data.label, "contexts", set(contexts), set(names))
    part_n, code_n = np.full(data.n_cells, -1, np.int32), np.full(data.n_cells, -1, np.int32)
    warnings = []
    n_control = int((labels_n == control).sum())
    if n_control:
        warnings.append(f"the prediction's {n_control:,} control cells are not read: the truth's serve both sides")
    for i, t in enumerate(truths):
        here = (context_n == contexts.index(t.context)) & (labels_n != control)
        where = f"{data.label}{f', context {t.context}' if t.context else ''}"
        _say_difference(where, "perturbations", set(labels_n[here]), set(t.labels))
        group = {label: k + 1 for k, label in enumerate(t.labels)}
        code_n[here] = [group[label] for label in labels_n[here]]
        part_n[here] = i
    return Matched(part_n=part_n, code_n=code_n, gene_order=gene_order, warnings=warnings)


def _say_difference(where: str, what: str, have: set[str], want: set[str]) -> None:
    if have == want:
        return

    def some(names: set[str]) -> str:
        return ", ".join(sorted(map(str, names))[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")

    parts = []
    if want - have:
        parts.append(f"missing {what}: {some(want - have)}")
    if have - want:
        parts.append(f"{what} that the truth lacks: {some(have - want)}")
    raise DataError(
        f"{where}: prediction and truth differ: {'; '.join(parts)}",
        hint=f"both need the same {what}: vcelltools sample writes the cells of some" if what != "genes" else None,
    )


def _match_genes(where: str, genes: np.ndarray, want: np.ndarray) -> np.ndarray | None:
    if np.array_equal(genes, want):
        return None
    _say_difference(where, "genes", set(genes), set(want))
    at = {g: i for i, g in enumerate(genes)}
    return np.array([at[g] for g in want], np.int64)
