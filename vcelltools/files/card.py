"""The experiment card: the factors of an experiment, their nesting, and the comparisons that they allow.

Only obs is read, not the matrix. A *factor* is a column with at least two labels and fewer labels than cells. It is
nested in another factor if each of its labels occurs with only one label of the other.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.files.inspect import ColumnReport, inspect_table
from vcelltools.io import Dataset, open_dataset

if TYPE_CHECKING:
    from anndata import AnnData

MIN_CELLS = 30
"""Number of cells below which a group is small: its halves cannot calibrate a score."""
MAX_LEVELS = 20_000
CONFOUNDED = 0.5
"""Cramér's V at and above which two factors are reported as confounded."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A column of labels.

    Attributes
    ----------
    levels
        Number of labels.
    missing
        Number of cells without a label.
    smallest, median, largest
        Number of cells per label.
    role
        ``perturbation``, ``batch``, ``cell_line`` or "".
    nested_in
        Factors in which this one is nested.
    """

    name: str
    levels: int
    missing: int
    smallest: int
    median: float
    largest: int
    role: str
    nested_in: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Card:
    """The experiment, as obs describes it.

    Attributes
    ----------
    path, n_cells
        The file and its number of cells.
    perturbation, control, batch, cell_line
        The columns and the control label that were found; None if there is none.
    factors
        All factors.
    n_perturbations, n_controls
        Number of perturbations without the control, and number of control cells.
    cells_per_perturbation
        Smallest, median and largest number.
    replicates_per_perturbation
        The same for the batches (or cell lines) in which a perturbation occurs; None without batches.
    confounding
        Cramér's V (bias-corrected, Bergsma 2013) of perturbation and batch; 1 is complete.
    can_score
        Whether a prediction of these cells can be scored.
    findings
        Conclusions in sentences, the most important first.
    """

    path: str
    n_cells: int
    perturbation: str | None
    control: str | None
    batch: str | None
    cell_line: str | None
    factors: tuple[Factor, ...]
    n_perturbations: int
    n_controls: int
    cells_per_perturbation: tuple[int, float, int] | None
    replicates_per_perturbation: tuple[int, float, int] | None
    confounding: float | None
    can_score: bool
    findings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def make_card(
    source: str | os.PathLike | AnnData,
    *,
    pert_col: str | None = None,
    control: str | None = None,
    batch_col: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
) -> Card:
    """Read obs and describe the experiment.

    Parameters
    ----------
    pert_col, control, batch_col
        The columns and the control label, if their names do not show their roles.

    Raises
    ------
    DataError
        If a column or label does not exist.
    """
    with open_dataset(source, modality=modality, layer=layer, feature_type=feature_type, genome=genome) as data:
        reports = inspect_table(data)
        factors = {r.name: data.obs.column(r.name).factorize() for r in reports if _is_factor(r, data.n_cells)}
        chosen = {
            "perturbation": pert_col or _first(reports, "perturbation"),
            "batch": batch_col or _first(reports, "batch"),
            "cell_line": _first(reports, "cell_line"),
        }
        for name in (v for v in chosen.values() if v is not None and v not in factors):
            factors[name] = data.obs.column(name).factorize()
        return _judge(data, reports, factors, chosen, control)


def _is_factor(r: ColumnReport, n_cells: int) -> bool:
    most = 50 if r.kind == "number" else MAX_LEVELS  # whole numbers may be batches, or counts of something
    return r.n_labels is not None and 2 <= r.n_labels <= min(most, n_cells // 2)


def _first(reports: list[ColumnReport], role: str) -> str | None:
    some = [r for r in reports if role in r.roles]
    return max(some, key=lambda r: r.score).name if some else None


def _is_nested(inner: np.ndarray, outer: np.ndarray) -> bool:
    both = (inner >= 0) & (outer >= 0)
    pairs = np.unique(np.column_stack([inner[both], outer[both]]), axis=0)
    return bool(both.any()) and len(pairs) == len(np.unique(pairs[:, 0]))


def get_cramers_v(a: np.ndarray, b: np.ndarray) -> float:
    """Return Cramér's V of two columns of codes, with bias correction (Bergsma 2013); NaN if a column has one label."""
    both = (a >= 0) & (b >= 0)
    a, b = np.unique(a[both], return_inverse=True)[1], np.unique(b[both], return_inverse=True)[1]
    n = len(a)
    r, c = (int(v.max(initial=-1)) + 1 for v in (a, b))
    if r < 2 or c < 2:
        return float("nan")
    cell, observed = np.unique(a.astype(np.int64) * c + b, return_counts=True)
    row, column = np.bincount(a), np.bincount(b)
    expected = row[cell // c] * column[cell % c] / n
    # of the empty places (0 − e)²/e = e, and all e together are n
    chi2 = float(((observed - expected) ** 2 / expected).sum() + n - expected.sum())
    phi2 = max(0.0, chi2 / n - (r - 1) * (c - 1) / (n - 1))
    rows, columns = r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)
    return float(np.sqrt(phi2 / max(min(rows, columns) - 1, 1e-12)))


def _spread(values: np.ndarray) -> tuple[int, float, int]:
    return int(values.min()), float(np.median(values)), int(values.max())


