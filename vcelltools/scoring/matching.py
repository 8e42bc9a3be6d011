"""Match a prediction with a truth: genes, perturbations, contexts, and the own gene of each perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vcelltools.differential.cell_labels import read_contexts
from vcelltools.errors import DataError, spell
from vcelltools.io import Dataset

_LISTED = 10


def _list_some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def check_same(where: str, what: str, have: Sequence[str], want: Sequence[str], *, hint: str = "") -> None:
    """Raise a :class:`DataError` that lists missing and extra names if the two sets of names differ.

    ``hint`` is added to the advice if names are missing and none is extra.
    """
    a, b = set(have), set(want)
    missing, extra = [v for v in want if v not in a], [v for v in have if v not in b]
    parts = []
    if missing:
        parts.append(f"lacks {len(missing):,} {what} of the truth: {_list_some(missing)}")
    if extra:
        parts.append(f"has {len(extra):,} {what} that the truth lacks: {_list_some(extra)}")
    if parts:
        also = hint if missing and not extra else ""
        raise DataError(f"{where}: {'; '.join(parts)}", hint=f"prediction and truth need the same {what}{also}")


def match_genes(have: np.ndarray, want: np.ndarray, where: str) -> np.ndarray | None:
    """Return the position of each gene of the truth in the prediction; None if the order is the same.

    Raises
    ------
    DataError
        If genes are missing or extra; the message lists them.
    """
    if len(have) == len(want) and bool(np.all(have == want)):
        return None
    check_same(where, "genes", list(have), list(want))
    position = {g: i for i, g in enumerate(have)}
    if len(position) < len(have) or len(have) < len(want):
        raise DataError(
            f"{where}: gene names repeat and are in a different order than in the truth",
            hint="make the names unique, or sort both files in the same order",
        )
    return np.array([position[g] for g in want], np.int64)


def check_unique_genes(data: Dataset, what: str) -> np.ndarray:
    """Return (g,) gene names; a name that occurs twice is an error."""
    genes = data.var.index
    names, n = np.unique(genes.astype(str), return_counts=True)
    if (n > 1).any():
        twice = ", ".join(names[n > 1][:5])
        raise DataError(f"{data.label}: {int((n > 1).sum())} gene names of the {what} are not unique ({twice})")
    return genes


def match_perturbations(have: Sequence[str], want: Sequence[str], control: str, where: str) -> None:
    """Check that prediction and truth have the same perturbations; the control is checked elsewhere."""
    hint = "; write the truth for the predicted ones with vcelltools sample TRUTH --by COLUMN --matching PRED"
    a, b = sorted(set(have) - {control}), sorted(set(want) - {control})
    check_same(where, "perturbations", a, b, hint=hint)


def match_contexts(data: Dataset, names: list[str], column: str | None) -> dict[str, np.ndarray]:
    """Return {context of the truth: (n,) bool, the cells of the prediction in it}.

    If the truth has only one context and the prediction has no such column, all cells belong to that context.
    """
    if names == [""] or column is None or (len(names) == 1 and column not in data.obs.columns):
        return {names[0]: np.ones(data.n_cells, bool)}
    contexts, context_n = read_contexts(data, column)
    check_same(data.label, "contexts", contexts, names)
    return {name: context_n == contexts.index(name) for name in names}


def name_context(label: str, context: str) -> str:
    """Return the label of a file with its context, for messages."""
    return f"{label}{f', context {context}' if context else ''}"


def resolve_targets(
    labels: np.ndarray, genes: np.ndarray, target_gene_map: Mapping[str, str | None] | None, where: str
) -> tuple[np.ndarray, list[str]]:
    """Return (p,) the position of the own gene of each perturbation (−1 for none), and warnings.

    Raises
    ------
    DataError
        If no perturbation has a gene and none is declared to have none, because labels and genes are then spelt
        differently.
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
            hint=f"the metrics exclude the own gene of each perturbation: give {spell('target_gene_map')}, which "
            "maps perturbations "
            "to genes",
        )
    warnings = []
    if unresolved:
        warnings.append(
            f"{where}: {len(unresolved)} of {len(labels)} perturbations are not the name of a gene "
            f"({', '.join(unresolved[:5])}{', …' if len(unresolved) > 5 else ''}); no gene is excluded for them"
        )
    return target_p, warnings
