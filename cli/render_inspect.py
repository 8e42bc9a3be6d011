"""How ``inspect`` shows what it found."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from vcelltools.cli.output import Output

if TYPE_CHECKING:
    from vcelltools.pipelines.inspect import ColumnReport, InspectReport, MatrixReport

_MATRIX_COLUMNS = ["matrix", "layout", "cells × genes", "stored as", "non-zeros", "packed", "MB", "values"]
_ROLES = {
    "perturbation": "perturbation",
    "batch": "batch",
    "cell_line": "cell line",
    "n_guides": "guides a cell",
    "gene_id": "gene ids",
    "gene_name": "gene names",
}


def show_inspect(o: Output, r: InspectReport) -> None:
    """Print the report: JSON, or matrices, columns with a role, and problems."""
    size = "" if r.size_bytes is None else f", {r.size_bytes / 1e6:,.1f} MB"
    shape = "" if r.n_cells is None else f", {r.n_cells:,} cells × {r.n_genes:,} genes ({r.index_kind})"
    o.result(r.to_json(), f"{r.path}: {r.kind or 'unreadable'}{size}{shape}\n")
    o.table(
        ["matrix", "layout", "cells × genes", "stored as", "non-zeros", "packed", "MB", "values"],
        _matrices(r),
        left=True,
    )
    rows = _roles(r)
    if rows:
        o.table(["\nrole", "\ncolumn", "\nlabels", "\nmissing", "\nmost frequent"], rows, left=True)
    if o.verbose:
        every = [[c.name, c.kind, c.n_labels, c.n_missing, _examples(c)] for c in (*r.obs, *r.var)]
        o.table(["\ncolumn", "\nkind", "\nlabels", "\nmissing", "\nmost frequent"], every, left=True)
    if not o.json and r.problems:
        o.table([f"\n{len(r.problems)} problem{'s' if len(r.problems) > 1 else ''}"], [[p] for p in r.problems])
    for note in r.notes:
        o.note(f"note: {note}")
    counts = next((m for m in r.matrices if (m.modality, m.layer) == r.opened and m.is_counts), None)
    if counts is not None:
        o.done(f"next: vcelltools hvg {' '.join(p for p in (shlex.quote(r.path), counts.options) if p)}")
    else:
        o.done("nothing in it can be used as counts")


def _matrices(r: InspectReport) -> list[list[object]]:
    return [[_name(m), *_matrix_row(m)] for m in r.matrices]


def _name(m: MatrixReport) -> str:
    return m.layer if m.modality is None else f"{m.modality}: {m.layer}"


def _matrix_row(m: MatrixReport) -> list[object]:
    if m.shape is None:
        return [None, None, None, None, None, None, m.problem]
    stored = m.dtype if m.index_dtype is None else f"{m.dtype} at {m.index_dtype}"
    share = "" if m.nnz is None else f"{m.nnz:,} ({m.nnz / max(m.shape[0] * m.shape[1], 1):.1%})"
    verdict = m.problem or (m.counts.describe() if m.counts else "")
    size = f"{(m.stored_bytes or 0) / 1e6:,.1f}"
    return [m.layout, f"{m.shape[0]:,} × {m.shape[1]:,}", stored, share, "+".join(m.compression) or "no", size, verdict]


def _roles(r: InspectReport) -> list[list[object]]:
    rows: list[list[object]] = []
    for role, name in _ROLES.items():
        for c in r.get_columns(role)[:4]:
            rows.append([name, c.name, c.n_labels, c.n_missing, _examples(c)])
            if role == "perturbation" and c.controls:
                rows.append(["  its control", "", None, None, ", ".join(f"{v} ({k:,})" for v, k in c.controls)])
    return rows


def _examples(c: ColumnReport) -> str:
    return ", ".join(v if k == 1 else f"{v} ({k:,})" for v, k in c.examples)