def _judge(
    data: Dataset,
    reports: list[ColumnReport],
    factors: dict[str, tuple[np.ndarray, list[str]]],
    chosen: dict[str, str | None],
    control: str | None,
) -> Card:
    roles = {v: k for k, v in chosen.items() if v is not None}
    rows = []
    for name, (codes, levels) in factors.items():
        size = np.bincount(codes[codes >= 0], minlength=len(levels))
        nested = tuple(o for o, (c, v) in factors.items() if o != name and len(v) > 1 and _is_nested(codes, c))
        rows.append(
            Factor(
                name=name, levels=len(levels), missing=int((codes < 0).sum()),
                smallest=int(size.min()) if len(size) else 0,
                median=float(np.median(size)) if len(size) else 0.0, largest=int(size.max(initial=0)),
                role=roles.get(name, ""), nested_in=nested,
            )
        )  # fmt: skip
    findings: list[str] = []
    pert, batch, line = chosen["perturbation"], chosen["batch"], chosen["cell_line"]
    body: dict[str, Any] = {
        "n_perturbations": 0, "n_controls": 0, "cells_per_perturbation": None, "replicates_per_perturbation": None,
        "confounding": None, "can_score": False,
    }  # fmt: skip
    if pert is None:
        findings.append("No column looks like a perturbation, so nothing can be compared or scored.")
    else:
        codes, levels = factors[pert]
        found = next((r.controls[0][0] for r in reports if r.name == pert and r.controls), None)
        if control is not None and control not in levels:
            raise DataError(
                f"{data.label}: no cell of obs/{pert} is labelled {control!r}", hint=f"{spell('control')} names one"
            )
        control = control or (found if found in levels else None)
        body |= _judge_perturbations(codes, levels, control, pert, findings)
        for column in (v for v in (batch, line) if v is not None):
            of_column = _judge_batches(codes, factors[column][0], levels, control, column, findings)
            if column == (batch or line):
                body |= of_column
    return Card(
        path=data.label, n_cells=data.n_cells, perturbation=pert, control=control, batch=batch, cell_line=line,
        factors=tuple(rows), findings=tuple(findings), **body,
    )  # fmt: skip


def _judge_perturbations(
    codes: np.ndarray, levels: list[str], control: str | None, pert: str, findings: list[str]
) -> dict[str, Any]:
    """Return the fields that depend on the sizes of the groups, and add findings."""
    size = np.bincount(codes[codes >= 0], minlength=len(levels))
    k = levels.index(control) if control is not None else -1
    others = size if k < 0 else np.delete(size, k)
    n_controls = 0 if k < 0 else int(size[k])
    if control is None:
        findings.append(
            f"No label of {pert} looks like a control: no effect can be measured, and no score is possible."
        )
    elif len(others) < 2:
        findings.append(
            f"{pert} has {len(others)} perturbation{'s' if len(others) != 1 else ''} beside the control: "
            "predictions cannot be told apart, and no average score is possible."
        )
    if control is not None and 0 < n_controls < MIN_CELLS:
        findings.append(f"{n_controls} control cells: every effect carries their noise.")
    small = int((others < MIN_CELLS).sum())
    if small:
        findings.append(
            f"{small:,} of {len(others):,} perturbations have fewer than {MIN_CELLS} cells; their effects are mostly "
            "noise, and metrics are not calibrated on them."
        )
    missing = int((codes < 0).sum())
    if missing:
        findings.append(f"{missing:,} cells have no {pert} and are left out of everything.")
    return {
        "n_perturbations": len(others), "n_controls": n_controls,
        "cells_per_perturbation": _spread(others) if len(others) else None,
        "can_score": control is not None and len(others) >= 2,
    }  # fmt: skip


def _judge_batches(
    codes: np.ndarray, batch_n: np.ndarray, levels: list[str], control: str | None, column: str, findings: list[str]
) -> dict[str, Any]:
    """Return the fields on perturbations and batches, and add findings."""
    both = (codes >= 0) & (batch_n >= 0)
    pairs = np.unique(np.column_stack([codes[both], batch_n[both]]), axis=0)
    k = levels.index(control) if control is not None else -1
    n_of = np.bincount(pairs[:, 0], minlength=len(levels))
    present = np.flatnonzero(n_of)
    perts = present[present != k]
    if not len(perts):
        return {}
    v = get_cramers_v(codes, batch_n)
    n_batches = len(np.unique(batch_n[both]))
    if np.isfinite(v) and v >= CONFOUNDED:
        findings.append(
            f"Perturbation and {column} are confounded (Cramér's V {v:.2f}): an effect may be that of the {column}; "
            f"compare within it ({spell('stratify', column)})."
        )
    alone = int((n_of[perts] == 1).sum())
    if alone and n_batches > 1:
        findings.append(
            f"{alone:,} of {len(perts):,} perturbations occur in one {column} of {n_batches:,} alone: there is no "
            "replicate to tell an effect from chance."
        )
    if k >= 0:
        with_control = set(pairs[pairs[:, 0] == k, 1].tolist())
        lost = [p for p in perts if not with_control & set(pairs[pairs[:, 0] == p, 1].tolist())]
        if lost:
            some = ", ".join(levels[p] for p in lost[:5]) + (", …" if len(lost) > 5 else "")
            findings.append(f"{len(lost):,} perturbations share no {column} with the controls ({some}).")
        bare = n_batches - len(with_control)
        if bare:
            findings.append(f"{bare:,} of {n_batches:,} labels of {column} hold no control cell.")
    return {
        "replicates_per_perturbation": _spread(n_of[perts]),
        "confounding": float(v) if np.isfinite(v) else None,
    }  # fmt: skip
